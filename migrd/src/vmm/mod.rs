//! The child process that is one VM.
//!
//! Owns the vCPUs, the devices and their snapshot. May not touch tokio, the
//! network, paths, the configuration or the journal: it works with the file
//! descriptors it was given.

pub mod boot;
pub mod cpuid;
pub mod snapshot;
