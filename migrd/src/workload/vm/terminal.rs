//! A VM's serial port and figures, as anybody may ask for them.

use std::path::Path;
use std::sync::{Arc, Weak};

use async_trait::async_trait;

use super::child::{Child, SERIAL_LOG};
use super::told;
use crate::workload::logged::Logged;
use crate::workload::{Footprint, Output, Terminal, WorkloadError};

/// The serial port of one VM, alive or not.
pub(super) struct SerialPort {
    log: Logged,
    /// The terminal must not keep a child's memory when its VM was dropped.
    child: Weak<Child>,
}

impl SerialPort {
    /// Of a VM whose child lives.
    pub(super) fn open(child: &Arc<Child>) -> Result<Self, WorkloadError> {
        let log = child.log();
        let log = Logged::open(&log.path, log.written)?;
        Ok(Self { log, child: Arc::downgrade(child) })
    }

    /// Of a VM whose child is gone: what it left behind.
    pub(super) fn left_behind(directory: &Path) -> Result<Self, WorkloadError> {
        let log = Logged::left_behind(&directory.join(SERIAL_LOG))?;
        Ok(Self { log, child: Weak::new() })
    }

    /// Of a VM whose log cannot be read.
    pub(super) fn silent() -> Self {
        Self { log: Logged::silent(), child: Weak::new() }
    }
}

#[async_trait]
impl Terminal for SerialPort {
    fn read(&self, from: u64, max: usize) -> Result<Vec<Output>, WorkloadError> {
        self.log.read(from, max)
    }

    fn end(&self) -> u64 {
        self.log.end()
    }

    async fn more_than(&self, seen: u64) {
        self.log.more_than(seen).await;
    }

    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError> {
        let child = self.child.upgrade();
        let child =
            child.ok_or_else(|| WorkloadError::new("it has ended, so nobody reads that"))?;
        child.console_input(bytes.to_vec()).await.map_err(told("type on its console"))
    }

    fn populated_bytes(&self) -> u64 {
        self.child.upgrade().map_or(0, |child| child.mapping().populated_bytes())
    }

    async fn footprint(&self) -> Result<Footprint, WorkloadError> {
        let log_bytes = self.log.end();
        let Some(child) = self.child.upgrade() else {
            return Ok(Footprint { log_bytes, ..Footprint::default() });
        };
        let stats = child.stats().await.map_err(told("ask its VMM"))?;
        Ok(Footprint {
            pid: child.pid(),
            processes: 0,
            populated_bytes: child.mapping().populated_bytes(),
            overhead_bytes: overhead(child.pid()),
            log_bytes,
            log_dropped_bytes: stats.console_dropped,
        })
    }
}

/// Resident memory of a process that is not shared memory, in bytes
/// (proc(5), `RssAnon` and `RssFile` of `/proc/PID/status`).
fn overhead(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    (kib("RssAnon:") + kib("RssFile:")) * 1024
}
