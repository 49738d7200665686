//! Precopy: rounds of dirty pages while the workload runs.
//!
//! Tracking costs the workload only where pages are cleared, so pages that will
//! have to be sent at the stop anyway are left uncleared: the hot set, found by
//! clearing one page in 64, waiting a little and looking again. The first round
//! sends them all the same: a page that has memory at the destination is put in
//! place several times faster at the stop than one that has none.

use std::time::{Duration, Instant};

use super::stopped::Stopped;
use super::{Aborted, Interrupt, Run, data_bytes};
use crate::migration::failpoint;
use crate::migration::link::{LaneTotals, PageLanes};
use crate::migration::phase::{MigrationError, Phase, Round};
use crate::migration::policy::{
    Budget, DEFAULT_MAX_DOWNTIME, RoundStats, Step, approximate, hot, next_step, predict,
    progressed, sample,
};
use crate::pages::{PageBitmap, PageSet};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{Kind, StreamKey, Workload};

/// How long the sampled pages are left alone before looking.
const SAMPLE_WAIT: Duration = Duration::from_millis(20);
/// Pages that are cleared together, right before they are queued: 16 MiB.
const CLEAR_CHUNK: u64 = 4096;
/// Bytes a second assumed before anything was measured: 1 Gbit/s.
pub(super) const ASSUMED_RATE: f64 = 125e6;

/// What can be sent while the workload runs was sent.
pub(super) struct Copied(Run);

/// What one round sends.
struct Batch {
    pages: PageSet,
    /// Pages that are sent and stay dirty.
    uncleared: PageSet,
}

/// What the rounds carry from one to the next.
struct Rounds {
    hot: PageSet,
    best: Option<u64>,
    idle: u32,
    rate: f64,
    number: u32,
}

impl Copied {
    /// Nothing is sent before the stop.
    pub(super) fn nothing(mut run: Run) -> Self {
        let predicted = run.context().predicted;
        run.record.tally.predicted = predicted;
        run.record.context.progress.send_modify(|p| p.predicted = predicted);
        Self(run)
    }

    pub(super) async fn by_rounds(mut run: Run) -> Result<Self, Aborted> {
        run.enter(Phase::Precopy);
        let mut interrupt = run.interrupt();
        let tracked = run.workload.start_tracking().await;
        run.tracking = true;
        let (mut run, ()) = run.or_abort(tracked).await?;
        let done = run.rounds(&mut interrupt).await;
        let (run, ()) = run.or_abort(done).await?;
        Ok(Self(run))
    }

    /// Of a workload that makes copies of what has changed.
    pub(super) async fn by_copies(mut run: Run) -> Result<Self, Aborted> {
        run.enter(Phase::Precopy);
        let mut interrupt = run.interrupt();
        run.tracking = true;
        let done = run.copies(&mut interrupt).await;
        let (run, ()) = run.or_abort(done).await?;
        Ok(Self(run))
    }

    pub(super) async fn stop(self) -> Result<Stopped, Aborted> {
        Stopped::stop(self.0).await
    }
}

impl Run {
    /// Pages that need not be sent when `populated` are. What holds the images of a
    /// process tree is as long as they could become, which says nothing of its memory.
    pub(super) fn skipped(&self, populated: u64) -> u64 {
        match self.context().identity.kind {
            Kind::Process | Kind::Container => 0,
            Kind::Vm => {
                let streams = self.workload.streams();
                let all: u64 = streams.iter().map(|s| s.length / PAGE_SIZE).sum();
                all.saturating_sub(populated)
            }
        }
    }

    async fn rounds(&mut self, interrupt: &mut Interrupt) -> Result<(), MigrationError> {
        let mut pending = self.workload.dirty().await?;
        self.record.tally.skipped = self.skipped(pending.count());
        let mut rounds = Rounds {
            hot: find_hot(self.workload.as_mut(), &pending, interrupt).await?,
            best: None,
            idle: 0,
            rate: ASSUMED_RATE,
            number: 0,
        };
        let allowed = self.context().request.max_downtime;
        let budget = Budget { max_downtime: allowed.unwrap_or(DEFAULT_MAX_DOWNTIME) };
        let mut step = Step::SendCold;
        loop {
            let mut batch = Batch { pages: pending.clone(), uncleared: PageSet::default() };
            match step {
                Step::SendCold if rounds.number == 0 => batch.uncleared = rounds.hot.clone(),
                Step::SendCold => batch.pages.subtract(&rounds.hot),
                Step::SendAll => {}
                Step::Stop => return Ok(()),
                Step::GiveUp { predicted } => {
                    return Err(MigrationError::NotConverging {
                        rounds: rounds.number,
                        predicted,
                        allowed: budget.max_downtime,
                    });
                }
            }
            pending = self.round(&mut rounds, &batch, &pending, interrupt).await?;
            failpoint::reach(format_args!("source-precopy-round"));
            let stats = self.stats(&mut rounds, &pending);
            step = next_step(&stats, &budget);
            tracing::debug!(?stats, ?step, "precopy round");
        }
    }

    /// Sends `batch` and says what differs now.
    async fn round(
        &mut self,
        rounds: &mut Rounds,
        batch: &Batch,
        pending: &PageSet,
        interrupt: &mut Interrupt,
    ) -> Result<PageSet, MigrationError> {
        rounds.number += 1;
        let started = Instant::now();
        let before = self.record.tally.lanes.clone();
        let predicted = predict(pending.count(), rounds.rate, self.context().fixed_cost.get());
        self.record.context.progress.send_modify(|p| {
            p.round = rounds.number;
            p.remaining = pending.count() * PAGE_SIZE;
            p.predicted = predicted;
        });
        let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
        for (key, chunk) in chunks_of(&batch.pages) {
            let mut set = PageSet::default();
            set.set(key, chunk);
            let mut clean = set.clone();
            clean.subtract(&batch.uncleared);
            self.workload.clear(&clean).await?;
            interrupt.guard(super::send_pages(lanes, &set)).await?;
            failpoint::reach(format_args!("source-precopy-chunk"));
            let queued = set.count() * PAGE_SIZE;
            let seconds = started.elapsed().as_secs_f64();
            self.record.context.progress.send_modify(|p| {
                p.sent += queued;
                p.remaining = p.remaining.saturating_sub(queued);
                p.rate = approximate(p.sent) / seconds.max(1e-3);
            });
        }
        let after = interrupt.guard(flush(lanes)).await?;
        let took = started.elapsed();
        let dirty = self.workload.dirty().await?;
        let bytes = data_bytes(&before, &after);
        if bytes > 1 << 20 {
            rounds.rate = approximate(bytes) / took.as_secs_f64().max(1e-6);
        }
        let mut kept = pending.clone();
        kept.subtract(&batch.pages);
        kept.union(&batch.uncleared);
        let newly = dirty.count().saturating_sub(kept.count());
        self.record.tally.lanes = after;
        self.record.tally.rounds.push(Round {
            pages: batch.pages.count(),
            bytes,
            took,
            dirty_after: dirty.count(),
        });
        self.record.context.progress.send_modify(|p| {
            p.remaining = dirty.count() * PAGE_SIZE;
            p.rate = rounds.rate;
            p.dirty_rate = approximate(newly * PAGE_SIZE) / took.as_secs_f64().max(1e-6);
        });
        Ok(dirty)
    }

    fn stats(&mut self, rounds: &mut Rounds, pending: &PageSet) -> RoundStats {
        let count = pending.count();
        rounds.idle = if progressed(count, rounds.best) { 0 } else { rounds.idle + 1 };
        let last = self.record.tally.rounds.last();
        let mut still_hot = pending.clone();
        still_hot.intersect(&rounds.hot);
        let stats = RoundStats {
            round: rounds.number,
            sent_pages: last.map_or(0, |r| r.pages),
            took: last.map_or(Duration::ZERO, |r| r.took),
            pending_pages: count,
            hot_pages: still_hot.count(),
            best_pending: rounds.best,
            idle_rounds: rounds.idle,
            rate: rounds.rate,
            fixed_cost: self.context().fixed_cost.get(),
        };
        rounds.best = Some(rounds.best.map_or(count, |best| best.min(count)));
        let predicted = stats.predicted_downtime();
        self.record.tally.predicted = predicted;
        self.record.context.progress.send_modify(|p| p.predicted = predicted);
        stats
    }
}

async fn flush(lanes: &mut dyn PageLanes) -> Result<LaneTotals, MigrationError> {
    Ok(lanes.flush().await?)
}

pub(super) fn no_lanes() -> MigrationError {
    MigrationError::Workload(crate::workload::WorkloadError::new("the lanes were never opened"))
}

/// Pages of the workload that hold nothing, when `populated` of them do.
async fn find_hot(
    workload: &mut dyn Workload,
    pending: &PageSet,
    interrupt: &mut Interrupt,
) -> Result<PageSet, MigrationError> {
    let samples = sample(pending);
    workload.clear(&samples).await?;
    let wait = async {
        tokio::time::sleep(SAMPLE_WAIT).await;
        Ok::<(), MigrationError>(())
    };
    interrupt.guard(wait).await?;
    let mut again = workload.dirty().await?;
    again.intersect(&samples);
    Ok(hot(pending, &samples, &again))
}

/// `pages` in pieces of at most [`CLEAR_CHUNK`] neighbouring numbers.
fn chunks_of(pages: &PageSet) -> Vec<(StreamKey, PageBitmap)> {
    let mut chunks = Vec::new();
    for (key, bitmap) in pages.iter() {
        let mut open: Option<(u64, PageBitmap)> = None;
        for run in bitmap.runs() {
            let (mut first, end) = (run.first.0, run.first.0 + run.count);
            while first < end {
                let number = first / CLEAR_CHUNK;
                let stop = end.min((number + 1) * CLEAR_CHUNK);
                if open.as_ref().is_none_or(|(n, _)| *n != number) {
                    chunks.extend(open.take().map(|(_, set)| (key, set)));
                    open = Some((number, PageBitmap::none(bitmap.pages())));
                }
                if let Some((_, set)) = &mut open {
                    set.insert(PageRun { first: PageIndex(first), count: stop - first });
                }
                first = stop;
            }
        }
        chunks.extend(open.take().map(|(_, set)| (key, set)));
    }
    chunks
}
