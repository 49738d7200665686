//! What a migration needs of a workload, whatever its kind.
//!
//! Owns the traits; a kind of workload is a folder beside this file. The
//! migration moves chunks of numbered streams and never knows what one means.
//! May not touch tonic or the phases of a migration.

mod ended;
pub mod following;
pub mod link;
pub mod logged;
pub mod outliving;
pub mod process;
pub mod storage;
pub mod vm;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::pages::PageSet;
use crate::units::{SnapshotId, WorkloadId};
pub use ended::NoStreams;
pub use following::{Follows, Lacks, LeftMemory, Piece};

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
    /// How many bytes of it need room on a disk at the destination, about; 0
    /// for what needs none.
    pub used: u64,
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
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
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

    /// Whether reading that stream may have to wait for storage.
    fn waits(&self, key: StreamKey) -> bool;
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

    /// Why something was refused that the stream has room for, with what to do about
    /// it; `None` where nothing but that is known.
    fn trouble(&self) -> Option<String> {
        None
    }
}

/// BLAKE3 of one stream; what exactly is hashed is in `docs/protocol.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHash {
    /// The stream.
    pub key: StreamKey,
    /// Its hash.
    pub hash: [u8; 32],
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

/// What can be asked of a workload while a migration holds it: its output, its
/// figures, and the way in for its input.
#[async_trait]
pub trait Terminal: Send + Sync {
    /// Output from the logical byte offset `from` on, at most about `max` bytes.
    /// Older output than is kept is left out.
    fn read(&self, from: u64, max: usize) -> Result<Vec<Output>, WorkloadError>;

    /// Where its output ends now, in bytes.
    fn end(&self) -> u64;

    /// Resolves when there may be more output than when `seen` was its end.
    async fn more_than(&self, seen: u64);

    /// Types `bytes`.
    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError>;

    /// Memory it has touched, in bytes; quick.
    fn populated_bytes(&self) -> u64;

    /// What it costs now.
    async fn footprint(&self) -> Result<Footprint, WorkloadError>;
}

/// Part of one line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Where `data` stands in everything the workload ever put out, in bytes.
    pub offset: u64,
    /// The bytes, of one line.
    pub data: Vec<u8>,
    /// `CLOCK_REALTIME` in ns at the first byte of the line.
    pub line_unix_ns: i64,
    /// `data` begins a line.
    pub starts_line: bool,
}

/// Figures of a workload, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Process that runs it, and of a process tree its init; 0 if none does.
    pub pid: u32,
    /// Processes of a process tree; 0 for other kinds.
    pub processes: u32,
    /// Memory it has touched, in bytes.
    pub populated_bytes: u64,
    /// Memory that running it costs beyond its own, in bytes.
    pub overhead_bytes: u64,
    /// Output so far, in bytes.
    pub log_bytes: u64,
    /// Output that was lost, in bytes.
    pub log_dropped_bytes: u64,
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

/// What a workload has to find on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// As its kind writes that down; empty: nothing.
    pub written: Vec<u8>,
    /// How much of files such a host reads, in bytes, to see whether it has that.
    pub reads: u64,
}

impl Needs {
    /// How much longer than others a host may take to see whether it has that: a slow
    /// disk gives 64 MiB a second.
    #[must_use]
    pub fn patience(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.reads >> 26)
    }
}

/// Says what a workload needs. Blocks as long as it takes to read as much of files as
/// it says that others have to.
pub type Needing = Arc<dyn Fn() -> Needs + Send + Sync>;

/// Has it said beside what is asynchronous.
///
/// # Errors
/// When it panics.
pub async fn needed(needing: Needing) -> Result<Needs, WorkloadError> {
    let said = tokio::task::spawn_blocking(move || needing()).await;
    said.map_err(|e| WorkloadError::caused("looking at the files that it needs failed", e))
}

/// The workload at the destination, from empty to running.
#[async_trait]
pub trait Arriving: Send + Sync {
    /// Writes its streams from any thread.
    fn chunks(&self) -> Arc<dyn ChunkSink>;

    /// The memory that it lacks or will lack, because it follows; `None` when it can lack
    /// none. It may lack some before [`load`](Self::load) is done.
    fn lacks(&self) -> Option<Arc<dyn Lacks>>;

    /// Takes what [`Workload::save`] gave. It does not run yet.
    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError>;

    /// Hashes its streams.
    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError>;

    /// Runs it, or leaves it paused if `paused`. May be called again after an
    /// error.
    async fn start(&mut self, paused: bool) -> Result<(), WorkloadError>;

    /// The workload, after `start`.
    fn arrived(self: Box<Self>) -> Box<dyn Workload>;

    /// Drops it and everything it holds.
    async fn discard(self: Box<Self>);
}

/// What a host needs to know to make room for a workload that arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The workload.
    pub workload: WorkloadId,
    /// Its name, valid and unused on this host when checked.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Its streams.
    pub streams: Vec<StreamSpec>,
    /// What its kind makes it of.
    pub config: Vec<u8>,
    /// Memory to reserve, in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs; 0 where that says nothing.
    pub cpus: u32,
    /// It stays paused.
    pub paused: bool,
    /// When it was first created, in ms since the Unix epoch.
    pub created_unix_ms: i64,
    /// What it has to find on a host, as its kind writes that down; empty when
    /// that is nothing.
    pub needs: Vec<u8>,
    /// Memory of it stays at the source, and follows when it runs.
    pub follows: bool,
}

/// A kind of workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A virtual machine.
    Vm,
    /// A process tree.
    Process,
    /// An OCI container: a process tree that runc makes.
    Container,
}

/// Makes workloads of one kind on this host.
#[async_trait]
pub trait Engine: Send + Sync {
    /// What keeps this host from running what the manifest announces; empty:
    /// nothing does. Nothing is made.
    async fn check(&self, manifest: &Manifest) -> Vec<Problem>;

    /// Ends what may be left of a workload that nobody holds, and deletes its
    /// files.
    async fn clear(&self, id: WorkloadId);

    /// Makes an empty workload that is ready to receive.
    async fn prepare(&self, manifest: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError>;
}

/// Finds the workloads of one kind again that an earlier daemon has made.
#[async_trait]
pub trait Recovers: Engine {
    /// An owned workload, as an earlier daemon left it. It runs unless `paused`, or
    /// has ended.
    ///
    /// # Errors
    /// When what is left of it can't be read.
    async fn find(
        &self,
        id: WorkloadId,
        name: &str,
        config: &[u8],
        paused: bool,
    ) -> Result<Box<dyn Workload>, WorkloadError>;

    /// The same, standing still whatever it did: it is not known whose it is.
    ///
    /// # Errors
    /// When it can't be read or does not stand still.
    async fn find_released(
        &self,
        id: WorkloadId,
        name: &str,
        paused: bool,
    ) -> Result<Option<Box<dyn Workload>>, WorkloadError>;

    /// The sealed copy of a workload, if it still lives.
    ///
    /// # Errors
    /// When it can't be read.
    async fn find_sealed(
        &self,
        id: WorkloadId,
        name: &str,
    ) -> Result<Option<Box<dyn Arriving>>, WorkloadError>;

    /// Ends every workload that is not in `known`, and clears it away.
    async fn sweep(&self, known: &std::collections::BTreeSet<WorkloadId>);
}

#[cfg(test)]
pub mod fake;
