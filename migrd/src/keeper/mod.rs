//! The process that keeps one process tree: its parent, its standard input and
//! output, and the hand that CRIU is held by.
//!
//! Like a VMM child it is started by a daemon and outlives it: a later daemon finds
//! it by its socket. It has no tokio and knows nothing of migrations.
//!
//! In the order of its life: [`entry`] takes what it inherited, [`control`] serves
//! the daemon, [`tree`] starts and ends the processes, whose first moments are
//! [`init`]'s, in the [`mounts`] and the [`cgroup`] made for them, with [`stdio`] as
//! their input and output. `ahead` has [`criu`] write memory while a tree runs; [`hold`]
//! has it write a tree, or make one, and holds it there, with its [`timers`] and its
//! [`tcp_options`] in order, until the daemon has decided which copy is to run; [`adopt`]
//! does both at once with a tree that was not started here, and puts a [`reaper`] above
//! it; [`container`] does for containers what [`tree`] and [`hold`] do for other trees;
//! [`connections`] makes good what a CRIU that was killed has left.

pub mod adopt;
mod ahead;
pub mod cgroup;
pub mod connections;
pub mod container;
pub mod control;
pub mod criu;
pub mod entry;
pub mod following;
pub mod hold;
pub mod init;
pub mod lazy_pages;
pub mod mounts;
pub mod reaper;
pub mod stdio;
pub mod tcp_options;
pub mod timers;
pub mod tree;
