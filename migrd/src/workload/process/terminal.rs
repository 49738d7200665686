//! A tree's input, and its figures, as anybody may ask for them.

use async_trait::async_trait;
use migr_proto::v1::keeper_request::Request;

use super::keeper::Keeper;
use super::told;
use crate::workload::logged::{Logged, Writes};
use crate::workload::{Footprint, WorkloadError};

/// Standard input and output of one tree, alive or not.
pub(super) type Stdio = Logged<Keeper>;

#[async_trait]
impl Writes for Keeper {
    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError> {
        let input = Request::Input(bytes.to_vec().into());
        self.done(input).await.map_err(told("write to its standard input"))
    }

    fn populated_bytes(&self) -> u64 {
        0
    }

    async fn footprint(&self) -> Result<Footprint, WorkloadError> {
        let stats = self.stats().await.map_err(told("ask its keeper"))?;
        Ok(Footprint {
            pid: self.init(),
            populated_bytes: stats.resident_bytes,
            processes: stats.processes,
            overhead_bytes: 0,
            log_bytes: 0,
            log_dropped_bytes: stats.output_dropped,
        })
    }
}
