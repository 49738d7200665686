//! A VM that is on its way to this host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;

use super::child::{Child, ChildState};
use super::running::{Vm, VmStreams, remove};
use super::serial_log::LogStream;
use super::{LOG_STREAM, failed, streams, told};
use crate::pages::{PageBitmap, PageSet};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{
    Arriving, ChunkSink, OutOfStream, StreamHash, StreamKey, StreamSpec, Workload, WorkloadError,
};

/// How often the child is told what has landed.
const MAP_EVERY: Duration = Duration::from_millis(10);

/// A VM with an empty memory, or a complete one that does not run yet.
pub(super) struct ArrivingVm {
    directory: PathBuf,
    child: Arc<Child>,
    streams: Vec<StreamSpec>,
    chunks: Arc<VmStreams>,
    landing: Arc<Landing>,
    /// Has the child map what has landed.
    mapping: AbortOnDropHandle<()>,
    /// Made when the state is loaded, which is before the hand-over: what
    /// comes after must be quick and can't fail any more.
    vm: Option<Vm>,
}

impl ChunkSink for VmStreams {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        if key == LOG_STREAM {
            self.log.write(key, offset, bytes)
        } else {
            self.memory.write(key, offset, bytes)
        }
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        if key == LOG_STREAM {
            self.log.zero(key, offset, length)
        } else {
            self.memory.zero(key, offset, length)
        }
    }
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
        if key == LOG_STREAM || length == 0 {
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

impl ArrivingVm {
    pub(super) fn new(directory: PathBuf, child: Arc<Child>) -> Result<Self, WorkloadError> {
        let bytes = child.config().memory_bytes;
        let streams = streams(bytes).map_err(|e| WorkloadError::new(e.to_string()))?;
        let mut options = std::fs::OpenOptions::new();
        let log = options.read(true).write(true).open(&child.log().path);
        let log = LogStream::new(log.map_err(failed("open the serial log"))?, LOG_STREAM);
        let chunks = Arc::new(VmStreams { memory: child.mapping(), log });
        let landing = Arc::new(Landing { chunks: chunks.clone(), pages: Mutex::default() });
        let mapping =
            AbortOnDropHandle::new(tokio::spawn(map_landed(child.clone(), landing.clone())));
        Ok(Self { directory, child, streams, chunks, landing, mapping, vm: None })
    }
}

#[async_trait]
impl Arriving for ArrivingVm {
    fn chunks(&self) -> Arc<dyn ChunkSink> {
        self.landing.clone()
    }

    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError> {
        self.mapping.abort();
        self.child.restore(state.to_vec()).await.map_err(told("load its state"))?;
        self.vm = Some(Vm::new(self.directory.clone(), self.child.clone(), false)?);
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
            None => Vm::new(self.directory.clone(), self.child.clone(), paused)?,
        };
        self.vm = Some(vm.stay_paused(paused));
        let runs = matches!(*self.child.states().borrow(), ChildState::Running);
        if paused || runs {
            return Ok(());
        }
        self.child.run().await.map_err(told("let it run"))
    }

    fn arrived(self: Box<Self>) -> Box<dyn Workload> {
        let Self { directory, child, streams: _, chunks: _, landing: _, mapping: _, vm } = *self;
        // `start` has made it; a caller that did not start it gets a dead one.
        let made = vm.map_or_else(|| Vm::new(directory.clone(), child.clone(), true), Ok);
        match made {
            Ok(vm) => Box::new(vm),
            Err(error) => {
                tracing::error!(%error, "a VM that arrived cannot be held");
                Box::new(Vm::unreadable(directory, &error))
            }
        }
    }

    async fn discard(self: Box<Self>) {
        self.child.kill().await;
        remove(&self.directory);
    }
}
