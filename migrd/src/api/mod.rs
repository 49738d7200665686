//! The gRPC services: translation between the protocol and the registry.
//!
//! May not touch the insides of workloads, nor the file system, but to read a bundle
//! that a user names (`container_orders`). `status` is the
//! only place where an error becomes a gRPC status.

mod adoption;
mod container_orders;
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
