//! Sealed and Owned: a complete copy that waits, and the step that makes it
//! this host's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::arrival::Facts;
use super::{ArrivalError, Shared};
use crate::migration::failpoint;
use crate::migration::journal::{Event, Identity, JournalError, Sealed, WorkloadRecord};
use crate::migration::link::{Intake, SealOrder, SealReport};
use crate::units::MigrationId;
use crate::workload::{Arriving, StreamHash};

/// How often a start is tried before the workload is handed back.
const START_TRIES: u32 = 2;

/// A sealed copy.
pub(super) struct Held {
    pub(super) workload: Box<dyn Arriving>,
    /// What its source was told; not remembered over a restart.
    pub(super) report: Option<SealReport>,
}

/// What came of an attempt to own it.
pub(super) enum Owning {
    /// It runs.
    Runs(Duration),
    /// It did not run an instruction and never will here.
    NeverRan(ArrivalError),
    /// The journal could not be written: nothing has changed.
    StillSealed(Facts, Held, ArrivalError),
}

/// Waits for the last pages, loads, compares, and journals the seal.
pub(super) async fn seal(
    arrival: &Facts,
    workload: &mut dyn Arriving,
    intake: &Arc<dyn Intake>,
    order: &SealOrder,
) -> Result<SealReport, ArrivalError> {
    let started = Instant::now();
    intake.complete(&order.batches).await.map_err(ArrivalError::Incomplete)?;
    let hashing = Instant::now();
    let verified = !order.hashes.is_empty();
    if verified {
        compare(&workload.hash().await?, &order.hashes)?;
    }
    let verify = if verified { hashing.elapsed() } else { Duration::ZERO };
    failpoint::reach(format_args!("destination-loading"));
    workload.load(&order.state).await?;
    let sealed =
        Sealed { from: arrival.from.clone(), epoch: arrival.epoch, paused: arrival.paused };
    write(&arrival.shared, &arrival.identity, Event::Sealed(sealed)).await?;
    failpoint::reach(format_args!("destination-sealed"));
    let restore = started.elapsed().saturating_sub(verify);
    Ok(SealReport { restore, verify, verified })
}

fn compare(ours: &[StreamHash], theirs: &[StreamHash]) -> Result<(), ArrivalError> {
    if ours.len() != theirs.len() {
        return Err(ArrivalError::OddHashes);
    }
    for our in ours {
        let their = theirs.iter().find(|h| h.key == our.key).ok_or(ArrivalError::OddHashes)?;
        if their.hash != our.hash {
            return Err(ArrivalError::Differs(our.key.0));
        }
    }
    Ok(())
}

/// Journals that it is this host's, then runs it.
pub(super) async fn own(arrival: Facts, mut held: Held, forced: bool) -> Owning {
    let started = Instant::now();
    let migration = arrival.from.migration;
    let event = if forced { Event::ForcedHere } else { Event::Activated(migration) };
    let record = match write(&arrival.shared, &arrival.identity, event).await {
        Ok(record) => record,
        Err(error) => return Owning::StillSealed(arrival, held, error.into()),
    };
    failpoint::reach(format_args!("destination-owned"));
    let mut result = held.workload.start(arrival.paused).await;
    for _ in 1..START_TRIES {
        if result.is_ok() {
            break;
        }
        result = held.workload.start(arrival.paused).await;
    }
    match result {
        Ok(()) => {
            failpoint::reach(format_args!("destination-running"));
            let Facts { shared, claim, .. } = arrival;
            shared.host.arrived(record, held.workload.arrived(), claim).await;
            Owning::Runs(started.elapsed())
        }
        Err(error) => {
            tracing::error!(%migration, %error, "the workload could not be started");
            let back = Event::NeverRan(arrival.from.clone());
            if let Err(error) = write(&arrival.shared, &arrival.identity, back).await {
                tracing::error!(%migration, %error, "and could not be handed back");
            }
            held.workload.discard().await;
            Owning::NeverRan(error.into())
        }
    }
}

async fn write(
    shared: &Shared,
    identity: &Identity,
    event: Event,
) -> Result<WorkloadRecord, JournalError> {
    let (journal, identity) = (shared.journal.clone(), identity.clone());
    let name = identity.name.clone();
    let written = tokio::task::spawn_blocking(move || journal.record(&identity, &event));
    written.await.unwrap_or(Err(JournalError::Damaged(name)))
}

/// Makes the promise never to run `migration` durable.
pub(super) async fn promise(
    shared: &Shared,
    identity: &Identity,
    migration: MigrationId,
    sealed: bool,
) -> Result<(), JournalError> {
    if sealed {
        return write(shared, identity, Event::Discarded(migration)).await.map(drop);
    }
    let journal = shared.journal.clone();
    let name = identity.name.clone();
    let written = tokio::task::spawn_blocking(move || journal.discard_unknown(migration));
    written.await.unwrap_or(Err(JournalError::Damaged(name)))
}
