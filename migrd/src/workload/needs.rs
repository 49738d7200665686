//! What a workload has to find on a host that it goes to.

use std::sync::Arc;

use super::WorkloadError;

/// What a workload has to find on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// As its kind writes that down; empty: nothing.
    pub written: Vec<u8>,
    /// How much of files such a host reads, in bytes, to see whether it has that.
    pub reads: u64,
}

impl Needs {
    /// How much longer than others a host may take to see whether it has that: a slow
    /// disk gives 64 MiB a second.
    #[must_use]
    pub fn patience(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.reads >> 26)
    }
}

/// Says what a workload needs. Blocks as long as it takes to read as much of files as
/// it says that others have to.
pub type Needing = Arc<dyn Fn() -> Needs + Send + Sync>;

/// Has it said beside what is asynchronous.
///
/// # Errors
/// When it panics.
pub async fn needed(needing: Needing) -> Result<Needs, WorkloadError> {
    let said = tokio::task::spawn_blocking(move || needing()).await;
    said.map_err(|e| WorkloadError::caused("looking at the files that it needs failed", e))
}
