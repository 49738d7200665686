//! A VM that is on its way to this host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;

use super::child::{Child, ChildState};
use super::contents::VmStreams;
use super::disks::{self, DiskStreams, Disks, Holder, Purpose};
use super::running::{Vm, remove};
use super::serial_log::LogStream;
use super::{LOG_STREAM, all_streams, failed, told};
use crate::pages::{PageBitmap, PageSet};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{
    Arriving, ChunkSink, Lacks, OutOfStream, StreamHash, StreamKey, StreamSpec, Workload,
    WorkloadError,
};

/// How often the child is told what has landed.
const MAP_EVERY: Duration = Duration::from_millis(10);
/// How often what has come of copied disks is written back.
const WRITE_BACK_EVERY: Duration = Duration::from_millis(500);

/// A VM with an empty memory, or a complete one that does not run yet.
pub(super) struct ArrivingVm {
    directory: PathBuf,
    child: Arc<Child>,
    streams: Vec<StreamSpec>,
    chunks: Arc<VmStreams>,
    landing: Arc<Landing>,
    /// Has the child map what has landed.
    mapping: AbortOnDropHandle<()>,
    /// Has what has come of its disks written back.
    writing: AbortOnDropHandle<()>,
    /// Who it is to those who find its disks in use.
    holder: Holder,
    /// Made when the state is loaded, which is before the hand-over: what
    /// comes after must be quick and can't fail any more.
    vm: Option<Vm>,
}

/// Takes what arrives, and remembers which pages have come for the first time.
struct Landing {
    chunks: Arc<VmStreams>,
    pages: Mutex<Landed>,
}

#[derive(Default)]
struct Landed {
    /// What the child was told of.
    told: PageSet,
    /// What has come since, for the first time or again.
    came: BTreeMap<StreamKey, PageBitmap>,
}

impl Landing {
    fn landed(&self, key: StreamKey, offset: u64, length: u64) {
        if self.chunks.memory.pages(key) == 0 || length == 0 {
            return;
        }
        let first = offset / PAGE_SIZE;
        let count = (offset + length).div_ceil(PAGE_SIZE) - first;
        let mut landed = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let none = || PageBitmap::none(self.chunks.memory.pages(key));
        let came = landed.came.entry(key).or_insert_with(none);
        came.insert(PageRun { first: PageIndex(first), count });
    }

    fn take_new(&self) -> PageSet {
        let mut landed = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = PageSet::default();
        for (key, came) in std::mem::take(&mut landed.came) {
            new.set(key, came);
        }
        new.subtract(&landed.told);
        landed.told.union(&new);
        new
    }
}

impl ChunkSink for Landing {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        self.chunks.write(key, offset, bytes)?;
        self.landed(key, offset, bytes.len() as u64);
        Ok(())
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        self.chunks.zero(key, offset, length)
    }
}

/// Has `child` map pages soon after they have landed. Without that the guest
/// pays for each page's first touch after the move, while it is being missed.
async fn map_landed(child: Arc<Child>, landing: Arc<Landing>) {
    loop {
        tokio::time::sleep(MAP_EVERY).await;
        let new = landing.take_new();
        if !new.is_empty() && child.populate(&new).await.is_err() {
            return;
        }
    }
}

/// Has what has come of copied disks written back while more comes, so that
/// little is left when the guest stands still.
async fn write_back(chunks: Arc<VmStreams>) {
    if chunks.disks.is_none() {
        return;
    }
    loop {
        tokio::time::sleep(WRITE_BACK_EVERY).await;
        let chunks = chunks.clone();
        let written = tokio::task::spawn_blocking(move || {
            chunks.disks.as_ref().map_or(Ok(()), DiskStreams::sync)
        });
        if let Ok(Err(error)) = written.await {
            // It is written back again before the VM is sealed, and counts then.
            tracing::warn!(%error, "a copy of a disk could not be written back");
        }
    }
}

impl ArrivingVm {
    /// `copies`: where its disks arrive, if they do.
    pub(super) fn new(
        directory: PathBuf,
        child: Arc<Child>,
        holder: Holder,
        copies: Option<DiskStreams>,
    ) -> Result<Self, WorkloadError> {
        let streams = all_streams(child.config(), copies.is_some());
        let streams = streams.map_err(|e| WorkloadError::new(e.to_string()))?;
        let mut options = std::fs::OpenOptions::new();
        let log = options.read(true).write(true).open(&child.log().path);
        let log = LogStream::new(log.map_err(failed("open the serial log"))?, LOG_STREAM);
        let chunks = Arc::new(VmStreams { memory: child.mapping(), log, disks: copies });
        let landing = Arc::new(Landing { chunks: chunks.clone(), pages: Mutex::default() });
        let mapping =
            AbortOnDropHandle::new(tokio::spawn(map_landed(child.clone(), landing.clone())));
        let writing = AbortOnDropHandle::new(tokio::spawn(write_back(chunks.clone())));
        let vm = None;
        Ok(Self { directory, child, streams, chunks, landing, mapping, writing, holder, vm })
    }

    /// The VM, which does not have its disks yet.
    fn make(&self, paused: bool) -> Result<Vm, WorkloadError> {
        let disks = Disks::of(&self.child, self.holder.clone());
        Vm::new(self.directory.clone(), self.child.clone(), paused, disks)
    }
}

#[async_trait]
impl Arriving for ArrivingVm {
    fn chunks(&self) -> Arc<dyn ChunkSink> {
        self.landing.clone()
    }

    fn lacks(&self) -> Option<Arc<dyn Lacks>> {
        None
    }

    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError> {
        self.mapping.abort();
        self.writing.abort();
        let chunks = self.chunks.clone();
        let closed = tokio::task::spawn_blocking(move || {
            chunks.disks.as_ref().map_or(Ok(()), DiskStreams::close)
        });
        let failed = |e| WorkloadError::caused("closing copies of its disks failed", e);
        closed.await.map_err(failed)??;
        self.child.restore(state.to_vec()).await.map_err(told("load its state"))?;
        self.vm = Some(self.make(false)?);
        Ok(())
    }

    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError> {
        let (chunks, streams) = (self.chunks.clone(), self.streams.clone());
        let hashed = tokio::task::spawn_blocking(move || chunks.hash(&streams)).await;
        hashed.unwrap_or_else(|e| Err(WorkloadError::caused("hashing its memory failed", e)))
    }

    async fn start(&mut self, paused: bool) -> Result<(), WorkloadError> {
        let vm = match self.vm.take() {
            Some(vm) => vm,
            // A sealed copy that a restarted daemon has found.
            None => self.make(paused)?,
        };
        let vm = self.vm.insert(vm.stay_paused(paused));
        if let Some(copies) = &self.chunks.disks {
            // They are taken as any image is, by which they become the VM's.
            copies.unlock();
        }
        vm.take_disks(Purpose::Arrived).await?;
        let runs = matches!(*self.child.states().borrow(), ChildState::Running);
        if paused || runs {
            return Ok(());
        }
        self.child.run().await.map_err(told("let it run"))
    }

    fn arrived(self: Box<Self>) -> Box<dyn Workload> {
        let mut arriving = *self;
        // `start` has made it; a caller that did not start it gets a dead one.
        let made = arriving.vm.take().map_or_else(|| arriving.make(true), Ok);
        match made {
            Ok(vm) => Box::new(vm),
            Err(error) => {
                tracing::error!(%error, "a VM that arrived cannot be held");
                Box::new(Vm::unreadable(arriving.directory, &error))
            }
        }
    }

    async fn discard(self: Box<Self>) {
        self.child.kill().await;
        if let Some(mut vm) = self.vm {
            vm.put_disks_back().await;
        }
        disks::undo(&self.directory, self.holder.workload, self.holder.host);
        remove(&self.directory);
    }
}
