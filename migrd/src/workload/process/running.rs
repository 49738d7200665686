//! A process tree of this host.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use migr_proto::v1::keeper_request::Request;
use migr_proto::v1::{self as proto, KeeperPhase};
use prost::Message;
use tokio::sync::watch;

use super::ahead::{Rounds, Size};
use super::alive::Alive;
use super::carried::{self, Carried};
use super::chains::Chains;
use super::follow::follow;
use super::images::Images;
use super::keeper::{Keeper, OUTPUT_LOG};
use super::lacking::Lacking;
use super::left::Left;
use super::letting_go::let_go;
use super::net::Network;
use super::remains::remove;
use super::streams::{TreeStreams, log_stream};
use super::terminal::Stdio;
use super::{image_streams, log_spec, to_wire, told, versions};
use crate::pages::PageSet;
use crate::workload::{
    Ahead, Carry, ChunkSource, Follows, Lacks, LeftMemory, Needing, Needs, NoStreams, Problem,
    ProcessOptions, RunState, StreamHash, StreamSpec, Terminal, Workload, WorkloadError,
};

/// A tree, or what is left of one that has ended.
pub(super) struct Tree {
    directory: PathBuf,
    cgroup: PathBuf,
    terminal: Arc<Stdio>,
    state: watch::Receiver<RunState>,
    alive: Option<Alive>,
}

impl Tree {
    /// Takes hold of a tree whose keeper lives. `paused`: an operator wants it to
    /// stand still. `tracks`: the kernel tells what it writes to its memory.
    pub(super) fn new(
        directory: PathBuf,
        cgroup: PathBuf,
        keeper: Arc<Keeper>,
        network: Option<Network>,
        paused: bool,
        tracks: bool,
    ) -> Result<Self, WorkloadError> {
        let terminal =
            Arc::new(Stdio::open(&directory.join(OUTPUT_LOG), keeper.written(), &keeper)?);
        let (stopped, wish) = watch::channel(None);
        let state = follow(keeper.states(), wish);
        let chunks = Arc::new(TreeStreams::new(log_stream(&directory)?, Images::new(0, 0)?));
        let alive = Alive {
            directory: directory.clone(),
            keeper,
            network,
            paused,
            options: ProcessOptions::default(),
            to_files: false,
            verify: false,
            follows: false,
            streams: vec![log_spec()],
            chunks,
            found: None,
            criu: String::new(),
            tracks,
            chains: Chains::default(),
            size: Size::default(),
            rounds: Rounds::default(),
            carried: Carried::default(),
            dump: None,
            stopped,
        };
        Ok(Self { directory, cgroup, terminal, state, alive: Some(alive) })
    }

    /// The same, that a CRIU of that version would write.
    pub(super) fn written_by(mut self, criu: String) -> Self {
        if let Some(alive) = &mut self.alive {
            alive.criu = criu;
        }
        self
    }

    /// What is left of a tree that is gone.
    pub(super) fn ended(directory: PathBuf, cgroup: PathBuf, why: &str) -> Self {
        let terminal = Stdio::left_behind(&directory.join(OUTPUT_LOG)).unwrap_or_else(|error| {
            tracing::warn!(%error, "the output of a process tree is lost");
            Stdio::silent()
        });
        let (_, state) = watch::channel(RunState::Ended(why.to_owned()));
        Self { directory, cgroup, terminal: Arc::new(terminal), state, alive: None }
    }

    /// Where its keeper says it stands.
    pub(super) fn phase(&self) -> KeeperPhase {
        self.alive.as_ref().map_or(KeeperPhase::Ended, |alive| alive.keeper.phase())
    }

    /// Lets a restored tree go that an earlier daemon has not.
    pub(super) async fn release(&mut self, paused: bool) -> Result<(), WorkloadError> {
        let alive = self.alive()?;
        let_go(&alive.keeper, alive.network.as_ref(), paused).await
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

#[async_trait]
impl Workload for Tree {
    fn streams(&self) -> Vec<StreamSpec> {
        self.alive.as_ref().map_or_else(Vec::new, |alive| alive.streams.clone())
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
        let log = log_stream(&self.directory)?;
        let alive = self.alive()?;
        if alive.keeper.lacks() {
            return Err(WorkloadError::new(
                "memory of it still comes from the host that it came from: wait until all is \
                 here (`migctl list` at that host says when), then try again",
            ));
        }
        // Memory may still be put in place from an earlier move.
        let settled = alive.keeper.done(Request::Settle(proto::KeeperSettle {})).await;
        settled.map_err(told("wait for all its memory"))?;
        let stats = alive.keeper.stats().await.map_err(told("measure it"))?;
        let images = image_streams(stats.processes, stats.resident_bytes, alive.tracks);
        let count = u32::try_from(images.len()).unwrap_or(u32::MAX);
        let length = images.first().map_or(0, |spec| spec.length);
        alive.options = what.process;
        alive.size = Size { processes: stats.processes, private_bytes: stats.private_bytes };
        alive.rounds = Rounds::default();
        alive.to_files = what.to_files;
        alive.verify = what.verify;
        alive.follows = what.follows;
        alive.chains.choose(what.chain);
        let written = std::mem::take(&mut alive.carried.written);
        alive.carried = match what.to_files {
            true => Carried::default(),
            false => Carried::begin(alive.keeper.config(), written).await?,
        };
        let streams = TreeStreams::new(log, Images::new(count, length)?);
        alive.chunks = Arc::new(streams.with_rootfs(alive.carried.leaving()));
        let rootfs = alive.carried.spec().into_iter().collect();
        alive.streams = [vec![log_spec()], images, rootfs].concat();
        Ok(())
    }

    fn needs(&self) -> Needing {
        match self.alive.as_ref().and_then(|alive| alive.found.clone()) {
            Some(found) => {
                let leaving = self.alive.as_ref().and_then(|alive| alive.carried.leaving());
                Arc::new(move || found.needs(leaving.as_deref()))
            }
            None => Arc::new(Needs::default),
        }
    }

    fn saves_files(&self) -> bool {
        true
    }

    async fn save_files_in(
        &mut self,
        directory: OwnedFd,
        onto: String,
    ) -> Result<(), WorkloadError> {
        let log = log_stream(&self.directory)?;
        let alive = self.alive()?;
        alive.chains.onto(onto);
        alive.chunks = Arc::new(TreeStreams::new(log, Images::that_stay(directory)));
        alive.streams = vec![log_spec()];
        Ok(())
    }

    async fn problems(&mut self) -> Result<Vec<Problem>, WorkloadError> {
        self.alive()?.look().await
    }

    fn ahead(&self) -> Ahead {
        let not = |why: &str| Ahead::Not(why.to_owned());
        match &self.alive {
            None => not("it has ended"),
            Some(alive) if alive.paused => not("it is paused, so nothing would run meanwhile"),
            Some(alive) if !alive.tracks => {
                not("the kernel of this host does not track what processes write to their \
                     memory (CONFIG_MEM_SOFT_DIRTY)")
            }
            Some(alive) => alive.rounds.possible(alive.size, alive.chunks.images()),
        }
    }

    fn follows(&self) -> Follows {
        let not = |why: &str| Follows::Not(why.to_owned());
        match &self.alive {
            None => not("it has ended"),
            Some(alive) if alive.verify => {
                not("--verify compares all memory before it runs, and this mode brings it later")
            }
            Some(alive) if !versions::sends_pages(&alive.criu) => {
                not("it takes CRIU 4.2 at this host to leave memory in the processes")
            }
            Some(_) => Follows::Can,
        }
    }

    fn left_behind(&self) -> Option<Arc<dyn LeftMemory>> {
        let alive = self.alive.as_ref()?;
        let bytes = match &alive.dump {
            Some(dump) if !dump.follows() => return None,
            Some(dump) => dump.stays(alive.chunks.images()).1,
            // Of a tree that an earlier daemon has stopped.
            None if alive.keeper.phase() == KeeperPhase::Dumping => 0,
            None => return None,
        };
        Some(Arc::new(Left::new(&alive.keeper, &self.cgroup, bytes)))
    }

    fn lacks(&self) -> Option<Arc<dyn Lacks>> {
        let alive = self.alive.as_ref()?;
        Some(Arc::new(Lacking(Arc::clone(&alive.keeper))))
    }

    async fn files_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        self.alive()?.carried.ahead().await
    }

    async fn copy_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        let Alive { keeper, chunks, rounds, options, chains, .. } = self.alive()?;
        chains.broken();
        rounds.next(keeper, chunks.images(), to_wire(*options)).await
    }

    async fn start_tracking(&mut self) -> Result<(), WorkloadError> {
        Err(WorkloadError::new("the memory of a process tree goes in copies"))
    }

    async fn stop_tracking(&mut self) -> Result<(), WorkloadError> {
        let log = log_stream(&self.directory);
        let Some(alive) = &mut self.alive else { return Ok(()) };
        // Whoever gets the tree next may stop it at once, which CRIU would not survive.
        alive.rounds.end().await;
        alive.forget_images(log?)
    }

    async fn dirty(&mut self) -> Result<PageSet, WorkloadError> {
        // Its images come to be while it is stopped.
        Ok(PageSet::default())
    }

    async fn clear(&mut self, _: &PageSet) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), WorkloadError> {
        let cgroup = self.cgroup.clone();
        self.alive()?.make_ready(&cgroup).await
    }

    async fn freeze(&mut self) -> Result<(), WorkloadError> {
        if self.alive()?.dump.is_none() {
            self.drain().await?;
        }
        let stopped = self.alive()?.stop().await;
        if stopped.is_err() {
            self.rejoin().await;
        }
        stopped
    }

    async fn rest(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        let directory = self.directory.clone();
        let Alive { keeper, chunks, dump, carried, options, .. } = self.alive()?;
        let dump = dump.as_mut().ok_or_else(|| WorkloadError::new("it was not stopped"))?;
        // CRIU makes names for files that have none left, which have to go along.
        if !options.link_remap {
            carried.look_again();
        }
        match dump.rest(&directory, keeper, chunks.images()).await? {
            Some(part) => Ok(Some(part)),
            None => carried.rest().await,
        }
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
        let state = dump.state(alive.chunks.images(), alive.options)?;
        if alive.to_files {
            alive.chains.written(alive.tracks);
        }
        Ok(proto::ProcessState { criu: alive.criu.clone(), ..state }.encode_to_vec())
    }

    async fn let_go(&mut self) -> Result<(), WorkloadError> {
        Ok(())
    }

    async fn thaw(&mut self) -> Result<(), WorkloadError> {
        let log = log_stream(&self.directory);
        self.alive()?.go_on(log).await
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
        alive.end(&self.cgroup).await;
        super::container::clear(&self.directory, &self.cgroup).await;
        Ok(())
    }

    async fn discard(mut self: Box<Self>) {
        if let Some(alive) = self.alive.take() {
            alive.end(&self.cgroup).await;
        }
        super::container::clear(&self.directory, &self.cgroup).await;
        carried::clear(&self.directory).await;
        remove(&self.directory);
    }
}
