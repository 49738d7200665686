//! A VM of this host.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::child::{Child, ChildState, SERIAL_LOG};
use super::contents::VmStreams;
use super::disks::{Disks, Purpose};
use super::serial_log::{Cleared, LogStream, Reader};
use super::states::Reboots;
use super::terminal::SerialPort;
use super::{LOG_STREAM, all_streams, chain, disks, failed, streams, told};
use crate::pages::PageSet;
use crate::units::PAGE_SIZE;
use crate::workload::{
    Ahead, Carry, ChunkSource, Follows, Lacks, LeftMemory, Needing, Needs, NoStreams, Problem,
    RunState, StreamHash, StreamKey, StreamSpec, Terminal, Workload, WorkloadError,
};

/// How long its devices may take to finish what they have begun, before a move
/// gives up.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

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
    reboots: Reboots,
    chunks: Arc<VmStreams>,
    log: Reader,
    /// What of the log was sent; `None` while nothing is tracked.
    sent: Option<Cleared>,
    disks: Disks,
    /// Its devices were told to stand.
    drained: bool,
    /// Since it was frozen, what was left of it was asked for.
    rest_given: bool,
    /// Says why it ended if that was an operator's wish.
    stopped: watch::Sender<Option<String>>,
}

impl Vm {
    /// Takes hold of a child that lives. `paused`: an operator wants it to
    /// stand still.
    pub(super) fn new(
        directory: PathBuf,
        child: Arc<Child>,
        paused: bool,
        disks: Disks,
    ) -> Result<Self, WorkloadError> {
        let bytes = child.config().memory_bytes;
        let streams = streams(bytes).map_err(|e| WorkloadError::new(e.to_string()))?;
        let log = child.log();
        let terminal = Arc::new(SerialPort::open(&log.path, log.written, &child)?);
        let open = || std::fs::File::open(&child.log().path).map_err(failed("open the serial log"));
        let log = Reader::open(open()?).map_err(failed("read the serial log"))?;
        let chunks = Arc::new(VmStreams {
            memory: child.mapping(),
            log: LogStream::new(open()?, LOG_STREAM),
            disks: None,
        });
        let (stopped, wish) = watch::channel(None);
        let reboots = Reboots::follow(&child, wish);
        let state = reboots.state();
        let alive = Alive {
            child,
            reboots,
            chunks,
            log,
            sent: None,
            disks,
            drained: false,
            rest_given: false,
            stopped,
        };
        Ok(Self { directory, streams, terminal, state, paused, alive: Some(alive) })
    }

    /// What is left of a VM whose child is gone.
    pub(super) fn ended(
        directory: PathBuf,
        memory_bytes: u64,
        why: &str,
    ) -> Result<Self, WorkloadError> {
        let streams = streams(memory_bytes).map_err(|e| WorkloadError::new(e.to_string()))?;
        let terminal = Arc::new(SerialPort::left_behind(&directory.join(SERIAL_LOG))?);
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

    /// Opens and locks its disks, unless it has them.
    pub(super) async fn take_disks(&mut self, purpose: Purpose) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        alive.disks.take(&alive.child, purpose).await
    }

    /// Undoes [`Self::take_disks`]: it did not run.
    pub(super) async fn put_disks_back(&mut self) {
        if let Some(alive) = &mut self.alive {
            alive.disks.put_back().await;
        }
    }

    fn alive(&mut self) -> Result<&mut Alive, WorkloadError> {
        self.alive.as_mut().ok_or_else(|| WorkloadError::new("it has ended"))
    }
}

impl Alive {
    /// Whether its child has devices that can be told to stand.
    fn has_devices(&self) -> bool {
        self.child.config().version >= 2
    }

    /// The pages of `regions` that hold something. Where disks are among them
    /// that may have to wait for storage.
    async fn populated(&self, regions: Vec<StreamKey>) -> Result<PageSet, WorkloadError> {
        let chunks = self.chunks.clone();
        let find = move || {
            let mut found = PageSet::default();
            for key in regions {
                let pages = chunks.populated(key);
                found.set(key, pages.map_err(failed("find what its memory and disks hold"))?);
            }
            Ok(found)
        };
        if self.chunks.disks.is_none() {
            return find();
        }
        let found = tokio::task::spawn_blocking(find).await;
        found.unwrap_or_else(|e| Err(WorkloadError::caused("looking at its disks failed", e)))
    }
}

#[async_trait]
impl Workload for Vm {
    fn streams(&self) -> Vec<StreamSpec> {
        self.streams.clone()
    }

    fn chunks(&self) -> Arc<dyn ChunkSource> {
        match &self.alive {
            Some(alive) => alive.chunks.clone(),
            None => Arc::new(NoStreams),
        }
    }

    fn state(&self) -> watch::Receiver<RunState> {
        self.state.clone()
    }

    fn terminal(&self) -> Arc<dyn Terminal> {
        self.terminal.clone()
    }

    async fn carry(&mut self, what: Carry) -> Result<(), WorkloadError> {
        let Carry { disks, to_files: _, verify: _, chain: _, process: _, follows: _ } = what;
        let alive = self.alive()?;
        let carried = if disks { Some(alive.disks.read(&alive.child).await?) } else { None };
        let streams = all_streams(alive.child.config(), disks);
        let mut streams = streams.map_err(|e| WorkloadError::new(e.to_string()))?;
        let log = std::fs::File::open(&alive.child.log().path);
        let log = LogStream::new(log.map_err(failed("open the serial log"))?, LOG_STREAM);
        let memory = alive.chunks.memory.clone();
        alive.chunks = Arc::new(VmStreams { memory, log, disks: carried });
        for spec in &mut streams {
            if disks::index_of(spec.key).is_some() {
                let held = alive.populated(vec![spec.key]).await?;
                spec.used = held.count().saturating_mul(PAGE_SIZE);
            }
        }
        self.streams = streams;
        Ok(())
    }

    fn needs(&self) -> Needing {
        Arc::new(Needs::default)
    }

    fn saves_files(&self) -> bool {
        false
    }

    async fn save_files_in(&mut self, _: OwnedFd, _: String) -> Result<(), WorkloadError> {
        Err(WorkloadError::new("it is saved in streams and has no files"))
    }

    async fn problems(&mut self) -> Result<Vec<Problem>, WorkloadError> {
        // What else a disk or a device has against it is found when it is carried or
        // drained.
        let alive = self.alive()?;
        alive.disks.strayed(&alive.child).await
    }

    fn ahead(&self) -> Ahead {
        Ahead::Pages
    }

    fn follows(&self) -> Follows {
        Follows::Not("this version moves all memory of a virtual machine before it runs".into())
    }

    fn left_behind(&self) -> Option<Arc<dyn LeftMemory>> {
        None
    }

    fn lacks(&self) -> Option<Arc<dyn Lacks>> {
        None
    }

    async fn files_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        Ok(None)
    }

    async fn copy_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        Err(WorkloadError::new("the memory of a VM goes page by page"))
    }

    async fn start_tracking(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        alive.chunks.memory.forget();
        let disks = alive.chunks.disks.is_some();
        alive.child.dirty_start(disks).await.map_err(told("track its memory"))?;
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
        let regions = self.streams.iter().map(|s| s.key).filter(|key| *key != LOG_STREAM);
        let regions: Vec<_> = regions.collect();
        let alive = self.alive()?;
        if alive.sent.is_none() {
            alive.chunks.memory.forget();
        }
        // What once held something and was sent stays in this set: freed since,
        // it has to be sent again, as zeros.
        let mut dirty = alive.populated(regions).await?;
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
        let alive = self.alive()?;
        if !alive.has_devices() {
            return Ok(());
        }
        // Most of what is not durable yet, while the guest goes on writing; what
        // it writes until its devices stand is little.
        alive.disks.sync(&alive.child).await?;
        alive.drained = true;
        alive.child.drain(DRAIN_LIMIT).await.map_err(told("have its devices stand"))?;
        alive.disks.sync(&alive.child).await
    }

    async fn freeze(&mut self) -> Result<(), WorkloadError> {
        let paused = self.paused;
        let alive = self.alive()?;
        alive.rest_given = false;
        if paused {
            return Ok(());
        }
        alive.reboots.pause().await
    }

    async fn rest(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        if std::mem::replace(&mut self.alive()?.rest_given, true) {
            return Ok(None);
        }
        self.dirty().await.map(Some)
    }

    fn saves_early(&self) -> bool {
        // The vCPUs stand still, so its state is final, and its child is not
        // what reads its pages.
        true
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
        let alive = self.alive()?;
        let copied = alive.chunks.disks.is_some();
        alive.disks.let_go(&alive.child, copied).await
    }

    async fn thaw(&mut self) -> Result<(), WorkloadError> {
        let paused = self.paused;
        let alive = self.alive()?;
        alive.disks.take(&alive.child, Purpose::TakenBack).await?;
        if std::mem::take(&mut alive.drained) {
            alive.child.undrain().await.map_err(told("let its devices go on"))?;
        }
        if paused {
            return Ok(());
        }
        alive.child.run().await.map_err(told("let it run again"))
    }

    async fn pause(&mut self) -> Result<(), WorkloadError> {
        self.alive()?.reboots.pause().await?;
        self.paused = true;
        self.becomes(&RunState::Paused).await;
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        alive.disks.take(&alive.child, Purpose::TakenBack).await?;
        alive.child.run().await.map_err(told("let it run"))?;
        self.paused = false;
        self.becomes(&RunState::Running).await;
        Ok(())
    }

    async fn ask_to_end(&mut self) -> Result<(), WorkloadError> {
        if self.paused {
            let text = "it is paused and can't be asked: `migctl resume` it first, or end it with \
                `migctl stop --force`";
            return Err(WorkloadError::new(text));
        }
        let pressed = self.alive()?.child.power_button().await;
        pressed.map_err(|error| WorkloadError::new(chain(&error)))
    }

    async fn stop(&mut self) -> Result<(), WorkloadError> {
        let Some(mut alive) = self.alive.take() else { return Ok(()) };
        let why = match &*self.state.borrow() {
            RunState::Ended(why) => why.clone(),
            RunState::Running | RunState::Paused => "stopped by an operator".to_owned(),
        };
        alive.stopped.send_replace(Some(why));
        if let Err(error) = alive.child.quit().await {
            tracing::info!(%error, "the VMM did not end in good order");
            alive.child.kill().await;
        }
        alive.disks.release().await;
        Ok(())
    }

    async fn discard(mut self: Box<Self>) {
        if let Some(mut alive) = self.alive.take() {
            alive.child.kill().await;
            alive.disks.release().await;
        }
        remove(&self.directory);
    }
}

/// Deletes a VM's directory.
pub(super) fn remove(directory: &std::path::Path) {
    if let Err(error) = std::fs::remove_dir_all(directory) {
        tracing::warn!(directory = %directory.display(), %error, "a VM's directory stays behind");
    }
}
