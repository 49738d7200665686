//! A look at a tree that is to move.

use std::path::Path;
use std::sync::Arc;

use migr_proto::v1 as proto;
use prost::Message;

use super::alive::Alive;
use super::carried::is_carried;
use super::preflight::{self, files};
use super::rootfs::{self, Leaving};
use super::told;
use crate::host_memory::HostMemory;
use crate::keeper::container::Network;
use crate::keeper::mounts;
use crate::workload::{Needs, Problem, ProcessOptions, WorkloadError};

/// How much could be read while a file is made (bytes).
const MADE: u64 = 16 << 10;

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
    /// What it has to find elsewhere, and what there is of the root file system that
    /// comes along. Reads its files.
    pub(super) fn needs(&self, rootfs: Option<&Leaving>) -> Needs {
        let mut used = self.files.clone();
        files::hash(self.root_of, &mut used);
        let hashed = used.iter().filter(|file| file.is_compared_by_content());
        let reads: u64 = hashed.map(|file| file.size).sum();
        let list = rootfs.map(Leaving::list);
        // Each is made there before there is an answer.
        let made = list.as_ref().map_or(0, |list| list.nodes.len() as u64 * MADE);
        let needs = proto::ProcessNeeds {
            files: files::to_wire(&used),
            resident_bytes: self.resident_bytes,
            criu: self.criu.clone(),
            rootfs: list,
        };
        Needs { written: needs.encode_to_vec(), reads: reads.saturating_add(made) }
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

/// A snapshot of a container whose root file system is migrd's own would be of no use
/// when that is deleted.
fn not_saved(root: &Path) -> Problem {
    Problem::new(
        "rootfs-not-saved",
        "its root file system came with it, and snapshots do not hold root file systems",
        format!("copy {} into a bundle, and start it anew from that", root.display()),
    )
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
        let came = rootfs::arrived(&rootfs::place_of(&self.directory));
        let comes_along = is_carried(self.keeper.config()) && !self.to_files;
        // A container's files get the paths that they have on the host.
        let root_of = if spec.is_some() { std::process::id() } else { init };
        let looked = tokio::task::spawn_blocking(move || {
            let mut findings = preflight::scan(init, &options)?;
            let written = match spec {
                Some(spec) => preflight::container::adapt(init, &spec, comes_along, &mut findings)?,
                None => Vec::new(),
            };
            Ok::<_, WorkloadError>((findings, written))
        });
        let failed = |e| WorkloadError::caused("looking at its processes failed", e);
        let (findings, written) = looked.await.map_err(failed)??;
        let preflight::Findings { mut problems, files, resident_bytes, .. } = findings;
        self.carried.written = written;
        problems.extend(self.carried.problem());
        problems.extend(self.chains.problem(self.tracks));
        if let Some(root) = came.filter(|_| self.to_files) {
            problems.push(not_saved(&root));
        }
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
