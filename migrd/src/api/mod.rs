//! The gRPC services: translation between the protocol and the registry.
//!
//! May not touch the file system or the insides of workloads. `status` is the
//! only place where an error becomes a gRPC status.

mod control;
mod convert;
mod host;
mod orders;
mod output;
mod peer;
mod process_orders;
mod status;

pub use control::ControlService;
pub use peer::PeerService;

#[cfg(test)]
mod tests;
