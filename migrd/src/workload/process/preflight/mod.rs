//! What would keep CRIU from taking a process tree, looked for in /proc while
//! the tree runs on: nothing is frozen, and nothing of it is opened.
//!
//! Owns the rules: what CRIU refuses, as its source says and as
//! `tests/preflight.rs` has it confirm, and what it takes but cannot bring to
//! life elsewhere (a pipe to a process that stays behind). What is seen may be
//! over when CRIU looks, and CRIU may find what was not there yet: it has the
//! last word. May not touch CRIU, the network of the host, or async.
//!
//! `tree` finds the processes, `descriptors`, `mappings` and `places` what they
//! have open; one file a concern says what is wrong with that. `files` is what
//! the tree must find at the destination.

mod adopting;
mod anonymous;
pub mod container;
mod deleted;
mod descriptors;
mod devices;
mod diag;
pub mod files;
mod locks;
mod mappings;
mod namespaces;
mod outside;
mod pipes;
mod places;
mod procfs;
mod report;
mod scan;
mod sockets;
mod tcp;
mod tree;
mod ttys;
mod unix;

pub use adopting::{Adoptable, look};
pub use scan::scan;
pub use tcp::Connection;
pub use tree::{Process, Tree};

use crate::workload::Problem;
use files::UsedFile;

/// The largest deleted file that CRIU carries unless told otherwise, in bytes.
pub const GHOST_LIMIT: u64 = 1 << 20;

/// What the user lets CRIU do, and what the scan can't know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Locks on files are carried.
    pub file_locks: bool,
    /// Files that have lost the name they were opened by get a new one.
    pub link_remap: bool,
    /// The largest deleted file that is carried, in bytes; 0: [`GHOST_LIMIT`].
    pub ghost_limit_bytes: u64,
    /// TCP connections are closed.
    pub drop_connections: bool,
    /// The tree has a network of its own, whose address moves with it.
    pub own_network: bool,
    /// Inodes of the pipes whose other end is migr's.
    pub kept_pipes: Vec<u64>,
    /// Mount points of file systems that move with the tree, and with them what it has
    /// there.
    pub carried: Vec<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What keeps the tree from moving; empty: nothing that is known of.
    pub problems: Vec<Problem>,
    /// The files that it needs at the destination, not hashed yet.
    pub files: Vec<UsedFile>,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads, each process's first one included.
    pub threads: usize,
    /// Memory of all processes, in bytes; what several share counts for each.
    pub resident_bytes: u64,
    /// TCP connections that leave the tree, or that moving it closes.
    pub established: Vec<Connection>,
}
