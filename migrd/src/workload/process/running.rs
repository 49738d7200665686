//! A process tree of this host.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use migr_proto::v1::keeper_request::Request;
use migr_proto::v1::{self as proto, KeeperPhase};
use prost::Message;
use tokio::sync::watch;

use super::images::{Growing, Images};
use super::keeper::{Keeper, OUTPUT_LOG, Seen};
use super::net::Network;
use super::preflight;
use super::terminal::Stdio;
use super::{LOG_STREAM, failed, image_streams, log_spec, to_wire, told};
use crate::pages::PageSet;
use crate::serial_log::{Cleared, LogStream, Reader};
use crate::workload::{
    Carry, ChunkSource, OutOfStream, Problem, ProcessOptions, RunState, StreamHash, StreamKey,
    StreamSpec, Terminal, Workload, WorkloadError,
};

/// What of memory is worth a part of its own while CRIU still writes, in pages:
/// 16 MiB.
const PART_PAGES: u64 = 4096;
/// How often to look what CRIU has written.
const LOOK: Duration = Duration::from_millis(2);
/// The version of a [`proto::ProcessState`] that this migrd writes.
pub(super) const STATE_VERSION: u32 = 1;

/// A tree, or what is left of one that has ended.
pub(super) struct Tree {
    directory: PathBuf,
    cgroup: PathBuf,
    terminal: Arc<Stdio>,
    state: watch::Receiver<RunState>,
    alive: Option<Alive>,
}

struct Alive {
    keeper: Arc<Keeper>,
    network: Option<Network>,
    paused: bool,
    options: ProcessOptions,
    streams: Vec<StreamSpec>,
    chunks: Arc<TreeStreams>,
    /// What it has to find at a destination, as was seen last.
    needs: Vec<u8>,
    /// A dump that was begun.
    dump: Option<Dump>,
    /// Says why it ended if that was an operator's wish.
    stopped: watch::Sender<Option<String>>,
}

/// A tree on its way out of its processes.
struct Dump {
    growing: Growing,
    end: Option<proto::KeeperDumped>,
    log_sent: bool,
}

/// What a migration reads: log and images.
pub(super) struct TreeStreams {
    log: LogStream,
    images: Images,
}

impl TreeStreams {
    pub(super) fn new(log: LogStream, images: Images) -> Self {
        Self { log, images }
    }

    pub(super) fn images(&self) -> &Images {
        &self.images
    }

    pub(super) fn log(&self) -> &LogStream {
        &self.log
    }

    /// Hashes every stream of `specs`, which takes a while.
    pub(super) fn hash(&self, specs: &[StreamSpec]) -> Result<Vec<StreamHash>, WorkloadError> {
        let hash_one = |spec: &StreamSpec| {
            let hash = match spec.key {
                LOG_STREAM => self.log.hash(),
                key => self.images.hash(key),
            };
            let hash = hash.map_err(failed("hash its images"))?;
            Ok(StreamHash { key: spec.key, hash })
        };
        specs.iter().map(hash_one).collect()
    }
}

impl ChunkSource for TreeStreams {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        match key {
            LOG_STREAM => self.log.read(key, offset, into),
            _ => self.images.read(key, offset, into),
        }
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        match key {
            LOG_STREAM => self.log.is_zero(key, offset, length),
            _ => self.images.is_zero(key, offset, length),
        }
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

/// What a migration does with a tree that has ended.
struct Nothing;

impl ChunkSource for Nothing {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        Err(OutOfStream { key, offset, length: into.len() as u64 })
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        Err(OutOfStream { key, offset, length })
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

fn log_stream(directory: &std::path::Path) -> Result<LogStream, WorkloadError> {
    let log = File::open(directory.join(OUTPUT_LOG)).map_err(failed("open its log"))?;
    Ok(LogStream::new(log, LOG_STREAM))
}

impl Tree {
    /// Takes hold of a tree whose keeper lives. `paused`: an operator wants it to
    /// stand still.
    pub(super) fn new(
        directory: PathBuf,
        cgroup: PathBuf,
        keeper: Arc<Keeper>,
        network: Option<Network>,
        paused: bool,
    ) -> Result<Self, WorkloadError> {
        let terminal = Arc::new(Stdio::open(&directory, &keeper)?);
        let (stopped, wish) = watch::channel(None);
        let state = follow(keeper.states(), wish);
        let chunks = Arc::new(TreeStreams::new(log_stream(&directory)?, Images::new(0, 0)?));
        let alive = Alive {
            keeper,
            network,
            paused,
            options: ProcessOptions::default(),
            streams: vec![log_spec()],
            chunks,
            needs: Vec::new(),
            dump: None,
            stopped,
        };
        Ok(Self { directory, cgroup, terminal, state, alive: Some(alive) })
    }

    /// What is left of a tree that is gone.
    pub(super) fn ended(directory: PathBuf, cgroup: PathBuf, why: &str) -> Self {
        let terminal = Arc::new(Stdio::left_behind(&directory));
        let (_, state) = watch::channel(RunState::Ended(why.to_owned()));
        Self { directory, cgroup, terminal, state, alive: None }
    }

    /// Where its keeper says it stands.
    pub(super) fn phase(&self) -> KeeperPhase {
        self.alive.as_ref().map_or(KeeperPhase::Ended, |alive| alive.keeper.phase())
    }

    /// Lets a restored tree go that an earlier daemon has not.
    pub(super) async fn release(&mut self, paused: bool) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        if let Some(network) = &alive.network {
            network.ready().await?;
        }
        let release = proto::KeeperRelease { paused };
        alive.keeper.done(Request::Release(release)).await.map_err(told("let it run"))?;
        self.rejoin().await;
        Ok(())
    }

    /// Joins the network of a tree that runs: an earlier daemon may have cut it off
    /// to move it, and come no further.
    pub(super) async fn rejoin(&mut self) {
        let network = self.alive.as_ref().and_then(|alive| alive.network.as_ref());
        if let Some(network) = network {
            match network.join().await {
                Ok(()) => network.announce_aside(),
                Err(error) => {
                    tracing::error!(%error, "a process tree runs without its network");
                }
            }
        }
    }

    fn alive(&mut self) -> Result<&mut Alive, WorkloadError> {
        self.alive.as_mut().ok_or_else(|| WorkloadError::new("it has ended"))
    }

    /// Waits until everybody can see that it is in `state`, or has ended: who asks
    /// right after a command must not be told what was before it.
    async fn becomes(&self, state: &RunState) {
        let mut seen = self.state.clone();
        let _ = seen.wait_for(|now| now == state || matches!(now, RunState::Ended(_))).await;
    }
}

/// What a tree does, for everybody, as its keeper says and an operator wished.
fn follow(
    mut seen: watch::Receiver<Seen>,
    mut wish: watch::Receiver<Option<String>>,
) -> watch::Receiver<RunState> {
    let (state, watched) = watch::channel(state_of(&seen.borrow_and_update(), None));
    tokio::spawn(async move {
        loop {
            let changed = tokio::select! {
                changed = seen.changed() => changed,
                changed = wish.changed() => changed,
            };
            let now = state_of(&seen.borrow_and_update(), wish.borrow_and_update().as_deref());
            // What has ended stays so, with its first reason.
            state.send_if_modified(|old| {
                let news = !matches!(old, RunState::Ended(_)) && *old != now;
                if news {
                    *old = now;
                }
                news
            });
            if changed.is_err() {
                return state.closed().await;
            }
        }
    });
    watched
}

fn state_of(seen: &Seen, wish: Option<&str>) -> RunState {
    let ended = |why: String| RunState::Ended(wish.map_or(why, str::to_owned));
    match seen {
        Seen::Dead(why) => ended(why.clone()),
        Seen::Alive { status, .. } => match status.phase() {
            KeeperPhase::Running => RunState::Running,
            KeeperPhase::Ended => ended(how(*status)),
            KeeperPhase::Unspecified
            | KeeperPhase::Empty
            | KeeperPhase::Paused
            | KeeperPhase::Dumping
            | KeeperPhase::Restored => RunState::Paused,
        },
    }
}

/// The inode of a pipe that is named as CRIU does.
fn inode(pipe: &str) -> Option<u64> {
    pipe.strip_prefix("pipe:[")?.strip_suffix(']')?.parse().ok()
}

/// How an init ended.
fn how(status: proto::KeeperStatus) -> String {
    match (status.exit_code, status.signal) {
        (Some(code), _) => format!("it exited with status {code}"),
        (None, 0) => "it ended".to_owned(),
        (None, signal) => match nix::sys::signal::Signal::try_from(signal) {
            Ok(name) => format!("it was ended by {name}"),
            Err(_) => format!("it was ended by signal {signal}"),
        },
    }
}

impl Alive {
    async fn resume(&mut self) -> Result<(), WorkloadError> {
        if let Some(network) = &self.network {
            network.join().await?;
        }
        let resumed = match self.keeper.phase() {
            KeeperPhase::Empty => self.keeper.done(Request::Start(proto::KeeperStart {})).await,
            KeeperPhase::Dumping => self.keeper.done(Request::Thaw(proto::KeeperThaw {})).await,
            KeeperPhase::Restored => {
                let release = proto::KeeperRelease { paused: false };
                self.keeper.done(Request::Release(release)).await
            }
            _ => self.keeper.done(Request::Resume(proto::KeeperResume {})).await,
        };
        resumed.map_err(told("let it run"))
    }
}

#[async_trait]
impl Workload for Tree {
    fn streams(&self) -> Vec<StreamSpec> {
        self.alive.as_ref().map_or_else(Vec::new, |alive| alive.streams.clone())
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

    async fn carry(&mut self, what: Carry) -> Result<(), WorkloadError> {
        let log = log_stream(&self.directory)?;
        let alive = self.alive()?;
        let stats = alive.keeper.stats().await.map_err(told("measure it"))?;
        let images = image_streams(stats.processes, stats.resident_bytes);
        let count = u32::try_from(images.len()).unwrap_or(u32::MAX);
        let length = images.first().map_or(0, |spec| spec.length);
        alive.options = what.process;
        alive.chunks = Arc::new(TreeStreams::new(log, Images::new(count, length)?));
        alive.streams = [vec![log_spec()], images].concat();
        Ok(())
    }

    fn needs(&self) -> Vec<u8> {
        self.alive.as_ref().map_or_else(Vec::new, |alive| alive.needs.clone())
    }

    async fn problems(&mut self) -> Result<Vec<Problem>, WorkloadError> {
        let alive = self.alive()?;
        let stats = alive.keeper.stats().await.map_err(told("look at it"))?;
        let init = alive.keeper.init();
        let ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } =
            alive.options;
        let options = preflight::Options {
            file_locks,
            link_remap,
            ghost_limit_bytes,
            drop_connections,
            own_network: alive.network.is_some(),
            kept_pipes: stats.stdio.iter().filter_map(|end| inode(&end.pipe)).collect(),
        };
        let looked = tokio::task::spawn_blocking(move || {
            let mut findings = preflight::scan(init, &options)?;
            preflight::files::hash(init, &mut findings.files);
            Ok::<_, WorkloadError>(findings)
        });
        let failed = |e| WorkloadError::caused("looking at its processes failed", e);
        let findings = looked.await.map_err(failed)??;
        let files = preflight::files::to_wire(&findings.files);
        let needs = proto::ProcessNeeds { files, resident_bytes: findings.resident_bytes };
        alive.needs = needs.encode_to_vec();
        Ok(findings.problems)
    }

    async fn start_tracking(&mut self) -> Result<(), WorkloadError> {
        Err(WorkloadError::new("what it writes to its memory is not tracked: use --mode stop"))
    }

    async fn stop_tracking(&mut self) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn dirty(&mut self) -> Result<PageSet, WorkloadError> {
        // Its images come to be while it is stopped.
        Ok(PageSet::default())
    }

    async fn clear(&mut self, _: &PageSet) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn freeze(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        let images = alive.chunks.images().directory()?;
        // Nobody's answer to what it sent last may reach it any more, or it would
        // have been acknowledged in vain.
        let cut = match &alive.network {
            Some(network) => network.cut().await,
            None => Ok(()),
        };
        let stopped = match cut {
            Ok(()) => {
                let dumped = alive.keeper.dump(images, to_wire(alive.options), false).await;
                dumped.map_err(told("stop it"))
            }
            Err(error) => Err(error),
        };
        if let Err(error) = stopped {
            self.rejoin().await;
            return Err(error);
        }
        self.alive()?.dump = Some(Dump { growing: Growing::default(), end: None, log_sent: false });
        Ok(())
    }

    async fn rest(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        let directory = self.directory.clone();
        let alive = self.alive()?;
        let dump = alive.dump.as_mut().ok_or_else(|| WorkloadError::new("it was not stopped"))?;
        let mut states = alive.keeper.states();
        let mut part = PageSet::default();
        while dump.end.is_none() {
            dump.end = alive.keeper.dumped().map_err(|e| WorkloadError::new(e.to_string()))?;
            for (key, mut pages) in dump.growing.take(alive.chunks.images(), dump.end.is_some())? {
                if let Some(before) = part.get(key) {
                    pages.union(before);
                }
                part.set(key, pages);
            }
            if part.count() >= PART_PAGES {
                return Ok(Some(part));
            }
            if dump.end.is_none() {
                let _ = tokio::time::timeout(LOOK, states.changed()).await;
            }
        }
        if !dump.log_sent {
            dump.log_sent = true;
            let log = File::open(directory.join(OUTPUT_LOG)).map_err(failed("open its log"))?;
            let mut log = Reader::open(log).map_err(failed("read its log"))?;
            let pages = log.pages_changed_since(&Cleared::default());
            part.set(LOG_STREAM, pages.map_err(failed("read its log"))?);
            return Ok(Some(part));
        }
        Ok(None)
    }

    fn saves_early(&self) -> bool {
        false
    }

    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError> {
        let alive = self.alive()?;
        let (chunks, streams) = (alive.chunks.clone(), alive.streams.clone());
        let hashed = tokio::task::spawn_blocking(move || chunks.hash(&streams)).await;
        hashed.unwrap_or_else(|e| Err(WorkloadError::caused("hashing its images failed", e)))
    }

    async fn save(&mut self) -> Result<Vec<u8>, WorkloadError> {
        let alive = self.alive()?;
        let dump = alive.dump.as_ref().ok_or_else(|| WorkloadError::new("it was not stopped"))?;
        let end = dump.end.clone().ok_or_else(|| WorkloadError::new("it is not written yet"))?;
        let images = alive.chunks.images();
        let proto::KeeperDumped { error: _, stdio, input, mounts, processes, criu } = end;
        let state = proto::ProcessState {
            version: STATE_VERSION,
            criu,
            images: images.to_wire(&images.list()?, &dump.growing.numbers())?,
            stdio,
            input,
            mounts,
            processes,
            options: Some(to_wire(alive.options)),
        };
        Ok(state.encode_to_vec())
    }

    async fn let_go(&mut self) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn thaw(&mut self) -> Result<(), WorkloadError> {
        let log = log_stream(&self.directory);
        let alive = self.alive()?;
        alive.dump = None;
        // It runs again in every case: without its network rather than not at all.
        let joined = match &alive.network {
            Some(network) => network.join().await.map(|()| network.announce_aside()),
            None => Ok(()),
        };
        let thawed = alive.keeper.done(Request::Thaw(proto::KeeperThaw {})).await;
        thawed.map_err(told("let it run again"))?;
        // The images are as large as its memory, and nobody reads them any more.
        alive.chunks = Arc::new(TreeStreams::new(log?, Images::new(0, 0)?));
        alive.streams = vec![log_spec()];
        joined
    }

    async fn pause(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        let paused = alive.keeper.done(Request::Pause(proto::KeeperPause {})).await;
        paused.map_err(told("pause it"))?;
        alive.paused = true;
        self.becomes(&RunState::Paused).await;
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        alive.resume().await?;
        alive.paused = false;
        self.becomes(&RunState::Running).await;
        Ok(())
    }

    async fn ask_to_end(&mut self) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        if alive.paused {
            let text = "it is paused and can't be asked: `migctl resume` it first, or end it with \
                `migctl stop --force`";
            return Err(WorkloadError::new(text));
        }
        let asked = alive.keeper.done(Request::Terminate(proto::KeeperTerminate {})).await;
        asked.map_err(|error| WorkloadError::new(error.to_string()))
    }

    async fn stop(&mut self) -> Result<(), WorkloadError> {
        let Some(alive) = self.alive.take() else { return Ok(()) };
        let why = match &*self.state.borrow() {
            RunState::Ended(why) => why.clone(),
            RunState::Running | RunState::Paused => "stopped by an operator".to_owned(),
        };
        alive.stopped.send_replace(Some(why));
        end(alive, &self.cgroup).await;
        Ok(())
    }

    async fn discard(mut self: Box<Self>) {
        if let Some(alive) = self.alive.take() {
            end(alive, &self.cgroup).await;
        }
        remove(&self.directory);
    }
}

async fn end(alive: Alive, cgroup: &std::path::Path) {
    let Alive { keeper, network, .. } = alive;
    put_away(&keeper, cgroup).await;
    if let Some(network) = network
        && let Err(error) = network.remove().await
    {
        tracing::warn!(%error, "the network of a process tree stays behind");
    }
}

/// Ends a keeper and everything in its cgroup.
pub(super) async fn put_away(keeper: &Keeper, cgroup: &std::path::Path) {
    let kill = Request::Kill(proto::KeeperKill {});
    if let Err(error) = keeper.done(kill).await {
        tracing::info!(%error, "a process tree did not end in good order");
    }
    keeper.quit().await;
    clear_cgroup(cgroup).await;
}

/// Kills what is in a cgroup, and removes it. Harmless when it is not there.
pub(super) async fn clear_cgroup(path: &std::path::Path) {
    let cgroup = crate::keeper::cgroup::Cgroup::at(path);
    let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(cgroup = %path.display(), %error, "a cgroup stays behind");
    }
}

/// Deletes a tree's directory: its files, and directories only when they are empty.
/// Below one of them the keeper has `/`, in its own mount namespace; nothing may ever
/// be removed through that, wherever it is seen.
pub(super) fn remove(directory: &std::path::Path) {
    let empty = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::remove_dir(directory)
    };
    if let Err(error) = empty() {
        tracing::warn!(directory = %directory.display(), %error, "a directory stays behind");
    }
}
