//! Stopped and Sealed: the workload stands still, the rest of it moves, the
//! destination says that it has everything. Every wait here is downtime.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::precopy::no_lanes;
use super::released::Released;
use super::{ABANDON_WAIT, Aborted, Record, Run, send_pages, within};
use crate::migration::failpoint;
use crate::migration::journal::{Event, JournalError};
use crate::migration::link::{LaneTotals, LinkError, PageLanes, Peer, SealOrder};
use crate::migration::phase::{MigrationError, Mode, Phase};
use crate::pages::PageSet;
use crate::units::{MigrationId, PAGE_SIZE};
use crate::workload::{Ahead, StreamSpec, WorkloadError};

/// How long the peer may be silent while the workload stands still. Dead
/// connections are noticed later than that: they may be quiet for long while
/// the workload runs.
const SILENCE: Duration = Duration::from_secs(3);
/// The pause between two questions whether the peer is still there. Most stops
/// are over before the first.
const LISTEN_PAUSE: Duration = Duration::from_millis(500);

/// The workload stands still and everything of it was sent.
pub(super) struct Stopped {
    run: Run,
    order: SealOrder,
}

/// The destination holds a complete copy that does not run.
pub(super) struct Sealed(Run);

impl Stopped {
    pub(super) async fn stop(mut run: Run) -> Result<Self, Aborted> {
        // Slow storage is waited for while the guest still runs.
        run.held = true;
        let mut interrupt = run.interrupt();
        let drained = interrupt.guard(run.workload.drain()).await;
        let (mut run, ()) = run.or_abort(drained).await?;
        run.enter(Phase::Stopped);
        let started = Instant::now();
        let frozen = run.workload.freeze().await;
        let (mut run, ()) = run.or_abort(frozen).await?;
        failpoint::reach(format_args!("source-frozen"));
        run.record.tally.downtime.pause = started.elapsed();
        let order = run.send_rest().await;
        let (mut run, order) = run.or_abort(order).await?;
        if run.context().mode.mode == Mode::Postcopy
            && let Some(memory) = run.workload.left_behind()
        {
            let left = memory.bytes() / PAGE_SIZE;
            let skipped = &mut run.record.tally.skipped;
            *skipped = skipped.saturating_sub(left);
            // Not only when it was released: to make a tree takes some of its memory.
            let (id, host) = (run.context().id, run.context().peer_host);
            run.serves = Some(run.context().serving.serve(id, host, memory));
        }
        failpoint::reach(format_args!("source-written"));
        Ok(Self { run, order })
    }

    /// Has the destination load the state and check everything.
    pub(super) async fn seal(self) -> Result<Sealed, Aborted> {
        let Self { run, order } = self;
        let started = Instant::now();
        let peer = run.context().peer.clone();
        let sent = run.record.tally.lanes.data_pages * PAGE_SIZE;
        let wait = seal_wait(&run.workload.streams(), sent, !order.hashes.is_empty());
        let sealed = while_heard(&peer, within(&peer, wait, peer.seal(&order)));
        let report = run.interrupt().guard(sealed).await;
        let (mut run, report) = run.or_abort(report).await?;
        let asked = run.context().request.verify;
        if asked && !report.verified {
            return Err(run.abort(MigrationError::NotVerified).await);
        }
        let downtime = &mut run.record.tally.downtime;
        downtime.verify += report.verify;
        downtime.restore = started.elapsed().saturating_sub(report.verify);
        run.record.tally.verified = asked.then_some(report.verified);
        run.enter(Phase::Sealed);
        Ok(Sealed(run))
    }
}

impl Run {
    /// Sends what is left of the workload, part by part, and saves its state:
    /// beside the first part where the workload can do that.
    async fn send_rest(&mut self) -> Result<SealOrder, MigrationError> {
        let mut interrupt = self.interrupt();
        let peer = self.context().peer.clone();
        let started = Instant::now();
        let (mut sent, mut saved) = (None, None);
        let mut pages = 0;
        loop {
            let next = async { Ok::<_, MigrationError>(self.workload.rest().await?) };
            let Some(part) = interrupt.guard(while_heard(&peer, next)).await? else { break };
            let found = started.elapsed();
            let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
            if saved.is_none() && self.workload.saves_early() {
                let sending = async {
                    let totals = send_part(lanes, &part).await?;
                    Ok::<_, MigrationError>((totals, started.elapsed()))
                };
                let sending = interrupt.guard(while_heard(&peer, sending));
                let (done, state) = tokio::join!(sending, self.workload.save());
                sent = Some(done?);
                saved = Some(state?);
            } else {
                // Not waited for before the next part: the workload has that already.
                let queued = async { Ok::<_, MigrationError>(send_pages(lanes, &part).await?) };
                interrupt.guard(while_heard(&peer, queued)).await?;
                sent = None;
            }
            tracing::debug!(?found, sent = ?started.elapsed(), "part of the last pages");
            pages += part.count();
            let bytes = part.count().saturating_mul(PAGE_SIZE);
            self.record.context.progress.send_modify(|p| {
                p.sent += bytes;
                p.remaining = p.remaining.saturating_sub(bytes);
            });
        }
        let (totals, memory_took) = match sent {
            Some(sent) => sent,
            // How many batches there were is only known after a flush.
            None => {
                let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
                let flushed = interrupt.guard(while_heard(&peer, lanes.flush())).await?;
                (flushed, started.elapsed())
            }
        };
        let state = match saved {
            Some(state) => state,
            None => self.workload.save().await?,
        };
        if matches!(self.workload.ahead(), Ahead::Copies { .. } | Ahead::Not(_)) {
            self.record.tally.followed_by(pages);
            let rounds: u64 = self.record.tally.rounds.iter().map(|round| round.pages).sum();
            let ahead = rounds + self.record.tally.file_pages;
            self.record.tally.skipped = self.skipped(ahead + pages);
        } else if self.record.tally.rounds.is_empty() {
            self.record.tally.skipped = self.skipped(pages);
        }
        let both = started.elapsed();
        self.record.tally.lanes = totals;
        // Of a small process tree that is everything.
        let carried = u64::try_from(state.len()).unwrap_or(u64::MAX);
        self.record.tally.lanes.bytes_on_wire += carried;
        self.record.context.progress.send_modify(|p| p.sent += carried);
        self.record.tally.downtime.memory = memory_took;
        self.record.tally.downtime.state = both.saturating_sub(memory_took);
        let hashes = if self.context().request.verify {
            let started = Instant::now();
            let hashes = self.workload.hash().await?;
            self.record.tally.downtime.verify = started.elapsed();
            hashes
        } else {
            Vec::new()
        };
        Ok(SealOrder {
            migration: self.context().id,
            batches: self.record.tally.lanes.batches.clone(),
            state,
            hashes,
        })
    }
}

/// Sends `part` and waits until all of it is in place.
async fn send_part(lanes: &mut dyn PageLanes, part: &PageSet) -> Result<LaneTotals, LinkError> {
    send_pages(lanes, part).await?;
    lanes.flush().await
}

/// `work`, cut short when the peer does not answer another question meanwhile.
async fn while_heard<T, E: From<LinkError>>(
    peer: &Arc<dyn Peer>,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let silent = async {
        loop {
            tokio::time::sleep(LISTEN_PAUSE).await;
            if let Err(error) = within(peer, SILENCE, peer.identify()).await {
                return error;
            }
        }
    };
    tokio::select! {
        biased;
        done = work => done,
        error = silent => Err(error.into()),
    }
}

/// Waits, however long it takes, for the peer's promise never to run it.
async fn until_dropped(peer: Arc<dyn Peer>, id: MigrationId) {
    loop {
        let told = peer.abandon(id, "its source could not write its journal");
        match within(&peer, ABANDON_WAIT, told).await {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(%error, "the workload stands still until the peer has dropped it");
            }
        }
        tokio::time::sleep(ABANDON_WAIT).await;
    }
}

impl Sealed {
    /// Journals that the workload is the peer's. The one irrevocable step: an
    /// answer that does not come proves nothing, so nothing after it aborts.
    pub(super) async fn release(self) -> Result<(Released, Record), Aborted> {
        let mut run = self.0;
        if run.context().cancel.is_cancelled() {
            return Err(run.abort(MigrationError::Cancelled).await);
        }
        let started = Instant::now();
        // Before the journal gives it away: two hosts must never hold its disks.
        let let_go = run.workload.let_go().await;
        let (run, ()) = run.or_abort(let_go).await?;
        failpoint::reach(format_args!("source-let-go"));
        let (journal, identity) = (run.context().journal.clone(), run.context().identity.clone());
        let event = Event::Released(run.context().counterpart());
        let written = tokio::task::spawn_blocking(move || journal.record(&identity, &event)).await;
        let written = match written {
            Ok(result) => result.map_err(MigrationError::from),
            Err(_) => Err(WorkloadError::new("the journal's writer panicked").into()),
        };
        let mut run = match written {
            Ok(_) => run,
            Err(error) => {
                if matches!(error, MigrationError::Journal(JournalError::Storage(_))) {
                    // It may be on the disk all the same. It may run here again
                    // only when nobody can be told by that record to run it.
                    until_dropped(run.context().peer.clone(), run.context().id).await;
                }
                return Err(run.abort(error).await);
            }
        };
        run.enter(Phase::Released);
        let Run { record, workload, serves, .. } = run;
        let released = Released::new(&record.context, Some(workload), serves, started);
        Ok((released, record))
    }
}

/// How long the peer may take to load the state while the workload stands still,
/// which may mean to copy all that was `sent` (bytes), and to hash all of `streams`
/// if it has to `verify`: a slow one does 64 MiB a second. A little more than one takes
/// that gives up by itself, which says why.
fn seal_wait(streams: &[StreamSpec], sent: u64, verify: bool) -> Duration {
    let bytes: u64 = streams.iter().map(|spec| spec.length).sum();
    let hashing = if verify { bytes >> 26 } else { 0 };
    Duration::from_secs(40 + (sent >> 26) + hashing)
}

/// How long the part of a stop took that does not depend on memory.
pub(super) fn fixed_part(downtime: &crate::migration::phase::Breakdown) -> Duration {
    downtime.pause + downtime.state + downtime.restore + downtime.resume
}
