//! A VM's serial port and figures, as anybody may ask for them.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use tokio::sync::watch;

use super::child::{Child, SERIAL_LOG};
use super::serial_log::Reader;
use super::{failed, told};
use crate::workload::{Footprint, Output, Terminal, WorkloadError};

/// The serial port of one VM, alive or not.
pub(super) struct SerialPort {
    /// `None` for a log that cannot be read.
    reader: Option<Mutex<Reader>>,
    /// Changes with every write to the log; closed when the child is gone.
    written: watch::Receiver<u64>,
    /// The terminal must not keep a child's memory when its VM was dropped.
    child: Weak<Child>,
}

impl SerialPort {
    /// Of a VM whose child lives.
    pub(super) fn open(child: &Arc<Child>) -> Result<Self, WorkloadError> {
        let log = child.log();
        let file = File::open(&log.path).map_err(failed("open the serial log"))?;
        let reader = Reader::open(file).map_err(failed("read the serial log"))?;
        let child = Arc::downgrade(child);
        Ok(Self { reader: Some(Mutex::new(reader)), written: log.written, child })
    }

    /// Of a VM whose child is gone: what it left behind.
    pub(super) fn left_behind(directory: &Path) -> Result<Self, WorkloadError> {
        let file = File::open(directory.join(SERIAL_LOG)).map_err(failed("open the serial log"))?;
        let reader = Reader::open(file).map_err(failed("read the serial log"))?;
        let (_, written) = watch::channel(0);
        Ok(Self { reader: Some(Mutex::new(reader)), written, child: Weak::new() })
    }

    /// Of a VM whose log cannot be read.
    pub(super) fn silent() -> Self {
        let (_, written) = watch::channel(0);
        Self { reader: None, written, child: Weak::new() }
    }

    fn output_so_far(&self) -> u64 {
        let Some(reader) = &self.reader else { return 0 };
        reader.lock().unwrap_or_else(PoisonError::into_inner).output().unwrap_or(0)
    }
}

#[async_trait]
impl Terminal for SerialPort {
    fn read(&self, from: u64, max: usize) -> Result<Vec<Output>, WorkloadError> {
        let Some(reader) = &self.reader else { return Ok(Vec::new()) };
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = reader.read_output(from, max).map_err(failed("read the serial log"))?;
        Ok(entries
            .into_iter()
            .filter(|entry| !entry.data.is_empty())
            .map(|entry| Output {
                offset: entry.offset,
                data: entry.data,
                line_unix_ns: i64::try_from(entry.line_unix_ns).unwrap_or(i64::MAX),
                starts_line: entry.starts_line,
            })
            .collect())
    }

    fn end(&self) -> u64 {
        self.output_so_far()
    }

    async fn more_than(&self, seen: u64) {
        let mut written = self.written.clone();
        loop {
            written.mark_unchanged();
            if self.output_so_far() > seen {
                return;
            }
            if written.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
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
        let log_bytes = self.output_so_far();
        let Some(child) = self.child.upgrade() else {
            return Ok(Footprint { log_bytes, ..Footprint::default() });
        };
        let stats = child.stats().await.map_err(told("ask its VMM"))?;
        Ok(Footprint {
            pid: child.pid(),
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
