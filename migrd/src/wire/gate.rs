//! Lets the lanes of accepted migrations in, and no others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::receive::{LaneDirectory, Receiver};
use crate::migration::link::{Intake, LaneGate};
use crate::units::MigrationId;
use crate::workload::{ChunkSink, StreamSpec};

/// How long batches may still be on their way after the source says that it
/// has sent them all, and knows that they were put in place.
const LAST_BATCHES: Duration = Duration::from_secs(10);

impl LaneGate for LaneDirectory {
    fn open(
        &self,
        migration: MigrationId,
        streams: &[StreamSpec],
        sink: Arc<dyn ChunkSink>,
        lanes: u32,
    ) -> Arc<dyn Intake> {
        let lanes = usize::try_from(lanes).unwrap_or(1);
        let receiver = Arc::new(Receiver::new(streams, sink, lanes));
        if !self.insert(migration, receiver.clone()) {
            receiver.close("that migration has its lanes already");
        }
        Arc::new(Lanes { directory: self.clone(), migration, receiver })
    }
}

/// The lanes of one migration; no more are let in when it is dropped.
struct Lanes {
    directory: LaneDirectory,
    migration: MigrationId,
    receiver: Arc<Receiver>,
}

#[async_trait]
impl Intake for Lanes {
    async fn complete(&self, batches: &[u64]) -> Result<(), String> {
        let done = self.receiver.wait_applied(batches, LAST_BATCHES).await;
        done.map_err(|e| e.to_string())
    }

    fn last_activity(&self) -> Instant {
        self.receiver.last_activity()
    }

    fn close(&self, reason: &str) {
        self.receiver.close(reason);
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.directory.remove(self.migration);
    }
}
