//! What a workload puts out and costs, asked for while a migration may hold it.

use async_trait::async_trait;

use super::WorkloadError;

/// What can be asked of a workload while a migration holds it: its output, its
/// figures, and the way in for its input.
#[async_trait]
pub trait Terminal: Send + Sync {
    /// Output from the logical byte offset `from` on, at most about `max` bytes.
    /// Older output than is kept is left out.
    fn read(&self, from: u64, max: usize) -> Result<Vec<Output>, WorkloadError>;

    /// Where its output ends now, in bytes.
    fn end(&self) -> u64;

    /// Resolves when there may be more output than when `seen` was its end.
    async fn more_than(&self, seen: u64);

    /// Types `bytes`.
    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError>;

    /// Memory it has touched, in bytes; quick.
    fn populated_bytes(&self) -> u64;

    /// What it costs now.
    async fn footprint(&self) -> Result<Footprint, WorkloadError>;
}

/// Part of one line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Where `data` stands in everything the workload ever put out, in bytes.
    pub offset: u64,
    /// The bytes, of one line.
    pub data: Vec<u8>,
    /// `CLOCK_REALTIME` in ns at the first byte of the line.
    pub line_unix_ns: i64,
    /// `data` begins a line.
    pub starts_line: bool,
}

/// Figures of a workload, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Process that runs it, and of a process tree its init; 0 if none does.
    pub pid: u32,
    /// Processes of a process tree; 0 for other kinds.
    pub processes: u32,
    /// Memory it has touched, in bytes.
    pub populated_bytes: u64,
    /// Memory that running it costs beyond its own, in bytes.
    pub overhead_bytes: u64,
    /// Output so far, in bytes.
    pub log_bytes: u64,
    /// Output that was lost, in bytes.
    pub log_dropped_bytes: u64,
}
