//! How a workload changes hosts.
//!
//! Owns the order of a migration, its abort and its commit. May not touch
//! tonic, KVM, CRIU or libc: what it needs of the network is in [`link`].

pub mod link;
