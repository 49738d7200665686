//! The taking side: what arrives, from the offer to the first instruction.
//!
//! Each arrival is owned by one task ([`arrival`]); [`Arrivals`] finds it by
//! its migration and answers from the journal when there is none.

mod accepted;
mod arrival;
mod filling;
mod sealed;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::migration::journal::{Counterpart, Identity, Journal, JournalError, WorkloadRecord};
use crate::migration::link::{
    Activated, Blocker, LaneGate, Offer, Peer, SealOrder, SealReport, Standing,
};
use crate::migration::recovery::standing_at_destination;
use crate::units::{Epoch, MigrationId, WorkloadId};
use crate::workload::{Arriving, Engine, Kind, Lacks, Manifest, Workload, WorkloadError};

pub use accepted::{MAX_CONFIG, MAX_LANES, MAX_STREAMS, valid_name};
use arrival::{Arrival, Command};
use filling::Filling;

/// How long things may take at the destination.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// A reservation without any traffic is dropped after this.
    pub idle: Duration,
    /// A sealed copy without Activate asks the source after this, and again
    /// and again.
    pub ask: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { idle: Duration::from_secs(60), ask: Duration::from_secs(2) }
    }
}

/// A name and memory set aside on this host; given back when dropped.
pub type Claim = Box<dyn Send + Sync>;

/// The host that workloads arrive at.
#[async_trait::async_trait]
pub trait Host: Send + Sync {
    /// Sets name and memory aside. With `dry_run` only says whether it could.
    ///
    /// # Errors
    /// What stands in the way.
    fn claim(
        &self,
        manifest: &Manifest,
        migration: MigrationId,
        dry_run: bool,
    ) -> Result<Claim, Blocker>;

    /// Takes over what has arrived and runs.
    async fn arrived(&self, record: WorkloadRecord, workload: Box<dyn Workload>, claim: Claim);

    /// Makes workloads of `kind`, if this host can.
    fn engine(&self, kind: Kind) -> Option<Arc<dyn Engine>>;

    /// The daemon that listens at `address`.
    fn peer(&self, address: &str) -> Arc<dyn Peer>;
}

/// A call about an arrival could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    /// No such migration here.
    #[error("this host knows no migration {0}; it was discarded, or never offered")]
    Unknown(MigrationId),
    /// The call does not fit the phase.
    #[error("{call} does not fit a migration that is {phase}")]
    Unexpected {
        /// The call.
        call: &'static str,
        /// The phase.
        phase: &'static str,
    },
    /// The pages did not all arrive.
    #[error("the pages did not arrive whole: {0}")]
    Incomplete(String),
    /// Its source does not want it any more.
    #[error("the migration was given up while its copy was made")]
    GivenUp,
    /// The hashes differ.
    #[error("stream {0} differs from the source's")]
    Differs(u32),
    /// The source hashed other streams than this host holds.
    #[error("the source verified other streams than were sent")]
    OddHashes,
    /// The workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What has been offered to this host and does not run yet. Cheap to clone.
#[derive(Clone)]
pub struct Arrivals {
    shared: Arc<Shared>,
}

struct Shared {
    host: Arc<dyn Host>,
    journal: Journal,
    gate: Arc<dyn LaneGate>,
    patience: Patience,
    open: Mutex<HashMap<MigrationId, Open>>,
    /// Ends every arrival's task where it stands, as a crash would; what they
    /// hold is dropped without being discarded.
    abort: CancellationToken,
}

/// The way to an arrival's task.
struct Open {
    workload: WorkloadId,
    commands: mpsc::Sender<Command>,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<MigrationId, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sealed copy that a restarted daemon found again.
pub struct Remembered {
    /// The journal's record; its `sealed` is set.
    pub record: WorkloadRecord,
    /// The copy.
    pub workload: Box<dyn Arriving>,
    /// What was set aside for it.
    pub claim: Claim,
}

impl Arrivals {
    /// None yet.
    #[must_use]
    pub fn new(
        host: Arc<dyn Host>,
        journal: Journal,
        gate: Arc<dyn LaneGate>,
        patience: Patience,
    ) -> Self {
        let (open, abort) = (Mutex::default(), CancellationToken::new());
        Self { shared: Arc::new(Shared { host, journal, gate, patience, open, abort }) }
    }

    /// How long a reservation lives without traffic.
    #[must_use]
    pub fn reservation(&self) -> Duration {
        self.shared.patience.idle
    }

    /// Checks an offer and, unless it is a dry run, makes room for it. An empty
    /// answer is a yes.
    pub async fn offer(&self, offer: Offer, from: Counterpart) -> Vec<Blocker> {
        if !offer.dry_run {
            self.end_earlier(offer.manifest.workload, offer.migration).await;
        }
        let accepted = accepted::accept(&self.shared, offer, from).await;
        match accepted {
            Ok(Some(arrival)) => {
                self.start(arrival);
                Vec::new()
            }
            Ok(None) => Vec::new(),
            Err(blockers) => blockers,
        }
    }

    /// An attempt before this one may have ended without this host hearing of
    /// it, and its copy would be in the way until it asks by itself.
    async fn end_earlier(&self, workload: WorkloadId, now: MigrationId) {
        let earlier: Vec<_> = {
            let open = self.shared.open();
            let same =
                |(id, open): &(&MigrationId, &Open)| open.workload == workload && **id != now;
            open.iter().filter(same).map(|(id, _)| *id).collect()
        };
        for migration in earlier {
            // What is still there afterwards blocks the offer, and that says so.
            let _ = self.ask(migration, Command::AskSource).await;
        }
    }

    /// Takes a sealed copy back into care after a restart.
    pub fn remember(&self, remembered: Remembered) {
        if let Some(arrival) = Arrival::remembered(&self.shared, remembered) {
            self.start(arrival);
        }
    }

    /// Goes on to bring the memory of a workload that a restarted daemon has found, and
    /// that is owned here; what it `lacks`, unless it has ended.
    pub fn fill(&self, record: &WorkloadRecord, lacks: Option<Arc<dyn Lacks>>) {
        let Some(from) = record.filling.clone() else { return };
        let (shared, identity) = (self.shared.clone(), record.identity.clone());
        let filling = Filling { shared, identity, epoch: record.epoch, from };
        match lacks {
            Some(lacks) => filling.start(lacks),
            None => filling.over(),
        }
    }

    fn start(&self, arrival: Arrival) {
        let (commands, inbox) = mpsc::channel(8);
        let open = Open { workload: arrival.workload(), commands };
        self.shared.open().insert(arrival.migration(), open);
        let abort = self.shared.abort.clone();
        tokio::spawn(async move { abort.run_until_cancelled(arrival.run(inbox)).await });
    }

    /// Ends every arrival's task where it stands. The daemon is going down;
    /// what was arriving is found again, or dropped, at its next start.
    pub fn abort_all(&self) {
        self.shared.abort.cancel();
        self.shared.open().clear();
    }

    async fn ask<T>(
        &self,
        migration: MigrationId,
        command: impl FnOnce(oneshot::Sender<Result<T, ArrivalError>>) -> Command,
    ) -> Result<T, ArrivalError> {
        let commands = self.shared.open().get(&migration).map(|o| o.commands.clone());
        let commands = commands.ok_or(ArrivalError::Unknown(migration))?;
        let (reply, answer) = oneshot::channel();
        let sent = commands.send(command(reply)).await;
        sent.map_err(|_| ArrivalError::Unknown(migration))?;
        answer.await.unwrap_or(Err(ArrivalError::Unknown(migration)))
    }

    /// Everything was sent: load, check and hold it.
    ///
    /// # Errors
    /// The copy is then discarded, but for a call out of place.
    pub async fn seal(&self, order: SealOrder) -> Result<SealReport, ArrivalError> {
        let id = order.migration;
        self.ask(id, |reply| Command::Seal(order, reply)).await
    }

    /// Owns it and runs it. Done once, however often it is asked.
    ///
    /// # Errors
    /// When it does not run here; [`Self::resolve`] then says how it stands.
    pub async fn activate(
        &self,
        migration: MigrationId,
        epoch: Epoch,
    ) -> Result<Activated, ArrivalError> {
        self.ask(migration, |reply| Command::Activate(epoch, reply)).await
    }

    /// Drops it, durably. What this host owns already can't be dropped so.
    ///
    /// # Errors
    /// When it runs here, or the journal can't be written.
    pub async fn abandon(
        &self,
        migration: MigrationId,
        reason: String,
    ) -> Result<(), ArrivalError> {
        match self.ask(migration, |reply| Command::Abandon(reason, reply)).await {
            Err(ArrivalError::Unknown(_)) => Ok(()),
            other => other,
        }
    }

    /// How the migration stands here, for its source. If this host does not own
    /// it and does not hold it sealed, it never will: that is on the disk
    /// before the answer is given.
    ///
    /// # Errors
    /// When the journal can't be read or written.
    pub async fn resolve(
        &self,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
    ) -> Result<Standing, ArrivalError> {
        match self.ask(migration, Command::Resolve).await {
            Err(ArrivalError::Unknown(_)) => {}
            other => return other,
        }
        let record = self.shared.journal.get(workload)?;
        let promised = self.shared.journal.is_discarded(migration)?;
        let known = standing_at_destination(record.as_ref(), migration, epoch, promised);
        if let Some(standing) = known {
            return Ok(standing);
        }
        let journal = self.shared.journal.clone();
        let promised = tokio::task::spawn_blocking(move || journal.discard_unknown(migration));
        promised.await.unwrap_or(Err(JournalError::Damaged(workload.to_string())))?;
        Ok(Standing::Discarded)
    }

    /// An operator's word on a sealed copy whose source is lost: run it, or
    /// drop it.
    ///
    /// # Errors
    /// When no sealed copy of that migration is here or it can't be done.
    pub async fn force(&self, migration: MigrationId, run: bool) -> Result<(), ArrivalError> {
        self.ask(migration, |reply| Command::Force(run, reply)).await
    }
}

/// What the manifest says that the workload is.
#[must_use]
pub fn identity(manifest: &Manifest) -> Identity {
    Identity {
        id: manifest.workload,
        name: manifest.name.clone(),
        kind: manifest.kind,
        config: manifest.config.clone(),
        memory_bytes: manifest.memory_bytes,
        cpus: manifest.cpus,
        created_unix_ms: manifest.created_unix_ms,
    }
}
