//! Who else holds what the tree holds: every other process of the host is
//! looked at, so this is asked once, for everything.

use std::collections::{HashMap, HashSet};
use std::fs;

use super::descriptors::Kind;
use super::procfs::{self, Status};
use super::tree::Tree;

/// A process outside of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) pid: u32,
    pub(super) command: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.command, self.pid)
    }
}

/// The pipes and sockets, by inode, that somebody outside of the tree holds, of
/// those asked for, and somebody who does.
#[derive(Debug, Default)]
pub(super) struct Outside {
    pub(super) pipes: HashMap<u64, Holder>,
    pub(super) sockets: HashMap<u64, Holder>,
}

impl Outside {
    pub(super) fn find(tree: &Tree, pipes: &HashSet<u64>, sockets: &HashSet<u64>) -> Self {
        let mut found = Self::default();
        if pipes.is_empty() && sockets.is_empty() {
            return found;
        }
        let pids = procfs::numbers(&"/proc".into()).unwrap_or_default();
        for pid in pids.into_iter().filter(|pid| tree.get(*pid).is_none()) {
            let directory = procfs::path(pid, "fd");
            for fd in procfs::numbers(&directory).unwrap_or_default() {
                let Ok(link) = fs::read_link(directory.join(fd.to_string())) else { continue };
                let (into, inode) = match Kind::of(link) {
                    Kind::Pipe(inode) if pipes.contains(&inode) => (&mut found.pipes, inode),
                    Kind::Socket(inode) if sockets.contains(&inode) => (&mut found.sockets, inode),
                    _ => continue,
                };
                into.entry(inode).or_insert_with(|| holder(pid));
            }
        }
        found
    }
}

fn holder(pid: u32) -> Holder {
    let status = procfs::read(pid, "status").unwrap_or_default();
    Holder { pid, command: Status::parse(&status).name }
}
