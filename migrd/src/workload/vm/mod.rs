//! Virtual machines as workloads.
//!
//! Owns the daemon's side of a VMM child and its view of the guest's memory.
//! May not touch tonic, the phases of a migration, or KVM.

pub mod child;
pub mod link;
