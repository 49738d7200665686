//! What process trees leave behind: keepers, cgroups, directories.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// A process that keeps a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keeper {
    /// Its number.
    pub pid: u32,
    /// The cgroup of its tree.
    pub cgroup: PathBuf,
}

impl Keeper {
    /// The processes of its tree.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn processes(&self) -> Result<Vec<u32>> {
        numbers(&self.cgroup.join("cgroup.procs"))
    }

    /// The threads of its tree.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn threads(&self) -> Result<Vec<u32>> {
        numbers(&self.cgroup.join("cgroup.threads"))
    }

    /// The CRIU that it runs, if it runs one: the leader of a session, as the helpers
    /// are not that CRIU has for a moment and makes its siblings.
    #[must_use]
    pub fn criu(&self) -> Option<u32> {
        self.runs_criu(false)
    }

    /// The CRIU that has a process of its tree in its hand (proc(5), `TracerPid`).
    #[must_use]
    pub fn criu_at_work(&self) -> Option<u32> {
        let criu = self.criu()?;
        let (held, _) = self.held_by(criu).ok()?;
        (held > 0).then_some(criu)
    }

    /// How many processes of its tree that CRIU has in its hand, and of how many.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn held_by(&self, criu: u32) -> Result<(usize, usize)> {
        let tracer = format!("TracerPid:\t{criu}");
        let processes = self.processes()?;
        let held = processes.iter().filter(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line == tracer)
        });
        Ok((held.count(), processes.len()))
    }

    /// The CRIU that brings memory to a tree that runs, if there is one.
    #[must_use]
    pub fn lazy_pages(&self) -> Option<u32> {
        self.runs_criu(true)
    }

    fn runs_criu(&self, brings_memory: bool) -> Option<u32> {
        processes().into_iter().find(|pid| {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.trim_end() == "criu"
                && line.contains("lazy-pages") == brings_memory
                && stat(*pid, PARENT) == Some(self.pid)
                && stat(*pid, SESSION) == Some(*pid)
        })
    }
}

/// Places of fields of `/proc/PID/stat` behind the command (proc(5)).
const PARENT: usize = 1;
const SESSION: usize = 3;

/// A field of `/proc/PID/stat`; none when the process is gone.
fn stat(pid: u32, field: usize) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command may hold spaces and parentheses.
    let (_, after) = stat.rsplit_once(") ")?;
    after.split(' ').nth(field)?.parse().ok()
}

fn numbers(file: &Path) -> Result<Vec<u32>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The keepers that were started with `state_dir`, whoever their parent is by now:
/// what they are told names a directory in it.
#[must_use]
pub fn keepers(state_dir: &Path) -> Vec<Keeper> {
    let all: Vec<_> = processes().into_iter().filter_map(|pid| keeper(pid, state_dir)).collect();
    // What one has just forked looks like it until it becomes something else.
    let is_one = |pid: Option<u32>| all.iter().any(|keeper| Some(keeper.pid) == pid);
    all.iter().filter(|keeper| !is_one(stat(keeper.pid, PARENT))).cloned().collect()
}

fn keeper(pid: u32, state_dir: &Path) -> Option<Keeper> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let after = |name: &str| {
        let at = words.iter().position(|word| word == name)?;
        words.get(at + 1).map(|word| PathBuf::from(word.as_ref()))
    };
    let ours = words.get(1)? == "process-keeper" && after("--root")?.starts_with(state_dir);
    ours.then_some(())?;
    Some(Keeper { pid, cgroup: after("--cgroup")? })
}

/// Kills keepers and the trees they keep, as the loss of the whole host would, and
/// waits until they are gone.
///
/// # Errors
/// When one stays.
pub fn kill_trees(state_dir: &Path) -> Result<()> {
    let all = keepers(state_dir);
    for keeper in &all {
        match kill(Pid::from_raw(i32::try_from(keeper.pid)?), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).context("kill a keeper"),
        }
    }
    wait::until("killed keepers to go", || Ok(keepers(state_dir).is_empty().then_some(())))?;
    for Keeper { cgroup, .. } in all {
        wait::until("the cgroup of a killed tree to go", || {
            // One that has no processes yet has no cgroup, either.
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            let _ = fs::remove_dir(&cgroup);
            Ok((!cgroup.exists()).then_some(()))
        })?;
    }
    Ok(())
}

/// What of process trees is left of a host that has none.
///
/// # Errors
/// When it can't be looked for.
pub fn what_is_left(state_dir: &Path, host_id: &str) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let keepers = keepers(state_dir);
    if !keepers.is_empty() {
        left.push(format!("keepers {keepers:?}"));
    }
    let of_host = format!("migr-{}-", host_id.get(..8).unwrap_or(host_id));
    for root in cgroup_roots()? {
        let entries = fs::read_dir(&root).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        left.extend(names.filter(|n| n.starts_with(&of_host)).map(|n| format!("cgroup {n}")));
    }
    for parent in ["processes", "containers", "runc", "rootfs"] {
        let places = fs::read_dir(state_dir.join(parent)).into_iter().flatten().flatten();
        left.extend(places.map(|place| format!("directory {}", place.path().display())));
    }
    Ok(left)
}

/// Where cgroups are mounted: v2, and the v1 that runc uses where there is any.
fn cgroup_roots() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let roots = words.filter(|words| matches!(words.get(2), Some(&"cgroup2" | &"cgroup")));
    Ok(roots.filter_map(|words| words.get(1).map(PathBuf::from)).collect())
}
