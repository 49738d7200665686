//! Finds trees again that an earlier daemon has made.

use std::collections::BTreeSet;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use migr_proto::v1::KeeperPhase;

use super::arriving::ArrivingTree;
use super::engine::ProcessEngine;
use super::keeper::{Keeper, KeeperError};
use super::net::Network;
use super::remains::clear_cgroup;
use super::running::Tree;
use super::{container, told};
use crate::units::WorkloadId;
use crate::workload::link::LinkError;
use crate::workload::{Arriving, Engine, Recovers, Workload, WorkloadError};

/// How long, and how often, a keeper that does not answer is given to be gone.
const DYING_PAUSE: Duration = Duration::from_millis(50);
const DYING_TRIES: u32 = 60;

impl ProcessEngine {
    /// The keeper of a tree, and its network, if it still lives.
    async fn take_back(
        &self,
        id: WorkloadId,
    ) -> Result<Option<(Arc<Keeper>, Option<Network>)>, WorkloadError> {
        let cgroup = self.cgroup(id)?;
        let mut keeper = Keeper::adopt(&self.place(id), cgroup.clone()).await;
        for _ in 0..DYING_TRIES {
            // One that was killed just now still accepts, and says nothing.
            if !matches!(keeper, Err(KeeperError::Link(LinkError::Dead(_)))) {
                break;
            }
            tokio::time::sleep(DYING_PAUSE).await;
            keeper = Keeper::adopt(&self.place(id), cgroup.clone()).await;
        }
        let keeper = keeper.map_err(told("take it back"))?;
        let Some(keeper) = keeper else { return Ok(None) };
        let network = match &keeper.config().net {
            // One that has ended is in no network any more.
            Some(net) if keeper.phase() != KeeperPhase::Ended => {
                let namespace = keeper.network().map_err(super::failed("take its network back"))?;
                Some(Network::find(id, net, namespace).await?)
            }
            _ => None,
        };
        Ok(Some((Arc::new(keeper), network)))
    }

    async fn find_tree(&self, id: WorkloadId, paused: bool) -> Result<Option<Tree>, WorkloadError> {
        let Some((keeper, network)) = self.take_back(id).await? else { return Ok(None) };
        let cgroup = self.cgroup(id)?;
        let tree = Tree::new(self.place(id), cgroup, keeper, network, paused, self.tracks())?;
        Ok(Some(tree.written_by(self.criu_version())))
    }
}

#[async_trait]
impl Recovers for ProcessEngine {
    async fn find(
        &self,
        id: WorkloadId,
        _name: &str,
        _config: &[u8],
        paused: bool,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        let Some(mut tree) = self.find_tree(id, paused).await? else {
            if let Ok(cgroup) = self.cgroup(id) {
                // Without its keeper nothing of it can be held.
                clear_cgroup(&cgroup).await;
                container::clear(&self.place(id), &cgroup).await;
            }
            let why = "its keeper is gone: the host restarted, or it was stopped or killed";
            let cgroup = self.cgroup(id).unwrap_or_default();
            return Ok(Box::new(Tree::ended(self.place(id), cgroup, why)));
        };
        if tree.phase() == KeeperPhase::Empty {
            // Whoever asked for it was told nothing, and it has not run.
            tree.stop().await?;
            let why = "migrd ended while it was being started, and it was not: start it again";
            let cgroup = self.cgroup(id).unwrap_or_default();
            return Ok(Box::new(Tree::ended(self.place(id), cgroup, why)));
        }
        let done = match (tree.phase(), paused) {
            (KeeperPhase::Dumping, _) => tree.thaw().await,
            (KeeperPhase::Restored, _) => tree.release(paused).await,
            (KeeperPhase::Paused, false) => tree.resume().await,
            (KeeperPhase::Running, true) => tree.pause().await,
            (KeeperPhase::Running, false) => {
                tree.rejoin().await;
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = done {
            // It is this host's all the same, and must not be taken for gone.
            tracing::error!(%id, %error, "a process tree does not do what it should");
        }
        Ok(Box::new(tree))
    }

    async fn find_released(
        &self,
        id: WorkloadId,
        _name: &str,
        paused: bool,
    ) -> Result<Option<Box<dyn Workload>>, WorkloadError> {
        let Some(mut tree) = self.find_tree(id, paused).await? else { return Ok(None) };
        if tree.phase() == KeeperPhase::Running {
            tree.pause().await?;
        }
        Ok(Some(Box::new(tree)))
    }

    async fn find_sealed(
        &self,
        id: WorkloadId,
        _name: &str,
    ) -> Result<Option<Box<dyn Arriving>>, WorkloadError> {
        let Some((keeper, network)) = self.take_back(id).await? else { return Ok(None) };
        // Before it is complete nothing was sealed.
        if keeper.phase() != KeeperPhase::Restored {
            return Ok(None);
        }
        // It has all that was sent.
        let parts = self.parts(id, keeper, network, self.cgroup(id)?);
        Ok(Some(Box::new(ArrivingTree::new(parts)?)))
    }

    async fn sweep(&self, known: &BTreeSet<WorkloadId>) {
        let homes = self.homes().into_iter();
        for entry in homes.filter_map(|home| std::fs::read_dir(home).ok()).flatten().flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|n| WorkloadId::from_str(n).ok());
            let Some(id) = id.filter(|id| !known.contains(id)) else { continue };
            tracing::info!(%id, "clearing away a process tree that this host does not own");
            self.clear(id).await;
        }
    }
}
