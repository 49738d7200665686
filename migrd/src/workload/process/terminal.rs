//! A tree's output and input, and its figures, as anybody may ask for them.

use std::path::Path;
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use migr_proto::v1::keeper_request::Request;

use super::keeper::{Keeper, OUTPUT_LOG};
use super::told;
use crate::workload::logged::Logged;
use crate::workload::{Footprint, Output, Terminal, WorkloadError};

/// Standard input and output of one tree, alive or not.
pub(super) struct Stdio {
    log: Logged,
    keeper: Weak<Keeper>,
}

impl Stdio {
    /// Of a tree whose keeper lives.
    pub(super) fn open(directory: &Path, keeper: &Arc<Keeper>) -> Result<Self, WorkloadError> {
        let log = Logged::open(&directory.join(OUTPUT_LOG), keeper.written())?;
        Ok(Self { log, keeper: Arc::downgrade(keeper) })
    }

    /// Of a tree that is gone: what it left behind.
    pub(super) fn left_behind(directory: &Path) -> Self {
        let log = Logged::left_behind(&directory.join(OUTPUT_LOG));
        let log = log.unwrap_or_else(|error| {
            tracing::warn!(%error, "the output of a process tree is lost");
            Logged::silent()
        });
        Self { log, keeper: Weak::new() }
    }
}

#[async_trait]
impl Terminal for Stdio {
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
        let keeper = self.keeper.upgrade();
        let keeper =
            keeper.ok_or_else(|| WorkloadError::new("it has ended, so nobody reads that"))?;
        let input = Request::Input(bytes.to_vec().into());
        keeper.done(input).await.map_err(told("write to its standard input"))
    }

    fn populated_bytes(&self) -> u64 {
        0
    }

    async fn footprint(&self) -> Result<Footprint, WorkloadError> {
        let log_bytes = self.log.end();
        let Some(keeper) = self.keeper.upgrade() else {
            return Ok(Footprint { log_bytes, ..Footprint::default() });
        };
        let stats = keeper.stats().await.map_err(told("ask its keeper"))?;
        Ok(Footprint {
            pid: keeper.init(),
            populated_bytes: stats.resident_bytes,
            processes: stats.processes,
            overhead_bytes: 0,
            log_bytes,
            log_dropped_bytes: stats.output_dropped,
        })
    }
}
