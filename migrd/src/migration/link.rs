//! What a migration needs of the way to its peer, whatever carries it.

use std::sync::Arc;

use async_trait::async_trait;

use crate::units::PageRun;
use crate::workload::{OutOfStream, StreamKey};

/// What has gone over the lanes so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneTotals {
    /// Batches sent, by lane; the destination must have applied as many.
    pub batches: Vec<u64>,
    /// Pages whose bytes were sent.
    pub data_pages: u64,
    /// Pages that were sent as zero, without bytes.
    pub zero_pages: u64,
    /// Bytes given to the transport, framing of batches included.
    pub bytes_on_wire: u64,
}

/// The way to the peer does not carry anything more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection failed, or never came about.
    #[error("the connection to {peer} is lost: check that migrd runs there and is reachable")]
    Lost {
        /// Address of the peer.
        peer: String,
        /// What the transport said.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The peer answered and does not go on.
    #[error("{peer} refused the transfer: {message}")]
    Rejected {
        /// Address of the peer.
        peer: String,
        /// What it said.
        message: String,
    },
    /// The peer does not keep to the protocol.
    #[error("{peer} broke the protocol: {message}; check that both ends run the same version")]
    Misbehaved {
        /// Address of the peer.
        peer: String,
        /// What it did.
        message: String,
    },
    /// Pages were queued that the workload does not have.
    #[error("cannot read the pages to send")]
    Source(#[from] OutOfStream),
}

/// Carries pages to the destination.
#[async_trait]
pub trait PageLanes: Send {
    /// Queues pages. They are read when their turn comes, so they must be
    /// cleared in the dirty log before this call. Waits while much is under way.
    ///
    /// # Errors
    /// When any lane has failed; it stays failed.
    async fn send(&mut self, key: StreamKey, run: PageRun) -> Result<(), LinkError>;

    /// Waits until the destination has acknowledged everything queued.
    ///
    /// # Errors
    /// When any lane has failed; it stays failed.
    async fn flush(&mut self) -> Result<LaneTotals, LinkError>;

    /// Flushes and ends every lane in order.
    ///
    /// # Errors
    /// When any lane has failed.
    async fn close(self: Box<Self>) -> Result<LaneTotals, LinkError>;
}
