//! A look at a tree that is to move.

use std::sync::Arc;

use migr_proto::v1 as proto;
use prost::Message;

use super::preflight::{self, files};
use super::running::Alive;
use super::told;
use crate::host_memory::HostMemory;
use crate::keeper::container::Network;
use crate::keeper::mounts;
use crate::workload::{Needs, Problem, ProcessOptions, WorkloadError};

/// What a tree was seen to use.
#[derive(Debug)]
pub(super) struct Found {
    /// The process by whose root the files have their paths.
    root_of: u32,
    files: Vec<files::UsedFile>,
    resident_bytes: u64,
    criu: String,
}

impl Found {
    /// What it has to find elsewhere. Reads its files.
    pub(super) fn needs(&self) -> Needs {
        let mut used = self.files.clone();
        files::hash(self.root_of, &mut used);
        let hashed = used.iter().filter(|file| file.is_compared_by_content());
        let reads = hashed.map(|file| file.size).sum();
        let needs = proto::ProcessNeeds {
            files: files::to_wire(&used),
            resident_bytes: self.resident_bytes,
            criu: self.criu.clone(),
        };
        Needs { written: needs.encode_to_vec(), reads }
    }
}

/// What stands in the way of images of so much memory (bytes) on this host, where the
/// processes keep theirs meanwhile.
fn no_room(resident_bytes: u64, available: u64) -> Option<Problem> {
    let (needs, has) = (resident_bytes >> 20, available >> 20);
    (resident_bytes > available).then(|| {
        Problem::new(
            "source-memory",
            format!(
                "its processes have {needs} MiB of memory, which is written into memory beside \
                 it, and {has} MiB are free"
            ),
            "stop or move something else away from this host first, or have the workload take less",
        )
    })
}

/// The inode of a pipe that is named as CRIU does.
fn inode(pipe: &str) -> Option<u64> {
    pipe.strip_prefix("pipe:[")?.strip_suffix(']')?.parse().ok()
}

impl Alive {
    /// What keeps it from being moved. What it needs at a destination is noted.
    pub(super) async fn look(&mut self) -> Result<Vec<Problem>, WorkloadError> {
        let stats = self.keeper.stats().await.map_err(told("look at it"))?;
        let init = self.keeper.init();
        let spec = super::container_of(self.keeper.config())?;
        let ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } =
            self.options;
        let options = preflight::Options {
            file_locks,
            link_remap,
            ghost_limit_bytes,
            drop_connections,
            own_network: self.network.is_some()
                || spec.as_ref().is_some_and(|spec| spec.network() == Network::Own),
            // What a container has of its own is told by its bundle, below.
            carried: match &spec {
                Some(_) => Vec::new(),
                None => mounts::carried().map(str::to_owned).collect(),
            },
            kept_pipes: stats.stdio.iter().filter_map(|end| inode(&end.pipe)).collect(),
        };
        // A container's files get the paths that they have on the host.
        let root_of = if spec.is_some() { std::process::id() } else { init };
        let looked = tokio::task::spawn_blocking(move || {
            let mut findings = preflight::scan(init, &options)?;
            if let Some(spec) = spec {
                preflight::container::adapt(init, &spec, &mut findings)?;
            }
            Ok::<_, WorkloadError>(findings)
        });
        let failed = |e| WorkloadError::caused("looking at its processes failed", e);
        let preflight::Findings { mut problems, files, resident_bytes, .. } =
            looked.await.map_err(failed)??;
        let (_, available) = HostMemory::of_this_host().read();
        if !self.to_files {
            problems.extend(no_room(resident_bytes, available));
        }
        let criu = self.criu.clone();
        self.found = Some(Arc::new(Found { root_of, files, resident_bytes, criu }));
        Ok(problems)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_without_room_for_the_images_is_named() {
        assert_eq!(no_room(1 << 30, 1 << 30), None);
        let problem = no_room(3 << 30, 1 << 30).unwrap();
        assert_eq!(problem.code, "source-memory");
        assert!(problem.message.contains("3072 MiB") && problem.message.contains("1024 MiB"));
    }
}
