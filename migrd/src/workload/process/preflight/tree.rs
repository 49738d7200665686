//! The processes of a tree.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::procfs::{self, Status};
use crate::workload::WorkloadError;

/// How often the tree is walked when each walk finds more: a tree that forks
/// all the time is not waited for.
const WALKS: usize = 4;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number, as this daemon sees it.
    pub pid: u32,
    /// What it calls itself.
    pub command: String,
    /// Its threads, the first one included.
    pub threads: Vec<u32>,
    /// Its memory, in bytes.
    pub resident_bytes: u64,
    /// Who traces one of its threads.
    pub tracer: Option<u32>,
    /// It has ended, and waits to be reaped.
    pub zombie: bool,
    /// The leader of its session is outside of the tree's pid namespace.
    pub session_outside: bool,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.command, self.pid)
    }
}

/// Everything that came of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The first process.
    pub init: u32,
    /// All of them, by number.
    pub processes: Vec<Process>,
}

impl Tree {
    /// The tree of `init`. Processes that come and go meanwhile are in it or not.
    ///
    /// # Errors
    /// When there is no such process, or /proc can't be read.
    pub fn read(init: u32) -> Result<Self, WorkloadError> {
        let mut found = BTreeSet::from([init]);
        for _ in 0..WALKS {
            let before = found.len();
            walk(init, &mut found).map_err(|error| {
                let reason = if procfs::is_gone(&error) { "it is not there" } else { "see below" };
                WorkloadError::caused(
                    format!("cannot look at the processes below process {init}: {reason}"),
                    error,
                )
            })?;
            if found.len() == before {
                break;
            }
        }
        let of_init = procfs::read(init, "status").unwrap_or_default();
        let depth = Status::parse(&of_init).sessions.len();
        let processes: Vec<_> = found.into_iter().filter_map(|pid| process(pid, depth)).collect();
        if processes.iter().any(|process| process.pid == init) {
            return Ok(Self { init, processes });
        }
        Err(WorkloadError::new(format!("process {init} ended while it was looked at")))
    }

    /// The process `pid`, if it is one of them.
    #[must_use]
    pub fn get(&self, pid: u32) -> Option<&Process> {
        let index = self.processes.binary_search_by_key(&pid, |process| process.pid).ok()?;
        self.processes.get(index)
    }
}

/// Adds everything below `init` that is there now.
fn walk(init: u32, found: &mut BTreeSet<u32>) -> io::Result<()> {
    // Not every kernel says the children of a thread (CONFIG_PROC_CHILDREN).
    if procfs::read(init, &format!("task/{init}/children")).is_none() {
        return walk_all(init, found);
    }
    let mut next = vec![init];
    let mut seen = BTreeSet::new();
    while let Some(pid) = next.pop() {
        if !seen.insert(pid) {
            continue;
        }
        let threads = match procfs::numbers(&procfs::path(pid, "task")) {
            Ok(threads) => threads,
            Err(error) if pid != init && procfs::is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        found.insert(pid);
        for thread in threads {
            let children = procfs::read(pid, &format!("task/{thread}/children"));
            let children = children.unwrap_or_default();
            next.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    Ok(())
}

/// The same by every process's parent.
fn walk_all(init: u32, found: &mut BTreeSet<u32>) -> io::Result<()> {
    std::fs::symlink_metadata(procfs::path(init, "status"))?;
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in procfs::numbers(&"/proc".into())? {
        if let Some(status) = procfs::read(pid, "status") {
            children.entry(Status::parse(&status).parent).or_default().push(pid);
        }
    }
    let mut next = vec![init];
    while let Some(pid) = next.pop() {
        found.insert(pid);
        next.extend(children.remove(&pid).unwrap_or_default());
    }
    Ok(())
}

/// A process of a tree that is in the pid namespace `depth` levels down, ours
/// being the first.
fn process(pid: u32, depth: usize) -> Option<Process> {
    let status = Status::parse(&procfs::read(pid, "status")?);
    let threads = procfs::numbers(&procfs::path(pid, "task")).ok()?;
    let tracer = threads.iter().find_map(|thread| {
        let tracer = if *thread == pid {
            status.tracer
        } else {
            Status::parse(&procfs::read(pid, &format!("task/{thread}/status"))?).tracer
        };
        (tracer != 0).then_some(tracer)
    });
    Some(Process {
        pid,
        command: status.name,
        threads,
        resident_bytes: status.resident_bytes,
        tracer,
        zombie: status.state == 'Z',
        session_outside: depth > 0 && status.sessions.get(depth - 1) == Some(&0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_walking_find_a_child_and_its_threads_are_counted() {
        let me = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let by_children = Tree::read(me).unwrap();
        let mut by_parents = BTreeSet::new();
        walk_all(me, &mut by_parents).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(by_children.get(child.id()).is_some());
        assert!(by_parents.contains(&child.id()));
        let mine = by_children.get(me).unwrap();
        assert!(mine.threads.contains(&me) && mine.threads.len() > 1, "{mine:?}");
        assert!(mine.resident_bytes > 0);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(Tree::read(u32::MAX).unwrap_err().message.contains("not there"));
    }
}
