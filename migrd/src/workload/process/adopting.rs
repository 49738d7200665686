//! Takes over trees that somebody else has started.

use std::sync::Arc;

use migr_proto::v1::keeper_request::Request;
use migr_proto::v1::{self as proto, ProcessConfig};

use super::engine::ProcessEngine;
use super::images::Images;
use super::preflight::{self, Adoptable};
use super::remains::put_away;
use super::running::Tree;
use crate::host_memory::HostMemory;
use crate::units::WorkloadId;
use crate::workload::{Engine, Problem, ProcessOptions, Workload, WorkloadError};

/// A process that is to be taken over, and was looked at.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its number on this host.
    pub pid: u32,
    /// What it is.
    pub found: Adoptable,
    /// What is in the way.
    pub problems: Vec<Problem>,
    options: ProcessOptions,
}

impl Candidate {
    /// Looks at a process and all below it.
    ///
    /// # Errors
    /// When there is none.
    pub async fn look(pid: u32, options: ProcessOptions) -> Result<Self, WorkloadError> {
        let ghosts = options.ghost_limit_bytes;
        let looked = tokio::task::spawn_blocking(move || preflight::look(pid, ghosts)).await;
        let (found, mut problems) =
            looked.map_err(|e| WorkloadError::caused("looking at its processes failed", e))??;
        let (_, available) = HostMemory::of_this_host().read();
        if found.resident_bytes > available {
            let (needs, has) = (found.resident_bytes >> 20, available >> 20);
            problems.push(Problem::new(
                "memory",
                format!("its processes have {needs} MiB of memory and {has} MiB are free"),
                "free memory: for a moment there are two of it",
            ));
        }
        Ok(Self { pid, found, problems, options })
    }

    /// What the workload will be made of.
    #[must_use]
    pub fn config(&self) -> ProcessConfig {
        ProcessConfig {
            version: 1,
            argv: self.found.argv.clone(),
            env: Vec::new(),
            cwd: self.found.cwd.clone(),
            net: None,
            container: None,
            adopted: self.pid,
        }
    }
}

impl ProcessEngine {
    /// Makes the workload `id` of a process of this host and all below it. Until
    /// [`Workload::resume`] both the original and its copy stand still; if that is
    /// never called, the original goes on.
    ///
    /// # Errors
    /// When it can't be made; the original goes on then.
    pub(super) async fn take_over(
        &self,
        id: WorkloadId,
        candidate: &Candidate,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        let (keeper, network, cgroup) = self.keep(id, &candidate.config()).await?;
        let made = async {
            let images = Images::new(0, 0)?.directory()?;
            let adopt = proto::KeeperAdopt {
                pid: candidate.pid,
                start_time: candidate.found.start_time,
                options: Some(super::to_wire(candidate.options)),
            };
            let adopted = keeper.done_with(Request::Adopt(adopt), vec![images]).await;
            adopted.map_err(|error| WorkloadError::new(error.to_string()))?;
            let (directory, tracks) = (self.place(id), self.tracks());
            Tree::new(directory, cgroup.clone(), Arc::clone(&keeper), network, true, tracks)
        };
        match made.await {
            Ok(tree) => Ok(Box::new(tree)),
            Err(error) => {
                put_away(&keeper, &cgroup).await;
                self.clear(id).await;
                Err(error)
            }
        }
    }
}
