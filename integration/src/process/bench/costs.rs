//! What daemons, keepers and CRIU take while something moves: looked at all the time,
//! because most of them end with the move.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::daemon::Daemon;
use crate::leaks::status_kib;
use crate::process::left;

/// Not more often: to look takes some of the time that is being measured.
const PAUSE: Duration = Duration::from_millis(100);

/// The most that was seen in any move.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    memory_kib: u64,
    written: u64,
}

/// A host: its daemon's process, and where its state is.
type Host = (u32, PathBuf);

impl Costs {
    /// Watches `daemons` during `work`.
    pub fn watch<T>(
        &mut self,
        daemons: [&Daemon; 2],
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let mut hosts: Vec<Host> = Vec::new();
        for daemon in daemons {
            hosts.push((daemon.pid()?, daemon.state_dir().to_owned()));
        }
        let before: BTreeMap<u32, u64> =
            hosts.iter().flat_map(written_by).collect::<BTreeMap<_, _>>();
        let done = AtomicBool::new(false);
        let (result, (memory, after)) = std::thread::scope(|scope| {
            let watching = scope.spawn(|| watch(&hosts, &done));
            let result = work();
            done.store(true, Ordering::Release);
            let seen = watching.join().map_err(|_| anyhow!("the watcher panicked"));
            (result, seen.unwrap_or_default())
        });
        let new = |(pid, bytes): (&u32, &u64)| {
            bytes.saturating_sub(before.get(pid).copied().unwrap_or(0))
        };
        self.memory_kib = self.memory_kib.max(memory);
        self.written = self.written.max(after.iter().map(new).sum());
        result
    }

    pub fn own_memory_mib(self) -> f64 {
        mib(self.memory_kib << 10)
    }

    pub fn written_mib(self) -> f64 {
        mib(self.written)
    }
}

fn mib(bytes: u64) -> f64 {
    let kib = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
    (f64::from(kib) / 1024.0 * 1000.0).round() / 1000.0
}

/// The most memory (KiB) of any host, and what each process has written (bytes).
fn watch(hosts: &[Host], done: &AtomicBool) -> (u64, BTreeMap<u32, u64>) {
    let (mut memory, mut written) = (0, BTreeMap::new());
    loop {
        let last = done.load(Ordering::Acquire);
        for host in hosts {
            memory = memory.max(own_memory_kib(host));
            written.extend(written_by(host));
        }
        if last {
            return (memory, written);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Daemon and keepers, each at its highest.
fn own_memory_kib((daemon, state_dir): &Host) -> u64 {
    let keepers = left::keepers(state_dir);
    let pids = keepers.iter().map(|keeper| keeper.pid).chain([*daemon]);
    pids.filter_map(|pid| status_kib(pid, "VmHWM:").ok()).sum()
}

/// What daemon, keepers and CRIU have had written to a disk (proc(5), `write_bytes`).
fn written_by((daemon, state_dir): &Host) -> Vec<(u32, u64)> {
    let keepers = left::keepers(state_dir);
    let pids = keepers.iter().flat_map(|keeper| [Some(keeper.pid), keeper.criu()]).flatten();
    pids.chain([*daemon]).filter_map(|pid| Some((pid, write_bytes(pid)?))).collect()
}

fn write_bytes(pid: u32) -> Option<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.parse().ok()
}
