//! A look at a tree that is to move.

use migr_proto::v1 as proto;
use prost::Message;

use super::running::Alive;
use super::{preflight, told};
use crate::workload::{Problem, ProcessOptions, WorkloadError};

/// The inode of a pipe that is named as CRIU does.
fn inode(pipe: &str) -> Option<u64> {
    pipe.strip_prefix("pipe:[")?.strip_suffix(']')?.parse().ok()
}

impl Alive {
    /// What keeps it from being moved. What it needs at a destination is noted.
    pub(super) async fn look(&mut self) -> Result<Vec<Problem>, WorkloadError> {
        let stats = self.keeper.stats().await.map_err(told("look at it"))?;
        let init = self.keeper.init();
        let ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } =
            self.options;
        let options = preflight::Options {
            file_locks,
            link_remap,
            ghost_limit_bytes,
            drop_connections,
            own_network: self.network.is_some(),
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
        self.needs = needs.encode_to_vec();
        Ok(findings.problems)
    }
}
