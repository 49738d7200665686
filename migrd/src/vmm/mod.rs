//! The child process that is one virtual machine.
//!
//! Owns the KVM descriptors, the vCPUs' threads, the devices and the snapshot
//! of all that. May not touch tokio, the network, paths, the daemon's
//! configuration or its journal: it has only the descriptors it was given.
//!
//! In the order of its life: `entry` takes those and builds the `machine`,
//! `sandbox` confines it, `control` serves the daemon, `boot` or `snapshot`
//! fills it, `vcpu` runs it, `bus` and `devices` answer it.

pub mod boot;
pub mod bus;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod dirty;
pub mod entry;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod pages;
mod power_on;
pub mod sandbox;
pub mod snapshot;
pub mod state;
pub mod vcpu;
pub mod virtio;
