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
use crate::workload::{Arriving, StreamHash, WorkloadError};

/// How often a start is tried before the workload is handed back.
const START_TRIES: u32 = 2;

/// A sealed copy.
pub(super) struct Held {
    pub(super) workload: Box<dyn Arriving>,
    /// What its source was told; not remembered over a restart.
    pub(super) report: Option<SealReport>,
}

/// What came of an attempt to own it.
#[allow(clippy::large_enum_variant)]
pub(super) enum Owning {
    /// It runs.
    Runs(Duration),
    /// It did not run an instruction and never will here.
    NeverRan(ArrivalError),
    /// The journal could not be written: nothing has changed.
    StillSealed(Facts, Held, ArrivalError),
}

/// It is complete, and nothing says so yet.
pub(super) struct Complete {
    started: Instant,
    verify: Duration,
    verified: bool,
}

/// Waits for the last pages, compares, and loads. May be dropped in the middle: then
/// the workload is only good for being discarded.
pub(super) async fn complete(
    workload: &mut dyn Arriving,
    intake: &Arc<dyn Intake>,
    order: &SealOrder,
) -> Result<Complete, ArrivalError> {
    let started = Instant::now();
    intake.complete(&order.batches).await.map_err(ArrivalError::Incomplete)?;
    // What came after would be in no hash and change what was loaded.
    intake.close("everything has arrived");
    let hashing = Instant::now();
    let verified = !order.hashes.is_empty();
    if verified {
        compare(&workload.hash().await?, &order.hashes)?;
    }
    let verify = if verified { hashing.elapsed() } else { Duration::ZERO };
    failpoint::reach(format_args!("destination-loading"));
    workload.load(&order.state).await?;
    Ok(Complete { started, verify, verified })
}

/// Journals the seal.
pub(super) async fn seal(arrival: &Facts, complete: Complete) -> Result<SealReport, ArrivalError> {
    let Complete { started, verify, verified } = complete;
    let (from, epoch) = (arrival.from.clone(), arrival.epoch);
    let (paused, follows) = (arrival.paused, arrival.follows);
    let sealed = Sealed { from, epoch, paused, follows };
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
    loop {
        let Err(error) = start(&mut held, arrival.paused).await else {
            failpoint::reach(format_args!("destination-running"));
            let Facts { shared, claim, .. } = arrival;
            shared.host.arrived(record, held.workload.arrived(), claim).await;
            return Owning::Runs(started.elapsed());
        };
        tracing::error!(%migration, %error, "the workload could not be started");
        let back = Event::NeverRan(arrival.from.clone());
        let Err(unwritten) = write(&arrival.shared, &arrival.identity, back).await else {
            held.workload.discard().await;
            return Owning::NeverRan(error.into());
        };
        // The journal says that it is this host's, and its source would drop its
        // own copy if it heard so: this one must not be lost.
        tracing::error!(%migration, error = %unwritten, "and could not be handed back");
        tokio::time::sleep(arrival.shared.patience.ask).await;
    }
}

async fn start(held: &mut Held, paused: bool) -> Result<(), WorkloadError> {
    let mut result = held.workload.start(paused).await;
    for _ in 1..START_TRIES {
        if result.is_ok() {
            break;
        }
        result = held.workload.start(paused).await;
    }
    result
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
