//! A process tree that is on its way to this host.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use migr_proto::v1 as proto;
use migr_proto::v1::keeper_request::Request;
use prost::Message;

use super::images::{APPENDED, Images};
use super::keeper::{Keeper, OUTPUT_LOG};
use super::lacking::Lacking;
use super::leaving::STATE_VERSION;
use super::letting_go::let_go;
use super::net::{self, Network};
use super::remains::{put_away, remove};
use super::rootfs::{self, ROOTFS_STREAM};
use super::running::Tree;
use super::streams::TreeStreams;
use super::{LOG_STREAM, failed, log_spec, versions};
use crate::host_memory::HostMemory;
use crate::serial_log::LogStream;
use crate::units::WorkloadId;
use crate::workload::{
    Arriving, ChunkSink, Lacks, OutOfStream, Problem, StreamHash, StreamKey, StreamSpec, Workload,
    WorkloadError,
};

/// A tree with no processes yet, or a complete one that does not run yet.
pub(super) struct ArrivingTree {
    pub(super) id: WorkloadId,
    pub(super) directory: PathBuf,
    pub(super) cgroup: PathBuf,
    pub(super) keeper: Arc<Keeper>,
    pub(super) network: Option<Network>,
    criu: String,
    streams: Vec<StreamSpec>,
    chunks: Arc<Landing>,
    /// Whether the kernel here tells what it writes to its memory.
    tracks: bool,
    /// Whether memory can be put in place here when it runs.
    lazy: bool,
    /// Memory was announced that stays at its source.
    follows: bool,
    /// After a start: made then, since what comes after can't fail any more.
    tree: Option<Tree>,
}

/// Takes what arrives.
struct Landing {
    tree: TreeStreams,
    /// Its root file system, if that comes along.
    rootfs: Option<rootfs::Landing>,
}

impl ChunkSink for Landing {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        match (key, &self.rootfs) {
            (LOG_STREAM, _) => self.tree.log().write(key, offset, bytes),
            (ROOTFS_STREAM, Some(rootfs)) => rootfs.write(key, offset, bytes),
            _ => self.tree.images().write(key, offset, bytes),
        }
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        match (key, &self.rootfs) {
            (LOG_STREAM, _) => self.tree.log().zero(key, offset, length),
            (ROOTFS_STREAM, Some(rootfs)) => rootfs.zero(key, offset, length),
            _ => self.tree.images().zero(key, offset, length),
        }
    }

    fn trouble(&self) -> Option<String> {
        let rootfs = self.rootfs.as_ref().and_then(ChunkSink::trouble);
        rootfs.or_else(|| self.tree.images().trouble())
    }
}

/// So much memory of one process may follow it, and less not (bytes).
const FOLLOWS_FROM: u64 = 64 << 20;

/// How long CRIU may take to make a tree of such images, as long as the source waits:
/// a slow host does 64 MiB a second.
fn limit(images: &[proto::ProcessImage]) -> Duration {
    let bytes = images.iter().fold(0_u64, |all, image| all.saturating_add(image.length));
    Duration::from_secs((bytes >> 26).saturating_add(30))
}

/// Whether a tree of such images had better run before all its memory is in place.
/// What CRIU starts for that takes about as long as to put 32 MiB in place. Processes
/// that have memory in common, as after a fork(2), would each get their own: so only
/// where nearly all of it is one process'. Not of images that build on others. It is there
/// twice until all is in place, so only where that much is `free` (bytes).
fn memory_follows(images: &[proto::ProcessImage], free: u64) -> bool {
    let memory = images.iter().filter(|image| image.name.starts_with(APPENDED));
    let mut lengths: Vec<u64> = memory.map(|image| image.length).collect();
    lengths.sort_unstable();
    let most = lengths.pop().unwrap_or(0);
    let others = lengths.into_iter().fold(0, u64::saturating_add);
    let in_rounds = images.iter().any(|image| image.round > 0);
    !in_rounds && most >= FOLLOWS_FROM && others <= most / 16 && most <= free / 8 * 7
}

/// What an arriving tree is made of.
pub(super) struct Parts {
    pub(super) id: WorkloadId,
    pub(super) directory: PathBuf,
    pub(super) cgroup: PathBuf,
    pub(super) keeper: Arc<Keeper>,
    pub(super) network: Option<Network>,
    /// Its streams, those of the log and of the root file system left out.
    pub(super) images: Vec<StreamSpec>,
    /// Its root file system, if that comes along.
    pub(super) rootfs: Option<rootfs::Landing>,
    /// Whether the kernel here tells what it writes to its memory.
    pub(super) tracks: bool,
    /// Whether memory can be put in place here when it runs.
    pub(super) lazy: bool,
    /// Memory was announced that stays at its source.
    pub(super) follows: bool,
    /// Version of the CRIU of this host.
    pub(super) criu: String,
}

impl ArrivingTree {
    pub(super) fn new(parts: Parts) -> Result<Self, WorkloadError> {
        let Parts { id, directory, cgroup, keeper, network, images, .. } = parts;
        let (rootfs, tracks, lazy, follows, criu) =
            (parts.rootfs, parts.tracks, parts.lazy, parts.follows, parts.criu);
        let mut options = std::fs::OpenOptions::new();
        let log = options.read(true).write(true).open(directory.join(OUTPUT_LOG));
        let log = LogStream::new(log.map_err(failed("open its log"))?, LOG_STREAM);
        let count = u32::try_from(images.len()).unwrap_or(u32::MAX);
        let length = images.first().map_or(0, |spec| spec.length);
        let tree = TreeStreams::new(log, Images::new(count, length)?);
        let chunks = Arc::new(Landing { tree, rootfs });
        let streams = [vec![log_spec()], images].concat();
        Ok(Self {
            id,
            directory,
            cgroup,
            keeper,
            network,
            criu,
            streams,
            chunks,
            tracks,
            lazy,
            follows,
            tree: None,
        })
    }

    fn make(&mut self, paused: bool) -> Result<Tree, WorkloadError> {
        let network = self.network.take();
        let (directory, cgroup) = (self.directory.clone(), self.cgroup.clone());
        let keeper = self.keeper.clone();
        let tree = Tree::new(directory, cgroup, keeper, network, paused, self.tracks)?;
        Ok(tree.written_by(self.criu.clone()))
    }
}

#[async_trait]
impl Arriving for ArrivingTree {
    fn chunks(&self) -> Arc<dyn ChunkSink> {
        self.chunks.clone()
    }

    fn lacks(&self) -> Option<Arc<dyn Lacks>> {
        Some(Arc::new(Lacking(Arc::clone(&self.keeper))))
    }

    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError> {
        let state = proto::ProcessState::decode(state)
            .map_err(|e| WorkloadError::caused("the state of the processes is damaged", e))?;
        if state.version != STATE_VERSION {
            return Err(WorkloadError::new(format!(
                "the processes were written in version {}, and this migrd reads version \
                 {STATE_VERSION}: bring both to the same",
                state.version
            )));
        }
        // A snapshot is loaded without an offer.
        if let Some(Problem { message, remedy, .. }) = versions::older(&self.criu, &state.criu) {
            return Err(WorkloadError::new(format!("{message}: {remedy}")));
        }
        let chunks = self.chunks.clone();
        rootfs::apart(move || chunks.rootfs.as_ref().map_or(Ok(()), rootfs::Landing::complete))
            .await?;
        let chunks = self.chunks.clone();
        let images = state.images.clone();
        let arranged = tokio::task::spawn_blocking(move || chunks.tree.images().arrange(&images));
        arranged.await.map_err(|e| WorkloadError::caused("arranging its images failed", e))??;
        let announced = self.lazy && self.follows;
        if !announced && !state.stays.is_empty() {
            return Err(WorkloadError::new(
                "memory of the processes is at their source, which was not announced or can't \
                 follow here: use --mode stop, or leave --mode out",
            ));
        }
        let options = state.options;
        let (_, free) = HostMemory::of_this_host().read();
        let follows = memory_follows(&state.images, free) || !state.stays.is_empty();
        let lazy = self.lazy && follows;
        let proto::ProcessState { images, .. } = state;
        let limit = limit(&images);
        let restore = proto::KeeperRestore {
            limit_ms: u32::try_from(limit.as_millis()).unwrap_or(u32::MAX),
            state: Some(proto::ProcessState { images: Vec::new(), ..state }),
            options,
            lazy,
        };
        let directory = self.chunks.tree.images().directory()?;
        let restored = self.keeper.done_with(Request::Restore(restore), vec![directory]).await;
        restored.map_err(|error| WorkloadError::new(error.to_string()))
    }

    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError> {
        let (chunks, streams) = (self.chunks.clone(), self.streams.clone());
        let hashed = tokio::task::spawn_blocking(move || {
            let mut hashes = chunks.tree.hash(&streams)?;
            if let Some(rootfs) = &chunks.rootfs {
                hashes.push(StreamHash { key: ROOTFS_STREAM, hash: rootfs.hash()? });
            }
            Ok(hashes)
        })
        .await;
        hashed.unwrap_or_else(|e| Err(WorkloadError::caused("hashing its images failed", e)))
    }

    async fn start(&mut self, paused: bool) -> Result<(), WorkloadError> {
        let_go(&self.keeper, self.network.as_ref(), paused).await?;
        if self.tree.is_none() {
            self.tree = Some(self.make(paused)?);
        }
        Ok(())
    }

    fn arrived(self: Box<Self>) -> Box<dyn Workload> {
        let mut arriving = *self;
        // `start` has made it; a caller that did not start it gets a dead one.
        let made = arriving.tree.take().map_or_else(|| arriving.make(true), Ok);
        Box::new(made.unwrap_or_else(|error| {
            tracing::error!(%error, "a process tree that arrived cannot be held");
            Tree::ended(arriving.directory, arriving.cgroup, &error.to_string())
        }))
    }

    async fn discard(self: Box<Self>) {
        put_away(&self.keeper, &self.cgroup).await;
        if let Err(error) = net::remove(self.id).await {
            tracing::warn!(id = %self.id, %error, "the network of a process tree stays behind");
        }
        super::container::clear(&self.directory, &self.cgroup).await;
        super::carried::clear(&self.directory).await;
        remove(&self.directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(round: u32, name: &str, mib: u64) -> proto::ProcessImage {
        let name = name.to_owned();
        proto::ProcessImage { name, length: mib << 20, content: None, round }
    }

    #[test]
    fn memory_follows_where_it_is_much_and_one_process_has_it() {
        let table = [
            (vec![image(0, "pages-1.img", 512)], true),
            (vec![image(0, "pages-1.img", 32)], false),
            (vec![image(0, "core-1.img", 512)], false),
            (vec![image(0, "pages-1.img", 512), image(0, "pages-2.img", 8)], true),
            (vec![image(0, "pages-1.img", 512), image(0, "pages-2.img", 500)], false),
            (vec![image(1, "pages-1.img", 500), image(0, "pages-1.img", 500)], false),
            (Vec::new(), false),
        ];
        for (images, follows) in table {
            assert_eq!(memory_follows(&images, 1 << 30), follows, "{images:?}");
        }
        let huge = |name| image(0, name, u64::MAX >> 20);
        assert!(!memory_follows(&[huge("pages-1.img"), huge("pages-2.img")], u64::MAX));
        let much = [image(0, "pages-1.img", 512)];
        assert!(!memory_follows(&much, 512 << 20), "there is no room for it twice");
    }
}
