//! Precopy of a workload that makes copies of what has changed: each is sent while
//! the workload runs, part by part as it comes to be.

use std::time::{Duration, Instant};

use super::precopy::{ASSUMED_RATE, no_lanes};
use super::{Interrupt, Run, data_bytes, send_pages};
use crate::migration::failpoint;
use crate::migration::link::{LaneTotals, PageLanes};
use crate::migration::phase::{MigrationError, Round, Tally};
use crate::migration::policy::copies::{CopyStats, making, next_copy};
use crate::migration::policy::{Step, approximate, progressed};
use crate::pages::PageSet;
use crate::units::PAGE_SIZE;
use crate::workload::{Ahead, Kind};

/// What the copies carry from one to the next.
struct Copies {
    number: u32,
    /// Pages in the smallest so far.
    smallest: Option<u64>,
    idle: u32,
    rate: f64,
}

impl Run {
    /// Sends copies until one more would bring nothing.
    pub(super) async fn copies(&mut self, interrupt: &mut Interrupt) -> Result<(), MigrationError> {
        let mut copies = Copies { number: 0, smallest: None, idle: 0, rate: ASSUMED_RATE };
        loop {
            copies.number += 1;
            let pages = self.copy(&mut copies, interrupt).await?;
            failpoint::reach(format_args!("source-precopy-round"));
            let stats = self.copy_stats(&mut copies, pages);
            let limit = self.context().request.max_downtime;
            let step = next_copy(&stats, limit);
            tracing::debug!(?stats, ?step, "precopy round");
            match (step, limit) {
                (Step::Stop, _) => return Ok(()),
                (Step::GiveUp { predicted }, Some(allowed)) => {
                    let rounds = copies.number;
                    return Err(MigrationError::NotConverging { rounds, predicted, allowed });
                }
                (Step::GiveUp { .. }, None) | (Step::SendCold | Step::SendAll, _) => {}
            }
            // It may have no room for another.
            if let Ahead::Not(why) = self.workload.ahead() {
                tracing::info!(why, "no further precopy round");
                return Ok(());
            }
        }
    }

    /// Sends one copy; how many pages were in it.
    async fn copy(
        &mut self,
        copies: &mut Copies,
        interrupt: &mut Interrupt,
    ) -> Result<u64, MigrationError> {
        let started = Instant::now();
        let before = self.record.tally.lanes.clone();
        let populated = self.workload.terminal().populated_bytes();
        self.record.context.progress.send_modify(|p| {
            p.round = copies.number;
            p.remaining = if copies.number == 1 { populated } else { 0 };
        });
        let (mut queued, mut sending) = (0, Duration::ZERO);
        loop {
            let next = async { Ok::<_, MigrationError>(self.workload.copy_ahead().await?) };
            let Some(part) = interrupt.guard(next).await? else { break };
            let begun = Instant::now();
            let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
            self.record.tally.lanes = interrupt.guard(send(lanes, &part)).await?;
            sending += begun.elapsed();
            failpoint::reach(format_args!("source-precopy-chunk"));
            let sent = part.count() * PAGE_SIZE;
            queued += sent;
            let seconds = started.elapsed().as_secs_f64();
            self.record.context.progress.send_modify(|p| {
                p.sent += sent;
                p.remaining = p.remaining.saturating_sub(sent);
                p.rate = approximate(queued) / seconds.max(1e-3);
            });
        }
        // Without the pages of earlier copies that are of no use any more.
        let pages = self.record.tally.lanes.data_pages.saturating_sub(before.data_pages);
        let bytes = data_bytes(&before, &self.record.tally.lanes);
        if bytes > 1 << 20 {
            copies.rate = approximate(bytes) / sending.as_secs_f64().max(1e-6);
        }
        self.record.tally.followed_by(pages);
        let took = started.elapsed();
        self.record.tally.rounds.push(Round { pages, bytes, took, dirty_after: 0 });
        Ok(pages)
    }

    fn copy_stats(&mut self, copies: &mut Copies, pages: u64) -> CopyStats {
        copies.idle = if progressed(pages, copies.smallest) { 0 } else { copies.idle + 1 };
        copies.smallest = Some(copies.smallest.map_or(pages, |least| least.min(pages)));
        let all = self.record.tally.rounds.first().map_or(0, |round| round.pages);
        let stats = CopyStats {
            round: copies.number,
            pages,
            idle: copies.idle,
            rate: copies.rate,
            fixed_cost: self.context().fixed_cost.get() + making(all),
        };
        let predicted = stats.predicted_downtime();
        self.record.tally.predicted = predicted;
        self.record.context.progress.send_modify(|p| p.predicted = predicted);
        stats
    }
}

async fn send(lanes: &mut dyn PageLanes, part: &PageSet) -> Result<LaneTotals, MigrationError> {
    send_pages(lanes, part).await?;
    Ok(lanes.flush().await?)
}

/// What of a stop was spent on making memory anew at the destination, which depends on
/// how much there is.
pub(super) fn made_anew(kind: Kind, tally: &Tally) -> Duration {
    match kind {
        Kind::Vm => Duration::ZERO,
        Kind::Process | Kind::Container => {
            let sent = tally.lanes.data_pages.saturating_sub(tally.file_pages);
            making(tally.rounds.first().map_or(sent, |round| round.pages))
        }
    }
}
