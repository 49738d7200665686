//! A VM's serial port and figures, as anybody may ask for them.

use async_trait::async_trait;

use super::child::Child;
use super::told;
use crate::workload::logged::{Logged, Writes};
use crate::workload::{Footprint, WorkloadError};

/// The serial port of one VM, alive or not.
pub(super) type SerialPort = Logged<Child>;

#[async_trait]
impl Writes for Child {
    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError> {
        self.console_input(bytes.to_vec()).await.map_err(told("type on its console"))
    }

    fn populated_bytes(&self) -> u64 {
        self.mapping().populated_bytes()
    }

    async fn footprint(&self) -> Result<Footprint, WorkloadError> {
        let stats = self.stats().await.map_err(told("ask its VMM"))?;
        Ok(Footprint {
            pid: self.pid(),
            processes: 0,
            populated_bytes: self.mapping().populated_bytes(),
            overhead_bytes: overhead(self.pid()),
            log_bytes: 0,
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
