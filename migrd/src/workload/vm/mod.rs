//! Virtual machines as workloads.
//!
//! Owns the daemon's side of a VMM child, its view of the guest's memory and
//! the serial log. May not touch tonic, the phases of a migration, or KVM.

pub mod child;
pub mod link;
pub mod serial_log;
