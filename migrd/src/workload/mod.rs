//! What a migration needs of a workload, whatever its kind.
//!
//! Owns the traits; a kind of workload is a folder beside this file. The
//! migration moves chunks of numbered streams and never knows what one means.
//! May not touch tonic or the phases of a migration.

mod addresses;
mod ended;
mod engine;
pub mod following;
pub mod link;
pub mod logged;
mod needs;
pub mod outliving;
mod output;
pub mod process;
pub mod storage;
mod streams;
pub mod vm;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::pages::PageSet;
use crate::units::SnapshotId;
pub use addresses::{Address, NetAddress};
pub use ended::NoStreams;
pub use engine::{Arriving, Engine, Kind, Manifest, Recovers};
pub use following::{Follows, Lacks, LeftMemory, Piece};
pub use needs::{Needing, Needs, needed};
pub use output::{Footprint, Output, Terminal};
pub use streams::{ChunkSink, ChunkSource, OutOfStream, StreamHash, StreamKey, StreamSpec};

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

/// Something that keeps a host from taking a workload, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Stable, for scripts: `destination-disk-missing`.
    pub code: &'static str,
    /// What is in the way.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

impl Problem {
    /// A problem.
    pub fn new(code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: remedy.into() }
    }
}

/// What of a workload travels, and what may be done to it for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carry {
    /// Its disks travel with it.
    pub disks: bool,
    /// It goes to files on a disk, and takes no memory on its way.
    pub to_files: bool,
    /// Its streams will be hashed at the end, and have to be the same as when they were
    /// sent.
    pub verify: bool,
    /// What these files build on.
    pub chain: Chain,
    /// Memory that can stay behind at the stop does, and follows.
    pub follows: bool,
    /// What may be done to a process tree.
    pub process: ProcessOptions,
}

/// Snapshots of files that build on each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The one that is made, if others may build on it.
    pub id: Option<SnapshotId>,
    /// The one that it builds on.
    pub after: Option<SnapshotId>,
}

/// What the user allows to be done to a process tree that moves or is
/// checkpointed. Each gives something up, so none is done unasked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessOptions {
    /// Carry locks on files: whoever else holds one there keeps it from starting.
    pub file_locks: bool,
    /// Make names for open files that have none left.
    pub link_remap: bool,
    /// The largest deleted file to carry, in bytes; 0: CRIU's own limit.
    pub ghost_limit_bytes: u64,
    /// Close established TCP connections.
    pub drop_connections: bool,
}

/// How the memory of a workload can move while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// Page by page: [`Workload::start_tracking`], [`Workload::dirty`] and
    /// [`Workload::clear`].
    Pages,
    /// In copies of what has changed, which it makes itself:
    /// [`Workload::copy_ahead`].
    Copies {
        /// It has enough memory for that to be better than to stop it at once.
        pays: bool,
        /// Why it does or does not, in words.
        why: String,
    },
    /// Not at all, and why, in words.
    Not(String),
}

/// What a workload is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// It runs.
    Running,
    /// It stands still because somebody asked for that.
    Paused,
    /// It ended by itself, or was stopped: why.
    Ended(String),
}

/// A workload of this host: what a migration takes away, and what an operator
/// does to it meanwhile.
///
/// It runs unless it was frozen; `freeze` and `thaw` come in pairs.
#[async_trait]
pub trait Workload: Send + Sync {
    /// Its streams.
    fn streams(&self) -> Vec<StreamSpec>;

    /// Reads its streams from any thread.
    fn chunks(&self) -> Arc<dyn ChunkSource>;

    /// What it is doing. The channel closes only with the workload's drop.
    fn state(&self) -> watch::Receiver<RunState>;

    /// Its output and input, usable while a migration holds the workload.
    fn terminal(&self) -> Arc<dyn Terminal>;

    /// Chooses what travels and what may be done for that: from then on its
    /// disks are among its [`streams`](Self::streams) and
    /// [`chunks`](Self::chunks), or no longer.
    ///
    /// # Errors
    /// When something can't travel.
    async fn carry(&mut self, what: Carry) -> Result<(), WorkloadError>;

    /// Says what it has to find on a host that it goes to, as of the last call of
    /// [`problems`](Self::problems). It may be called without the workload.
    fn needs(&self) -> Needing;

    /// What keeps it from being saved as it is now, with what `carry` chose;
    /// empty: nothing is known to. Only looks.
    ///
    /// # Errors
    /// When it can't be looked at.
    async fn problems(&mut self) -> Result<Vec<Problem>, WorkloadError>;

    /// Whether its saved form is a directory of files, which
    /// [`save_files_in`](Self::save_files_in) names.
    fn saves_files(&self) -> bool;

    /// Has the next `freeze` write into `directory`, which is empty, what else would
    /// be streams: until the next [`carry`](Self::carry), or a `thaw`. `onto` is where
    /// those are that they build on, relative to the directory; empty: on none.
    ///
    /// # Errors
    /// When it saves no files.
    async fn save_files_in(
        &mut self,
        directory: OwnedFd,
        onto: String,
    ) -> Result<(), WorkloadError>;

    /// Whether and how its memory can move while it runs, as it is now and with what
    /// `carry` chose.
    fn ahead(&self) -> Ahead;

    /// Whether its memory can follow when it runs elsewhere already, as it is now and with
    /// what `carry` chose.
    fn follows(&self) -> Follows;

    /// Of a frozen workload, what of its memory is in no part of its
    /// [`rest`](Self::rest) because it follows; `None`: nothing.
    fn left_behind(&self) -> Option<Arc<dyn LeftMemory>>;

    /// The memory that it lacks, because it follows; `None` when it can lack none.
    fn lacks(&self) -> Option<Arc<dyn Lacks>>;

    /// The next part of what it has on disks and sends while it runs, in whatever mode
    /// it moves; `None` when that was all. What of it changes after that is part of the
    /// [`rest`](Self::rest). Ended by [`stop_tracking`](Self::stop_tracking).
    ///
    /// # Errors
    /// When there is no next part. It runs on.
    async fn files_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError>;

    /// Of one that moves [by copies](Ahead::Copies): the next part of a copy that it
    /// makes while it runs, `None` when that copy is complete; the call after that
    /// begins the next. The first copy has everything, each other one what has changed
    /// since the one before, and after the last [`rest`](Self::rest) has the same. A
    /// part does not change any more. Ended by
    /// [`stop_tracking`](Self::stop_tracking), also in the middle.
    ///
    /// # Errors
    /// When there is no next part. It runs on.
    async fn copy_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError>;

    /// From now on knows which pages differ from what was last cleared. At
    /// first every populated page does.
    async fn start_tracking(&mut self) -> Result<(), WorkloadError>;

    /// Ends what `start_tracking` or `copy_ahead` began. Harmless if neither did.
    async fn stop_tracking(&mut self) -> Result<(), WorkloadError>;

    /// The pages that hold something and were written since they were last
    /// cleared; without tracking, all that hold something. Clears nothing.
    async fn dirty(&mut self) -> Result<PageSet, WorkloadError>;

    /// Takes `pages` as clean; called right before they are read, so that a
    /// write after that shows in the next `dirty`.
    async fn clear(&mut self, pages: &PageSet) -> Result<(), WorkloadError>;

    /// Has its devices finish what they have begun, while it runs on: a `freeze`
    /// soon after does not wait for slow storage. Undone by `thaw`.
    ///
    /// # Errors
    /// When one does not finish; everything goes on then.
    async fn drain(&mut self) -> Result<(), WorkloadError>;

    /// Stops it: when this returns nothing of it runs and nothing writes to
    /// its streams. On an error it runs.
    async fn freeze(&mut self) -> Result<(), WorkloadError>;

    /// Of a frozen workload: the next part of what has to be sent, `None` when
    /// there is no more. What is in a part does not change any more, and the
    /// parts together are everything that the destination does not have. What is
    /// written only while the workload stands still is a part as soon as it is
    /// written, so this may take long; nothing is lost when its future is
    /// dropped and the workload thawed.
    ///
    /// # Errors
    /// When there is no next part, though not everything was sent.
    async fn rest(&mut self) -> Result<Option<PageSet>, WorkloadError>;

    /// Whether `save` may be called beside the sending of the first part of the
    /// [`rest`](Self::rest). Otherwise it is called after the last.
    fn saves_early(&self) -> bool;

    /// Hashes its streams, of a frozen workload.
    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError>;

    /// Everything that is not in its streams, of a frozen workload.
    async fn save(&mut self) -> Result<Vec<u8>, WorkloadError>;

    /// Of a frozen workload: gives up what only one host may hold, such as its
    /// disks, with everything written to them durable. Undone by `thaw`.
    ///
    /// # Errors
    /// When that is not certain; it may hold less than before.
    async fn let_go(&mut self) -> Result<(), WorkloadError>;

    /// Runs again after `freeze`, with what it had let go. A workload that was
    /// paused before stays so.
    async fn thaw(&mut self) -> Result<(), WorkloadError>;

    /// Stands still until `resume`.
    async fn pause(&mut self) -> Result<(), WorkloadError>;

    /// Runs again after `pause`.
    async fn resume(&mut self) -> Result<(), WorkloadError>;

    /// Asks it to end by its own doing, as a power button does, and does not
    /// wait for that: its state will say.
    ///
    /// # Errors
    /// When nothing in it listens.
    async fn ask_to_end(&mut self) -> Result<(), WorkloadError>;

    /// Ends it at once, if it has not ended, and gives up what it holds. Its
    /// output stays readable, and so does why it ended.
    async fn stop(&mut self) -> Result<(), WorkloadError>;

    /// Drops it and everything this host holds of it.
    async fn discard(self: Box<Self>);
}

#[cfg(test)]
pub mod fake;
