//! The workload that is a virtual machine, seen from the daemon.
//!
//! Owns what the daemon holds of a VM. May not touch tonic, the phases of a
//! migration or KVM ioctls.

pub mod serial_log;
