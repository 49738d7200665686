//! Files that go ahead of a stop, in whatever mode memory moves.

use super::precopy::no_lanes;
use super::{Aborted, Run, send_pages};
use crate::migration::failpoint;
use crate::migration::phase::{MigrationError, Phase};
use crate::units::PAGE_SIZE;

impl Run {
    /// Sends what the workload has on disks and sends while it runs.
    pub(super) async fn send_files(mut self) -> Result<Self, Aborted> {
        let sent = self.files().await;
        let (run, ()) = self.or_abort(sent).await?;
        Ok(run)
    }

    async fn files(&mut self) -> Result<(), MigrationError> {
        let mut interrupt = self.interrupt();
        loop {
            let next = async { Ok::<_, MigrationError>(self.workload.files_ahead().await?) };
            let Some(part) = interrupt.guard(next).await? else { break };
            if self.phase < Phase::Precopy {
                // What was begun is to be forgotten when it comes to nothing.
                self.tracking = true;
                self.enter(Phase::Precopy);
            }
            let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
            interrupt.guard(send_pages(lanes, &part)).await?;
            failpoint::reach(format_args!("source-files-chunk"));
            let queued = part.count() * PAGE_SIZE;
            self.record.context.progress.send_modify(|progress| progress.sent += queued);
        }
        if self.phase < Phase::Precopy {
            return Ok(());
        }
        // Later pages must not overtake them.
        let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
        let flushed = async { Ok::<_, MigrationError>(lanes.flush().await?) };
        let totals = interrupt.guard(flushed).await?;
        self.record.tally.file_pages = totals.data_pages;
        self.record.tally.lanes = totals;
        Ok(())
    }
}
