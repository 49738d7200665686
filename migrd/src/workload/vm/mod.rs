//! Virtual machines as workloads, seen from the daemon.
//!
//! Owns what the daemon holds of a VM: its child process, its view of the
//! guest's memory, its serial log. May not touch tonic, the phases of a
//! migration, or KVM ioctls.

pub mod child;
pub mod link;
pub mod serial_log;
