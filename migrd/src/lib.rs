//! migrd: the daemon that runs workloads and moves them to a peer.
//!
//! The walk of one `migctl migrate` through this crate is told in
//! `docs/architecture.md`; the modules below stand in the order of that walk.

pub mod migration;
pub mod pages;
pub mod units;
pub mod wire;
pub mod workload;
