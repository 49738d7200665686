//! Generated types of the migr protocol; the sources are in `proto/migr/v1/`.
//!
//! Nothing here is written by hand: what a message means is said beside it in
//! its `.proto` file, and what may be believed of one that came from a peer is
//! decided by its receiver.

/// Version 1 of the protocol: `control`, `peer`, `lanes`, `state`, `child`,
/// `keeper`.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("migr.v1");

    /// The compiled `FileDescriptorSet` of every file, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/migr.v1.bin"));
}
