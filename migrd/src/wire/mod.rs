//! The bulk path: page chunks over several gRPC connections, the lanes.
//!
//! Owns framing, size limits, lanes and the calls to other daemons; what goes
//! over the wire is described in `docs/protocol.md`. May not touch the policy
//! of a migration, or know more of a kind of workload than its name.
//!
//! [`send`] builds batches from a [`ChunkSource`](crate::workload::ChunkSource),
//! `writer` sends them on a lane, [`codec`] writes and reads them, `service`
//! lets lanes in, [`receive`] checks batches against [`limits`] and puts their
//! bytes into a [`ChunkSink`](crate::workload::ChunkSink).

mod batch;
pub mod codec;
pub mod file;
mod gate;
mod kept;
pub mod limits;
mod manifest;
mod peers;
pub mod receive;
pub mod send;
mod service;
mod writer;

use std::time::Duration;

use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Endpoint, Server};

pub use manifest::{manifest_from_wire, manifest_to_wire};
pub use peers::{BadAddress, Peers};

/// Version of the protocol between daemons; both must speak the same.
pub const PROTOCOL: u32 = 1;

/// Name of the gRPC service.
pub const SERVICE: &str = "migr.v1.Lanes";
/// Path of its only method.
pub const TRANSFER: &str = "/migr.v1.Lanes/Transfer";
/// Metadata that names the migration.
pub const MIGRATION_KEY: &str = "migr-migration-id";
/// Metadata that names the lane.
pub const LANE_KEY: &str = "migr-lane";

const WINDOW: u32 = 8 << 20;
const FRAME: u32 = 256 << 10;
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(10);

/// The HTTP/2 settings lanes want of a server: windows that hold what a lane
/// has under way, large frames, and an end to connections whose peer is gone.
#[must_use]
pub fn server_settings<L>(server: Server<L>) -> Server<L> {
    server
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// The connections of `listener`, without Nagle's algorithm. tonic sets that on
/// listeners it made itself only; with it, acknowledgements and window updates
/// wait for the delayed ACK of the one before: 40 ms a window.
#[must_use]
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// [`server_settings`] for the side that connects.
#[must_use]
pub fn client_settings(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// The deepest cause of an error, which is the one that says something.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

#[cfg(test)]
mod tests;
