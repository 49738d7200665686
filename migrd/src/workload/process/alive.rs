//! A process tree whose keeper lives: how it is stopped, and let go.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use migr_proto::v1::keeper_request::Request;
use migr_proto::v1::{self as proto, KeeperPhase};
use tokio::sync::watch;

use super::ahead::{Rounds, Size};
use super::carried::Carried;
use super::chains::Chains;
use super::images::Images;
use super::keeper::Keeper;
use super::leaving::Dump;
use super::looking::Found;
use super::net::Network;
use super::receiving::Receiving;
use super::remains::put_away;
use super::streams::TreeStreams;
use super::{log_spec, to_wire, told, versions};
use crate::serial_log::LogStream;
use crate::workload::{ProcessOptions, StreamSpec, WorkloadError};

/// A tree whose keeper lives.
pub(super) struct Alive {
    pub(super) directory: PathBuf,
    pub(super) keeper: Arc<Keeper>,
    pub(super) network: Option<Network>,
    pub(super) paused: bool,
    pub(super) options: ProcessOptions,
    /// Its images go to files, and not into memory.
    pub(super) to_files: bool,
    /// Its memory is to be the same whenever it is read.
    pub(super) verify: bool,
    /// Its memory stays here until the destination asks for it.
    pub(super) follows: bool,
    pub(super) streams: Vec<StreamSpec>,
    pub(super) chunks: Arc<TreeStreams>,
    /// What it has to find at a destination, as was seen last.
    pub(super) found: Option<Arc<Found>>,
    /// Version of the CRIU of this host.
    pub(super) criu: String,
    /// Whether the kernel tells what it writes to its memory.
    pub(super) tracks: bool,
    /// What its next snapshot can build on.
    pub(super) chains: Chains,
    /// What it has, as was seen last.
    pub(super) size: Size,
    /// What of its memory went ahead.
    pub(super) rounds: Rounds,
    /// Its root file system, if that moves with it.
    pub(super) carried: Carried,
    /// A dump that was begun.
    pub(super) dump: Option<Dump>,
    /// Says why it ended if that was an operator's wish.
    pub(super) stopped: watch::Sender<Option<String>>,
}

impl Alive {
    /// The images may be as large as its memory, and nobody reads them any more.
    pub(super) fn forget_images(&mut self, log: LogStream) -> Result<(), WorkloadError> {
        self.rounds = Rounds::default();
        self.carried = Carried::default();
        self.chunks = Arc::new(TreeStreams::new(log, Images::new(0, 0)?));
        self.streams = vec![log_spec()];
        Ok(())
    }

    pub(super) async fn resume(&mut self) -> Result<(), WorkloadError> {
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

    /// Has a CRIU ready to write it, while it runs.
    pub(super) async fn make_ready(&mut self, cgroup: &Path) -> Result<(), WorkloadError> {
        let images = self.chunks.images().directory()?;
        let (ahead, growing) = std::mem::take(&mut self.rounds).into_stop();
        let (parent, track) = match self.to_files {
            true => self.chains.begin(self.tracks),
            false => (ahead, false),
        };
        // Where others are to have whole files, or images before these have the rest, CRIU
        // writes its memory. In what it leaves in the processes the kernel still changes
        // a few bytes while CRIU is at work, such as the CPU that a thread is on (rseq(2)).
        let here = parent.is_empty() && !self.verify && !self.chunks.images().stay();
        let (memory, page_server) = if here && versions::sends_pages(&self.criu) {
            let (memory, socket) = Receiving::start(&self.chunks, cgroup)?;
            (Some(memory), Some(socket))
        } else {
            (None, None)
        };
        let follows = self.follows && memory.is_some();
        self.dump = Some(Dump::after(growing, memory, follows));
        let options = to_wire(self.options);
        let ready = self.keeper.dump(images, options, parent, page_server, track).await;
        ready.map_err(|error| WorkloadError::new(error.to_string()))
    }

    /// Stops it, and has the CRIU that is ready to write it do that. On an error it may be
    /// cut off from its network, and runs.
    pub(super) async fn stop(&mut self) -> Result<(), WorkloadError> {
        let stopped = self.stop_and_write().await;
        if stopped.is_err()
            && let Err(error) = self.keeper.done(Request::Thaw(proto::KeeperThaw {})).await
        {
            tracing::error!(%error, "a process tree that could not be stopped may stand still");
        }
        stopped
    }

    async fn stop_and_write(&mut self) -> Result<(), WorkloadError> {
        self.keeper.stop().await.map_err(told("stop it"))?;
        // Now that it sends nothing more, nobody's answer to what it sent last may reach
        // it any more: what CRIU does not read would have been acknowledged in vain.
        if let Some(network) = &self.network {
            network.cut().await?;
        }
        self.keeper.write().await.map_err(told("have it written"))
    }

    /// Lets it run on where it was stopped. Its log is only needed when it does.
    pub(super) async fn go_on(
        &mut self,
        log: Result<LogStream, WorkloadError>,
    ) -> Result<(), WorkloadError> {
        let dump = self.dump.take();
        let writing = dump.as_ref().is_some_and(|dump| !dump.is_written());
        if let Some(dump) = &dump {
            dump.abort();
        }
        if writing && self.keeper.phase() == KeeperPhase::Dumping {
            // CRIU can't be told to end in the middle: it is when it can't write that
            // it lets go of the processes.
            if let Err(error) = self.chunks.images().stop_growing() {
                tracing::warn!(%error, "the processes wait until CRIU has written everything");
            }
        }
        // It runs again in every case: without its network rather than not at all.
        let joined = match &self.network {
            Some(network) => network.join().await.map(|()| network.announce_aside()),
            None => Ok(()),
        };
        let thawed = self.keeper.done(Request::Thaw(proto::KeeperThaw {})).await;
        thawed.map_err(told("let it run again"))?;
        self.forget_images(log?)?;
        joined
    }

    /// Ends it, and gives up what it has of this host.
    pub(super) async fn end(self, cgroup: &Path) {
        let Self { keeper, network, .. } = self;
        put_away(&keeper, cgroup).await;
        if let Some(network) = network
            && let Err(error) = network.remove().await
        {
            tracing::warn!(%error, "the network of a process tree stays behind");
        }
    }
}
