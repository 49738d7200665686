//! A VM of this host.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use super::child::{Child, ChildState};
use super::serial_log::{Cleared, LogStream, Reader};
use super::terminal::SerialPort;
use super::{LOG_STREAM, failed, streams, told};
use crate::pages::PageSet;
use crate::sys::mapping::GuestMapping;
use crate::workload::{
    ChunkSource, OutOfStream, RunState, StreamHash, StreamKey, StreamSpec, Terminal, Workload,
    WorkloadError,
};

/// A VM, or what is left of one that has ended.
pub(super) struct Vm {
    directory: PathBuf,
    streams: Vec<StreamSpec>,
    terminal: Arc<SerialPort>,
    state: watch::Receiver<RunState>,
    paused: bool,
    alive: Option<Alive>,
}

/// A VM whose child lives.
struct Alive {
    child: Arc<Child>,
    chunks: Arc<VmStreams>,
    log: Reader,
    /// What of the log was sent; `None` while nothing is tracked.
    sent: Option<Cleared>,
    /// Says why it ended if that was an operator's wish.
    stopped: watch::Sender<Option<String>>,
}

/// Memory and log of a VM, as streams.
pub(super) struct VmStreams {
    pub(super) memory: Arc<GuestMapping>,
    pub(super) log: LogStream,
}

impl ChunkSource for VmStreams {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        if key == LOG_STREAM {
            self.log.read(key, offset, into)
        } else {
            self.memory.read(key, offset, into)
        }
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        if key == LOG_STREAM {
            self.log.is_zero(key, offset, length)
        } else {
            self.memory.is_zero(key, offset, length)
        }
    }
}

impl VmStreams {
    /// Hashes every stream of `specs`, which takes a while.
    pub(super) fn hash(&self, specs: &[StreamSpec]) -> Result<Vec<StreamHash>, WorkloadError> {
        let hash_one = |spec: &StreamSpec| {
            let hash =
                if spec.key == LOG_STREAM { self.log.hash() } else { self.memory.hash(spec.key) };
            let hash = hash.map_err(failed("hash its memory"))?;
            Ok(StreamHash { key: spec.key, hash })
        };
        specs.iter().map(hash_one).collect()
    }
}

impl Vm {
    /// Takes hold of a child that lives. `paused`: an operator wants it to
    /// stand still.
    pub(super) fn new(
        directory: PathBuf,
        child: Arc<Child>,
        paused: bool,
    ) -> Result<Self, WorkloadError> {
        let bytes = child.config().memory_bytes;
        let streams = streams(bytes).map_err(|e| WorkloadError::new(e.to_string()))?;
        let terminal = Arc::new(SerialPort::open(&child)?);
        let open = || std::fs::File::open(&child.log().path).map_err(failed("open the serial log"));
        let log = Reader::open(open()?).map_err(failed("read the serial log"))?;
        let chunks = Arc::new(VmStreams {
            memory: child.mapping(),
            log: LogStream::new(open()?, LOG_STREAM),
        });
        let (stopped, wish) = watch::channel(None);
        let state = translated(child.states(), wish);
        let alive = Some(Alive { child, chunks, log, sent: None, stopped });
        Ok(Self { directory, streams, terminal, state, paused, alive })
    }

    /// What is left of a VM whose child is gone.
    pub(super) fn ended(
        directory: PathBuf,
        memory_bytes: u64,
        why: &str,
    ) -> Result<Self, WorkloadError> {
        let streams = streams(memory_bytes).map_err(|e| WorkloadError::new(e.to_string()))?;
        let terminal = Arc::new(SerialPort::left_behind(&directory)?);
        let (_, state) = watch::channel(RunState::Ended(why.to_owned()));
        Ok(Self { directory, streams, terminal, state, paused: false, alive: None })
    }

    /// A VM that cannot even be read.
    pub(super) fn unreadable(directory: PathBuf, why: &WorkloadError) -> Self {
        let (_, state) = watch::channel(RunState::Ended(why.to_string()));
        let terminal = Arc::new(SerialPort::silent());
        Self { directory, streams: Vec::new(), terminal, state, paused: false, alive: None }
    }

    /// What its child does.
    pub(super) fn child_state(&self) -> Option<ChildState> {
        self.alive.as_ref().map(|alive| alive.child.states().borrow().clone())
    }

    /// The same, that an operator wants to stand still if `paused`.
    pub(super) fn stay_paused(self, paused: bool) -> Self {
        Self { paused, ..self }
    }

    /// Waits until everybody can see that it is in `state`, or has ended: who
    /// asks right after a command must not be told what was before it.
    async fn becomes(&self, state: &RunState) {
        let mut seen = self.state.clone();
        let _ = seen.wait_for(|now| now == state || matches!(now, RunState::Ended(_))).await;
    }

    /// A migration of an earlier daemon may have left the tracking on.
    pub(super) async fn end_old_tracking(&mut self) {
        if let Some(alive) = &self.alive
            && let Err(error) = alive.child.dirty_stop().await
        {
            tracing::debug!(%error, "no page tracking was on");
        }
    }

    fn alive(&mut self) -> Result<&mut Alive, WorkloadError> {
        self.alive.as_mut().ok_or_else(|| WorkloadError::new("it has ended"))
    }
}

/// What a child does, in the words that every workload uses.
fn translated(
    mut child: watch::Receiver<ChildState>,
    mut wish: watch::Receiver<Option<String>>,
) -> watch::Receiver<RunState> {
    let translate = |state: &ChildState, wish: &Option<String>| match (state, wish) {
        (ChildState::Running, _) => RunState::Running,
        (ChildState::Starting | ChildState::Ready | ChildState::Paused, _) => RunState::Paused,
        (ChildState::Stopped(_) | ChildState::Dead(_), Some(wish)) => RunState::Ended(wish.clone()),
        (ChildState::Stopped(reason), None) => RunState::Ended(reason.to_string()),
        (ChildState::Dead(why), None) => RunState::Ended(why.clone()),
    };
    let first = translate(&child.borrow_and_update(), &wish.borrow_and_update());
    let (tell, told) = watch::channel(first);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = child.changed() => if changed.is_err() { break },
                () = tell.closed() => break,
            }
            let now = translate(&child.borrow_and_update(), &wish.borrow_and_update());
            tell.send_if_modified(|state| {
                let differs = *state != now;
                *state = now;
                differs
            });
        }
        // The state stays readable for as long as anybody looks.
        tell.closed().await;
    });
    told
}

#[async_trait]
impl Workload for Vm {
    fn streams(&self) -> Vec<StreamSpec> {
        self.streams.clone()
    }

    fn chunks(&self) -> Arc<dyn ChunkSource> {
        match &self.alive {
            Some(alive) => alive.chunks.clone(),
            None => Arc::new(Nothing),
        }
    }

    fn state(&self) -> watch::Receiver<RunState> {
        self.state.clone()
    }

    fn terminal(&self) -> Arc<dyn Terminal> {
        self.terminal.clone()
    }

    async fn carry(&mut self, disks: bool) -> Result<(), WorkloadError> {
        if disks {
            return Err(WorkloadError::new("it has no disks to carry"));
        }
        Ok(())
    }

    async fn start_tracking(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        alive.child.dirty_start().await.map_err(told("track its memory"))?;
        alive.sent = Some(Cleared::default());
        Ok(())
    }

    async fn stop_tracking(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        if alive.sent.take().is_some() {
            alive.child.dirty_stop().await.map_err(told("stop tracking its memory"))?;
        }
        Ok(())
    }

    async fn dirty(&mut self) -> Result<PageSet, WorkloadError> {
        let regions: Vec<_> = self.streams.iter().map(|s| s.key).collect();
        let alive = self.alive()?;
        let mut dirty = PageSet::default();
        for key in regions.into_iter().filter(|key| *key != LOG_STREAM) {
            let populated = alive.chunks.memory.populated(key);
            dirty.set(key, populated.map_err(failed("find its populated memory"))?);
        }
        if alive.sent.is_some() {
            let written = alive.child.dirty_read().await.map_err(told("read its dirty pages"))?;
            dirty.intersect(&written);
        }
        let never = Cleared::default();
        let sent = alive.sent.as_ref().unwrap_or(&never);
        let changed = alive.log.pages_changed_since(sent);
        dirty.set(LOG_STREAM, changed.map_err(failed("read the serial log"))?);
        Ok(dirty)
    }

    async fn clear(&mut self, pages: &PageSet) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        if let (Some(sent), Some(log)) = (&mut alive.sent, pages.get(LOG_STREAM)) {
            alive.log.clear(sent, log).map_err(failed("read the serial log"))?;
        }
        let mut memory = PageSet::default();
        for (key, pages) in pages.iter().filter(|(key, p)| *key != LOG_STREAM && !p.is_empty()) {
            memory.set(key, pages.clone());
        }
        if memory.is_empty() {
            return Ok(());
        }
        alive.child.dirty_clear(&memory).await.map_err(told("clear its dirty pages"))
    }

    async fn drain(&mut self) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn freeze(&mut self) -> Result<(), WorkloadError> {
        let paused = self.paused;
        let alive = self.alive()?;
        if paused {
            return Ok(());
        }
        alive.child.pause().await.map_err(told("pause it"))
    }

    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError> {
        let streams = self.streams.clone();
        let chunks = self.alive()?.chunks.clone();
        let hashed = tokio::task::spawn_blocking(move || chunks.hash(&streams)).await;
        hashed.unwrap_or_else(|e| Err(WorkloadError::caused("hashing its memory failed", e)))
    }

    async fn save(&mut self) -> Result<Vec<u8>, WorkloadError> {
        let saved = self.alive()?.child.save().await;
        Ok(saved.map_err(told("save its state"))?.to_vec())
    }

    async fn let_go(&mut self) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn thaw(&mut self) -> Result<(), WorkloadError> {
        if self.paused {
            return Ok(());
        }
        self.alive()?.child.run().await.map_err(told("let it run again"))
    }

    async fn pause(&mut self) -> Result<(), WorkloadError> {
        self.alive()?.child.pause().await.map_err(told("pause it"))?;
        self.paused = true;
        self.becomes(&RunState::Paused).await;
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), WorkloadError> {
        self.alive()?.child.run().await.map_err(told("let it run"))?;
        self.paused = false;
        self.becomes(&RunState::Running).await;
        Ok(())
    }

    async fn ask_to_end(&mut self) -> Result<(), WorkloadError> {
        Err(WorkloadError::new("it has no power button"))
    }

    async fn stop(&mut self) -> Result<(), WorkloadError> {
        let Some(alive) = self.alive.take() else { return Ok(()) };
        alive.stopped.send_replace(Some("stopped by an operator".into()));
        if let Err(error) = alive.child.quit().await {
            tracing::info!(%error, "the VMM did not end in good order");
            alive.child.kill().await;
        }
        Ok(())
    }

    async fn discard(mut self: Box<Self>) {
        if let Some(alive) = self.alive.take() {
            alive.child.kill().await;
        }
        remove(&self.directory);
    }
}

/// The streams of a VM that has ended: none.
struct Nothing;

impl ChunkSource for Nothing {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        Err(OutOfStream { key, offset, length: into.len() as u64 })
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        Err(OutOfStream { key, offset, length })
    }
}

/// Deletes a VM's directory.
pub(super) fn remove(directory: &std::path::Path) {
    if let Err(error) = std::fs::remove_dir_all(directory) {
        tracing::warn!(directory = %directory.display(), %error, "a VM's directory stays behind");
    }
}
