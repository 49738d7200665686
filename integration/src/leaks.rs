//! What daemons use, and what they leave behind.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use crate::daemon::Daemon;
use crate::process::left;
use crate::wait;

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Open file descriptors.
    pub fds: usize,
    /// Of them, memory files.
    pub memfds: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory of its own (not shared, not of files), in KiB.
    pub rss_kib: u64,
    /// VM processes it has.
    pub vms: usize,
}

/// What `daemon` uses now.
///
/// # Errors
/// When it does not run.
pub fn usage(daemon: &Daemon) -> Result<Usage> {
    let pid = daemon.pid()?;
    let links = links(pid);
    let memfds = links.iter().filter(|link| link.starts_with("/memfd:")).count();
    let threads = fs::read_dir(format!("/proc/{pid}/task"))?.count();
    Ok(Usage {
        fds: links.len(),
        memfds,
        threads,
        rss_kib: status_kib(pid, "RssAnon:")? + status_kib(pid, "RssFile:")?,
        vms: vm_processes(daemon.state_dir()).len(),
    })
}

/// A figure of `/proc/PID/status`, in KiB.
///
/// # Errors
/// When the process is gone.
pub fn status_kib(pid: u32, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).with_context(|| format!("no {field} of process {pid}"))
}

/// Where the descriptors of a process lead; none if it is gone.
fn links(pid: u32) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}

/// The VM processes that were started with `state_dir`, whoever their parent is
/// by now: their messages go to a file in it.
#[must_use]
pub fn vm_processes(state_dir: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|pid| is_vm_of(*pid, state_dir)).collect()
}

/// Kills the VM processes that were started with `state_dir`, as the loss of the
/// whole host would, and waits until they are gone.
///
/// # Errors
/// When one stays.
pub fn kill_vms(state_dir: &Path) -> Result<()> {
    for pid in vm_processes(state_dir) {
        match kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).context("kill a VM process"),
        }
    }
    wait::until("killed VM processes to go", || {
        Ok(vm_processes(state_dir).is_empty().then_some(()))
    })
}

fn is_vm_of(pid: u32, state_dir: &Path) -> bool {
    let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let vmm = command.split(|byte| *byte == 0).nth(1) == Some(b"vmm-child");
    vmm && fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|link| link.starts_with(state_dir))
}

/// Every file and directory below a directory, but for the log files of
/// daemons, by its relative path.
#[must_use]
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            // A link may lead anywhere.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path.clone());
            }
            found.extend(path.strip_prefix(directory).map(Path::to_path_buf));
        }
    }
    found.sort();
    found
}

/// Checks that a daemon without workloads has no process, memory file,
/// reservation or file of one. What is cleaned up in the background gets time.
///
/// # Errors
/// Saying what is left.
pub fn expect_nothing_left(daemon: &Daemon) -> Result<()> {
    let mut left = String::new();
    let clean = wait::until("nothing to be left", || {
        left = what_is_left(daemon)?;
        Ok(left.is_empty().then_some(()))
    });
    clean.with_context(|| format!("left at {}: {left}", daemon.address()))
}

fn what_is_left(daemon: &Daemon) -> Result<String> {
    let mut left = Vec::new();
    let vms = vm_processes(daemon.state_dir());
    if !vms.is_empty() {
        left.push(format!("VM processes {vms:?}"));
    }
    let usage = usage(daemon)?;
    if usage.memfds > 0 {
        left.push(format!("{} memory files", usage.memfds));
    }
    let hosts = daemon.ask(&["hosts"])?;
    let host = &hosts["hosts"][0];
    ensure!(host["host_id"].is_string(), "hosts printed {hosts}");
    if host["memory_reserved_bytes"] != 0 {
        left.push(format!("{} reserved bytes", host["memory_reserved_bytes"]));
    }
    let workloads = daemon.workloads()?;
    if !workloads.is_empty() {
        left.push(format!("workloads {workloads:?}"));
    }
    let of_vms = ["control.sock", "serial.log", "vmm.log"];
    let files = files_below(daemon.state_dir());
    let files = files.iter().filter(|path| of_vms.iter().any(|name| path.ends_with(name)));
    let files: Vec<_> = files.collect();
    let host_id = host["host_id"].as_str().unwrap_or_default();
    left.extend(left::what_is_left(daemon.state_dir(), host_id)?);
    if !files.is_empty() {
        left.push(format!("files {files:?}"));
    }
    Ok(left.join(", "))
}
