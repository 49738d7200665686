//! Stopped and Sealed: the workload stands still, the rest of it moves, the
//! destination says that it has everything. Every wait here is downtime.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::precopy::{no_lanes, skipped};
use super::released::Released;
use super::{ABANDON_WAIT, Aborted, Record, Run, send_pages, within};
use crate::migration::failpoint;
use crate::migration::journal::{Event, JournalError};
use crate::migration::link::{LinkError, Peer, SealOrder};
use crate::migration::phase::{MigrationError, Phase};
use crate::units::MigrationId;
use crate::workload::{StreamSpec, WorkloadError};

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
        let (run, order) = run.or_abort(order).await?;
        Ok(Self { run, order })
    }

    /// Has the destination load the state and check everything.
    pub(super) async fn seal(self) -> Result<Sealed, Aborted> {
        let Self { run, order } = self;
        let started = Instant::now();
        let peer = run.context().peer.clone();
        let wait = seal_wait(&run.workload.streams(), !order.hashes.is_empty());
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
    /// Sends the last pages while the state is saved.
    async fn send_rest(&mut self) -> Result<SealOrder, MigrationError> {
        let mut interrupt = self.interrupt();
        let started = Instant::now();
        let pending = self.workload.dirty().await?;
        let found = started.elapsed();
        if self.record.tally.rounds.is_empty() {
            self.record.tally.skipped = skipped(self.workload.as_ref(), &pending);
        }
        let peer = self.context().peer.clone();
        let lanes = self.lanes.as_deref_mut().ok_or_else(no_lanes)?;
        let memory = async {
            send_pages(lanes, &pending).await?;
            let queued = started.elapsed();
            let totals = lanes.flush().await?;
            tracing::debug!(?found, ?queued, flushed = ?started.elapsed(), "last pages");
            Ok((totals, started.elapsed()))
        };
        let memory = interrupt.guard(while_heard(&peer, memory));
        let (memory, state) = tokio::join!(memory, self.workload.save());
        let (totals, memory_took) = memory?;
        let state = state?;
        let both = started.elapsed();
        self.record.tally.lanes = totals;
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

/// `work`, cut short when the peer does not answer another question meanwhile.
async fn while_heard<T>(
    peer: &Arc<dyn Peer>,
    work: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
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
        error = silent => Err(error),
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
        let Run { record, workload, .. } = run;
        let released = Released::new(&record.context, Some(workload), started);
        Ok((released, record))
    }
}

/// How long the peer may take to load the state while the workload stands
/// still, and to hash all of `streams` if it has to `verify`: a slow one does
/// 64 MiB a second.
fn seal_wait(streams: &[StreamSpec], verify: bool) -> Duration {
    let bytes: u64 = streams.iter().map(|spec| spec.length).sum();
    let hashing = if verify { bytes >> 26 } else { 0 };
    Duration::from_secs(30 + hashing)
}

/// How long the part of a stop took that does not depend on memory.
pub(super) fn fixed_part(downtime: &crate::migration::phase::Breakdown) -> Duration {
    downtime.pause + downtime.state + downtime.restore + downtime.resume
}
