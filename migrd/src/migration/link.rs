//! What a migration needs of the way to its peer: calls and lanes.
//!
//! Traits only; `wire` implements them over gRPC, tests in memory.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::units::{Epoch, HostId, MigrationId, PageRun, WorkloadId};
use crate::workload::{
    ChunkSource, Manifest, OutOfStream, Piece, Problem, StreamHash, StreamKey, StreamSpec,
};

/// A call to the peer failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// No answer: what was asked may have been done or not.
    #[error("lost the connection to {peer}: {cause}")]
    Lost {
        /// The peer's address.
        peer: String,
        /// What the connection said.
        cause: String,
    },
    /// The peer answered that it did not do it.
    #[error("{peer} refused: {message}")]
    Rejected {
        /// The peer's address.
        peer: String,
        /// What the peer said.
        message: String,
    },
    /// The peer does not keep to the protocol.
    #[error("{peer} broke the protocol: {message}")]
    Misbehaved {
        /// The peer's address.
        peer: String,
        /// What it did.
        message: String,
    },
    /// Pages were to be sent that the workload does not have.
    #[error("cannot read what is to be sent ({0})")]
    Source(#[from] OutOfStream),
    /// The peer is something else, or of another protocol version.
    #[error("{peer} is not a migrd this one can talk to: {cause}")]
    Stranger {
        /// The peer's address.
        peer: String,
        /// What was found instead.
        cause: String,
    },
}

/// What the lanes of one migration carried so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneTotals {
    /// Batches of each lane.
    pub batches: Vec<u64>,
    /// Pages sent with their bytes.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Bytes handed to the connections, framing included.
    pub bytes_on_wire: u64,
}

/// The bulk path of one migration.
#[async_trait]
pub trait PageLanes: Send {
    /// Queues pages; they are read when their turn comes, so `clear` must have
    /// been called before. Waits while much is in flight.
    async fn send(&mut self, key: StreamKey, run: PageRun) -> Result<(), LinkError>;

    /// Waits until everything queued is in place at the destination.
    async fn flush(&mut self) -> Result<LaneTotals, LinkError>;
}

/// What a peer says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerFacts {
    /// Its id.
    pub host: HostId,
    /// Version of its daemon.
    pub version: String,
    /// Memory that a new workload could have there, in bytes.
    pub memory_free_bytes: u64,
}

/// A workload offered to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The migration.
    pub migration: MigrationId,
    /// The epoch the peer would own it in.
    pub epoch: Epoch,
    /// What is coming.
    pub manifest: Manifest,
    /// How many lanes will carry it.
    pub lanes: u32,
    /// Check only.
    pub dry_run: bool,
}

/// Something that stops a migration before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// Stable, for scripts.
    pub code: String,
    /// What it is.
    pub message: String,
    /// What to do.
    pub remedy: String,
    /// The host it was found on; empty for the one that asks.
    pub host: String,
}

impl Blocker {
    /// What was found on `host`.
    #[must_use]
    pub fn found_on(host: &str, problem: Problem) -> Self {
        let Problem { code, message, remedy } = problem;
        Self { code: code.to_owned(), message, remedy, host: host.to_owned() }
    }
}

/// The end of the stream of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealOrder {
    /// The migration.
    pub migration: MigrationId,
    /// Batches of each lane.
    pub batches: Vec<u64>,
    /// What `Workload::save` gave.
    pub state: Vec<u8>,
    /// Hashes to compare; empty: don't.
    pub hashes: Vec<StreamHash>,
}

/// The peer holds a complete copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealReport {
    /// Loading the state took this long.
    pub restore: Duration,
    /// Hashing took this long.
    pub verify: Duration,
    /// The hashes were compared and are equal.
    pub verified: bool,
}

/// How a migration stands in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// At a source: not decided yet.
    Pending,
    /// At a source: released to the asker.
    Released,
    /// At a source: never to be released.
    Aborted,
    /// At a destination: complete, waiting.
    Sealed,
    /// At a destination: owned, or owned once and passed on.
    Owned,
    /// At a destination: never to be run.
    Discarded,
    /// At a destination: owned, and memory of it still is at the source.
    Filling,
}

/// The peer runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activated {
    /// What that took the peer.
    pub took: Duration,
    /// Memory of it still is at the source.
    pub filling: bool,
}

/// Memory that is asked of the source of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pull {
    /// The source.
    pub host: HostId,
    /// The migration.
    pub migration: MigrationId,
    /// What was moved.
    pub workload: WorkloadId,
    /// The epoch it is owned in at the destination.
    pub epoch: Epoch,
    /// Which memory.
    pub piece: Piece,
}

/// What a source answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// The memory.
    Bytes(Vec<u8>),
    /// It can't be had any more: why.
    Lost(String),
    /// Not now: why.
    Later(String),
}

/// The peer daemon, as one side of a migration sees it.
#[async_trait]
pub trait Peer: Send + Sync {
    /// Its address, for messages.
    fn address(&self) -> &str;

    /// Who is there.
    async fn identify(&self) -> Result<PeerFacts, LinkError>;

    /// Offers a workload. An empty answer is a yes.
    async fn offer(&self, offer: &Offer) -> Result<Vec<Blocker>, LinkError>;

    /// Opens the lanes for an accepted offer.
    async fn lanes(
        &self,
        migration: MigrationId,
        streams: &[StreamSpec],
        chunks: Arc<dyn ChunkSource>,
        lanes: u32,
    ) -> Result<Box<dyn PageLanes>, LinkError>;

    /// Everything was sent.
    async fn seal(&self, order: &SealOrder) -> Result<SealReport, LinkError>;

    /// It is yours: run it. May be repeated. Refused by any daemon but `host`.
    async fn activate(
        &self,
        host: HostId,
        migration: MigrationId,
        epoch: Epoch,
    ) -> Result<Activated, LinkError>;

    /// It will not be yours.
    async fn abandon(&self, migration: MigrationId, reason: &str) -> Result<(), LinkError>;

    /// How does it stand with you? Refused by any daemon but `host`: another
    /// one's journal proves nothing.
    async fn resolve(
        &self,
        host: HostId,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
        from_source: bool,
    ) -> Result<Standing, LinkError>;

    /// Memory that stays with you.
    async fn pull(&self, pull: &Pull) -> Result<Pulled, LinkError>;
}

/// The receiving end of one migration's lanes.
#[async_trait]
pub trait Intake: Send + Sync {
    /// Waits until each lane has put so many batches in place.
    ///
    /// # Errors
    /// In words, when a lane failed or the batches do not come.
    async fn complete(&self, batches: &[u64]) -> Result<(), String>;

    /// When something last arrived.
    fn last_activity(&self) -> std::time::Instant;

    /// Takes nothing more.
    fn close(&self, reason: &str);
}

/// Lets lanes in for migrations that were accepted, and no others.
pub trait LaneGate: Send + Sync {
    /// From now on takes the lanes of `migration` until the intake is closed.
    fn open(
        &self,
        migration: MigrationId,
        streams: &[StreamSpec],
        sink: Arc<dyn crate::workload::ChunkSink>,
        lanes: u32,
    ) -> Arc<dyn Intake>;
}
