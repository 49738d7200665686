//! What the lab shows, each a function that fails unless it is so, and prints a
//! table. `tests/lab.rs` and `lab.sh demo` run them.

pub mod boots;
mod containers;
pub mod cpus;
pub mod cut;
pub mod demo;
pub mod freed;
pub mod moves;
pub mod power;
pub mod table;
pub mod trees;
