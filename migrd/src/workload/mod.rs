//! What a migration needs of a workload, whatever its kind.
//!
//! Owns the traits; a kind of workload is a folder beside this file. The
//! migration moves chunks of numbered streams and never knows what one means.
//! May not touch tonic or the phases of a migration.

pub mod vm;

use std::sync::Arc;

use async_trait::async_trait;

use crate::pages::PageSet;

/// Number of one stream of a workload: a memory region, a log, a disk, an
/// image file. Chosen by the workload, carried on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamKey(pub u32);

/// One stream as the manifest announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// Its number.
    pub key: StreamKey,
    /// For people: `ram0`, `serial-log`.
    pub name: String,
    /// Length in bytes, a multiple of the page size.
    pub length: u64,
}

/// A workload could not do what was asked of it. It still is what it was
/// before, unless the method's documentation says otherwise.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct WorkloadError {
    /// What failed, and what to do about it.
    pub message: String,
    /// What the system said.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl WorkloadError {
    /// An error with its words only.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None }
    }

    /// An error that keeps what caused it.
    pub fn caused(
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { message: message.into(), source: Some(Box::new(source)) }
    }
}

/// An access outside a stream, or to a stream that does not exist.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("stream {} has no bytes {offset}..{offset}+{length}", key.0)]
pub struct OutOfStream {
    /// The stream.
    pub key: StreamKey,
    /// First byte asked for.
    pub offset: u64,
    /// Number of bytes asked for.
    pub length: u64,
}

/// The bytes of a workload's streams, read while it runs: what a chunk holds is
/// what was there at some instant of the call.
pub trait ChunkSource: Send + Sync {
    /// Fills `into` with the stream's bytes from `offset` on.
    ///
    /// # Errors
    /// When the stream has no such bytes; `into` is then unspecified.
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream>;

    /// Whether the `length` bytes from `offset` on are all zero.
    ///
    /// # Errors
    /// When the stream has no such bytes.
    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream>;
}

/// Where the bytes of a workload's streams are put at the destination.
pub trait ChunkSink: Send + Sync {
    /// Puts `bytes` into the stream from `offset` on.
    ///
    /// # Errors
    /// When the stream has no such bytes; nothing is then written.
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream>;

    /// Makes the `length` bytes from `offset` on zero, without taking memory
    /// for what never held anything.
    ///
    /// # Errors
    /// When the stream has no such bytes; nothing is then written.
    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream>;
}

/// BLAKE3 of one stream; what exactly is hashed is in `docs/protocol.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHash {
    /// The stream.
    pub key: StreamKey,
    /// Its hash.
    pub hash: [u8; 32],
}

/// The workload at the source of a migration.
///
/// It runs unless it was frozen; `freeze` and `thaw` come in pairs.
#[async_trait]
pub trait SourceWorkload: Send {
    /// Its streams.
    fn streams(&self) -> Vec<StreamSpec>;

    /// Reads its streams from any thread.
    fn chunks(&self) -> Arc<dyn ChunkSource>;

    /// From now on knows which pages differ from what was last cleared. At
    /// first every populated page does.
    async fn start_tracking(&mut self) -> Result<(), WorkloadError>;

    /// Ends what `start_tracking` began. Harmless if it did not.
    async fn stop_tracking(&mut self) -> Result<(), WorkloadError>;

    /// The pages that hold something and were written since they were last
    /// cleared. Clears nothing.
    async fn dirty(&mut self) -> Result<PageSet, WorkloadError>;

    /// Takes `pages` as clean; called right before they are read, so that a
    /// write after that shows in the next `dirty`.
    async fn clear(&mut self, pages: &PageSet) -> Result<(), WorkloadError>;

    /// Stops it: when this returns nothing of it runs and nothing writes to
    /// its streams. On an error it runs.
    async fn freeze(&mut self) -> Result<(), WorkloadError>;

    /// Hashes its streams, of a frozen workload.
    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError>;

    /// Everything that is not in its streams, of a frozen workload.
    async fn save(&mut self) -> Result<Vec<u8>, WorkloadError>;

    /// Runs again after `freeze`. A workload that was paused before stays so.
    async fn thaw(&mut self) -> Result<(), WorkloadError>;

    /// Ends the stopped copy after the destination has confirmed that it runs.
    async fn discard(self: Box<Self>);

    /// Resolves, with the reason, when the workload has ended by itself.
    async fn ended(&mut self) -> String;
}

/// The workload at the destination, from empty to running.
#[async_trait]
pub trait DestinationWorkload: Send {
    /// Writes its streams from any thread.
    fn chunks(&self) -> Arc<dyn ChunkSink>;

    /// Takes what [`SourceWorkload::save`] gave. It does not run yet.
    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError>;

    /// Hashes its streams.
    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError>;

    /// Runs it, or leaves it paused if it was paused at the source.
    async fn start(&mut self) -> Result<(), WorkloadError>;

    /// Drops it and everything it holds.
    async fn discard(self: Box<Self>);
}
