//! migrd: the daemon that runs workloads and moves them to a peer.
//!
//! The walk of one `migctl migrate` through this crate is told in
//! `docs/architecture.md`; the modules below stand in the order of that walk.

pub mod api;
pub mod checkpoint;
pub mod child;
pub mod config;
pub mod host_memory;
pub mod keeper;
pub mod migration;
pub mod network;
pub mod pages;
pub mod registry;
pub mod serial_log;
pub mod serve;
pub mod sys;
pub mod units;
pub mod vmm;
pub mod wire;
pub mod workload;
