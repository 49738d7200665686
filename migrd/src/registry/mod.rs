//! Which workloads this host has, and who may touch them.
//!
//! Owns the map of workloads and names, and the memory that is promised. Each
//! workload has one owner task ([`owner`]); everything that happens to it goes
//! through that task's inbox. May not touch the wire or the insides of phases.

mod memory;
mod owner;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::migration::destination::{Claim, Host, valid_name};
use crate::migration::journal::{
    Event, Identity, Journal, JournalError, Ownership, WorkloadRecord,
};
use crate::migration::link::{Blocker, Peer, Standing};
use crate::migration::phase::{Progress, Report};
use crate::migration::plan::{Plan, Question};
use crate::migration::recovery::standing_at_source;
use crate::migration::source::released::Released;
use crate::migration::source::{FixedCost, Request};
use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::workload::{
    Engine, Footprint, Kind, Manifest, RunState, Terminal, Workload, WorkloadError,
};

pub use memory::HostMemory;
pub use owner::FrozenWork;
use owner::{Command, Holding, Owner, OwnerHandle};

/// How a workload stands on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// An operator paused it.
    Paused,
    /// It ended.
    Stopped,
    /// On its way out or in.
    Migrating,
    /// Handed over or arrived, and the other host has not said the last word.
    InDoubt,
    /// It runs elsewhere.
    Gone,
}

/// What is known of a workload at this moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Who it is.
    pub identity: Identity,
    /// The epoch of its record.
    pub epoch: Epoch,
    /// How it stands.
    pub state: State,
    /// Why, in words; empty where the state says it all.
    pub reason: String,
    /// The other host, where there is one.
    pub peer: String,
    /// The migration under way.
    pub migration: Option<MigrationId>,
}

/// A migration that was started.
#[derive(Clone)]
pub struct Watching {
    /// The migration.
    pub id: MigrationId,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// Its report, once.
    pub result: watch::Receiver<Option<Arc<Report>>>,
}

/// What was asked of a workload could not be done. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No such name.
    #[error("no workload is named {0}; see `migctl list`")]
    Unknown(String),
    /// The name is used.
    #[error("a workload named {0} is here already; choose another name or remove it")]
    NameTaken(String),
    /// The name can't be one.
    #[error(
        "{0:?} can't be a name: use letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit"
    )]
    BadName(String),
    /// A migration is under way.
    #[error("{name} is being migrated ({migration}); wait for it, or `migctl cancel {name}` first")]
    Busy {
        /// The workload.
        name: String,
        /// The migration.
        migration: MigrationId,
    },
    /// It stands in another way than the call needs.
    #[error("{name} is {state}, so it can't be {call}{hint}")]
    WrongState {
        /// The workload.
        name: String,
        /// How it stands.
        state: String,
        /// What was to be done to it.
        call: &'static str,
        /// What to do instead.
        hint: String,
    },
    /// No migration is under way.
    #[error("no migration of {0} is under way")]
    NotMigrating(String),
    /// It is past the point of no return.
    #[error(
        "the migration of {0} is past the point of no return and can't be cancelled; its result follows"
    )]
    TooLate(String),
    /// Not enough memory.
    #[error("{}; {}", .0.message, .0.remedy)]
    NoRoom(Blocker),
    /// This host has no engine for that kind.
    #[error("this host can't run workloads of kind {0:?}")]
    NoEngine(Kind),
    /// The workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The daemon is going down.
    #[error("migrd is shutting down; try again when it is back")]
    ShuttingDown,
}

/// Finds the daemon at an address.
pub type Peers = Arc<dyn Fn(&str) -> Arc<dyn Peer> + Send + Sync>;

/// The workloads of this host. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

/// What every owner task needs.
struct Shared {
    here: String,
    host: HostId,
    journal: Journal,
    engines: BTreeMap<&'static str, Arc<dyn Engine>>,
    peers: Peers,
    memory: HostMemory,
    fixed_cost: FixedCost,
    rates: Mutex<BTreeMap<String, f64>>,
    lanes: u32,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    owners: BTreeMap<WorkloadId, OwnerHandle>,
    arriving: BTreeMap<MigrationId, Arrived>,
    under_way: std::collections::BTreeSet<MigrationId>,
}

/// An arrival that has a claim on this host.
struct Arrived {
    workload: WorkloadId,
    name: String,
    manifest: Option<Manifest>,
    bytes: u64,
}

/// How this host is set up.
pub struct Setup {
    /// Its address, as peers reach it.
    pub here: String,
    /// Its id.
    pub host: HostId,
    /// Its journal.
    pub journal: Journal,
    /// What makes virtual machines.
    pub vms: Arc<dyn Engine>,
    /// Finds peers.
    pub peers: Peers,
    /// How many lanes a migration uses.
    pub lanes: u32,
    /// Ends everything.
    pub shutdown: CancellationToken,
}

impl Shared {
    fn engine(&self, kind: Kind) -> Option<Arc<dyn Engine>> {
        self.engines.get(kind_name(kind)).cloned()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Vm => "vm",
    }
}

impl Registry {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let Setup { here, host, journal, vms, peers, lanes, shutdown } = setup;
        let engines = BTreeMap::from([(kind_name(Kind::Vm), vms)]);
        Self {
            shared: Arc::new(Shared {
                here,
                host,
                journal,
                engines,
                peers,
                memory: HostMemory::of_this_host(),
                fixed_cost: FixedCost::default(),
                rates: Mutex::default(),
                lanes,
                shutdown,
                tasks: TaskTracker::new(),
                table: Mutex::default(),
            }),
        }
    }

    /// Sets a name and memory aside for a workload that is made here.
    ///
    /// # Errors
    /// When the name can't be one or is used, or the memory is not free.
    pub fn claim_new(&self, manifest: &Manifest) -> Result<Claim, RegistryError> {
        if !valid_name(&manifest.name) {
            return Err(RegistryError::BadName(manifest.name.clone()));
        }
        let mut table = self.shared.table();
        if table.name_taken(&manifest.name) {
            return Err(RegistryError::NameTaken(manifest.name.clone()));
        }
        self.shared.room(&table, manifest.memory_bytes).map_err(RegistryError::NoRoom)?;
        let id = MigrationId::random();
        Ok(self.insert_claim(&mut table, id, manifest))
    }

    fn insert_claim(&self, table: &mut Table, id: MigrationId, manifest: &Manifest) -> Claim {
        let arrived = Arrived {
            workload: manifest.workload,
            name: manifest.name.clone(),
            manifest: Some(manifest.clone()),
            bytes: manifest.memory_bytes,
        };
        table.arriving.insert(id, arrived);
        Box::new(ClaimGuard { shared: Arc::downgrade(&self.shared), id })
    }

    /// Sets aside what a sealed copy found after a restart holds.
    #[must_use]
    pub fn claim_remembered(&self, identity: &Identity, migration: MigrationId) -> Claim {
        let arrived = Arrived {
            workload: identity.id,
            name: identity.name.clone(),
            manifest: None,
            bytes: identity.memory_bytes,
        };
        self.shared.table().arriving.insert(migration, arrived);
        Box::new(ClaimGuard { shared: Arc::downgrade(&self.shared), id: migration })
    }

    /// Takes a workload in whose record says that this host owns it.
    pub fn take_in(&self, record: WorkloadRecord, workload: Option<Box<dyn Workload>>) {
        let holding = match workload {
            Some(workload) => Holding::Here(workload),
            None => Holding::Lost("its VMM is gone: the host restarted, or it was killed".into()),
        };
        self.start_owner(record, holding);
    }

    /// Takes care of a workload that was given away and is not settled.
    pub fn settle(&self, record: WorkloadRecord, released: Released) {
        self.start_owner(record, Holding::InDoubt(Box::new(released)));
    }

    /// Remembers where a workload went.
    pub fn remember_gone(&self, record: WorkloadRecord) {
        self.start_owner(record, Holding::Gone);
    }

    fn start_owner(&self, record: WorkloadRecord, holding: Holding) {
        let id = record.identity.id;
        let (owner, handle) = Owner::new(self.shared.clone(), record, holding);
        let old = self.shared.table().owners.insert(id, handle);
        drop(old);
        self.shared.tasks.spawn(owner.run());
    }

    /// How every workload stands.
    #[must_use]
    pub fn list(&self) -> Vec<Status> {
        let table = self.shared.table();
        let mut all: Vec<_> = table.owners.values().map(OwnerHandle::status).collect();
        for (migration, arrived) in &table.arriving {
            if let Some(status) = self.shared.arriving_status(*migration, arrived) {
                all.retain(|s| s.identity.id != arrived.workload || s.state != State::Gone);
                all.push(status);
            }
        }
        all.sort_by(|a, b| a.identity.name.cmp(&b.identity.name));
        all
    }

    /// How the workload named `name` stands; one that is here before one that
    /// is gone.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<Status, RegistryError> {
        let mut found: Vec<_> =
            self.list().into_iter().filter(|s| s.identity.name == name).collect();
        found.sort_by_key(|s| (s.state == State::Gone, std::cmp::Reverse(s.epoch)));
        found.into_iter().next().ok_or_else(|| RegistryError::Unknown(name.to_owned()))
    }

    fn owner(&self, name: &str) -> Result<OwnerHandle, RegistryError> {
        let id = self.find(name)?.identity.id;
        let found = self.shared.table().owners.get(&id).cloned();
        found.ok_or_else(|| RegistryError::Unknown(name.to_owned()))
    }

    async fn ask<T>(
        &self,
        name: &str,
        command: impl FnOnce(oneshot::Sender<Result<T, RegistryError>>) -> Command,
    ) -> Result<T, RegistryError> {
        self.owner(name)?.ask(command).await
    }

    /// Its output, input and figures, while it is here.
    ///
    /// # Errors
    /// When there is no such workload.
    pub fn terminal(&self, name: &str) -> Result<Option<Arc<dyn Terminal>>, RegistryError> {
        Ok(self.owner(name)?.terminal())
    }

    /// Tells every change of how it stands.
    ///
    /// # Errors
    /// When there is no such workload.
    pub fn follow(&self, name: &str) -> Result<watch::Receiver<Status>, RegistryError> {
        Ok(self.owner(name)?.follow())
    }

    /// What it costs now; nothing for a workload that is not here.
    ///
    /// # Errors
    /// When there is no such workload, or it does not answer.
    pub async fn footprint(&self, name: &str) -> Result<Footprint, RegistryError> {
        match self.terminal(name)? {
            Some(terminal) => Ok(terminal.footprint().await?),
            None => Ok(Footprint::default()),
        }
    }

    /// The report of its last migration from this host, since the daemon started.
    ///
    /// # Errors
    /// When there is no such workload.
    pub fn last_report(&self, name: &str) -> Result<Option<Arc<Report>>, RegistryError> {
        Ok(self.owner(name)?.last_report())
    }

    /// Pauses it.
    ///
    /// # Errors
    /// When it does not run, or is being migrated.
    pub async fn pause(&self, name: &str) -> Result<Status, RegistryError> {
        self.ask(name, |reply| Command::Pause(true, reply)).await
    }

    /// Resumes it.
    ///
    /// # Errors
    /// When it is not paused, or is being migrated.
    pub async fn resume(&self, name: &str) -> Result<Status, RegistryError> {
        self.ask(name, |reply| Command::Pause(false, reply)).await
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it has ended, or is being migrated.
    pub async fn stop(&self, name: &str) -> Result<Status, RegistryError> {
        self.ask(name, Command::Stop).await
    }

    /// Forgets it and drops everything this host holds of it.
    ///
    /// # Errors
    /// When it has not ended, is in doubt, or is being migrated.
    pub async fn remove(&self, name: &str) -> Result<(), RegistryError> {
        let id = self.find(name)?.identity.id;
        let owner = self.owner(name)?;
        owner.ask(Command::Remove).await?;
        // It may have come back in this very moment, to a new owner.
        let mut table = self.shared.table();
        if table.owners.get(&id).is_some_and(|now| now.is(&owner)) {
            table.owners.remove(&id);
        }
        Ok(())
    }

    /// Lends it, frozen, to `work`, and sets it running again.
    ///
    /// # Errors
    /// When it is not here, or `work` fails.
    pub async fn checkpoint(
        &self,
        name: &str,
        work: FrozenWork,
    ) -> Result<Duration, RegistryError> {
        self.ask(name, |reply| Command::Frozen(work, reply)).await
    }

    /// Starts moving it.
    ///
    /// # Errors
    /// When it is not here or is being migrated already.
    pub async fn migrate(
        &self,
        name: &str,
        peer: Arc<dyn Peer>,
        request: Request,
    ) -> Result<Watching, RegistryError> {
        self.ask(name, |reply| Command::Migrate(peer, request, reply)).await
    }

    /// What moving it would do, and what would stop it.
    ///
    /// # Errors
    /// When it is not here.
    pub async fn plan(
        &self,
        name: &str,
        peer: Arc<dyn Peer>,
        request: Request,
    ) -> Result<Plan, RegistryError> {
        let question: Question =
            self.ask(name, |reply| Command::Question(peer, request, reply)).await?;
        Ok(crate::migration::plan::plan(&question).await)
    }

    /// The migration that is under way.
    ///
    /// # Errors
    /// When none is.
    pub fn watching(&self, name: &str) -> Result<Watching, RegistryError> {
        let watching = self.owner(name)?.watching();
        watching.ok_or_else(|| RegistryError::NotMigrating(name.to_owned()))
    }

    /// Cancels the migration that is under way.
    ///
    /// # Errors
    /// When none is, or it can't be cancelled any more.
    pub async fn cancel(&self, name: &str) -> Result<MigrationId, RegistryError> {
        self.ask(name, Command::Cancel).await
    }

    /// Settles a workload that was given away, on an operator's word.
    ///
    /// # Errors
    /// When it is not in doubt.
    pub async fn force(&self, name: &str, run_here: bool) -> Result<Status, RegistryError> {
        self.ask(name, |reply| Command::Force(run_here, reply)).await
    }

    /// The migration of an arrival named `name`, if one waits here.
    #[must_use]
    pub fn arriving(&self, name: &str) -> Option<MigrationId> {
        let table = self.shared.table();
        table.arriving.iter().find(|(_, a)| a.name == name).map(|(id, _)| *id)
    }

    /// How `migration` stands here, its source, for the destination that asks.
    ///
    /// # Errors
    /// When the journal can't be read.
    pub fn standing(
        &self,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
    ) -> Result<Standing, JournalError> {
        // In this order: a migration that is not under way any more has written
        // whatever it ever will.
        let under_way = self.shared.table().under_way.contains(&migration);
        let record = self.shared.journal.get(workload)?;
        Ok(standing_at_source(record.as_ref(), migration, epoch, under_way))
    }

    /// Memory of this host: total, free for new workloads, and promised but not
    /// yet touched, in bytes.
    #[must_use]
    pub fn memory(&self) -> (u64, u64, u64) {
        let table = self.shared.table();
        let promised = table.promised();
        let (total, available) = self.shared.memory.read();
        (total, available.saturating_sub(promised), promised)
    }

    /// How many workloads are here.
    #[must_use]
    pub fn count(&self) -> usize {
        self.list().iter().filter(|s| s.state != State::Gone).count()
    }

    /// This host's address, as peers reach it.
    #[must_use]
    pub fn here(&self) -> &str {
        &self.shared.here
    }

    /// This host's id.
    #[must_use]
    pub fn host_id(&self) -> HostId {
        self.shared.host
    }

    /// Journals a new workload and takes it in.
    ///
    /// # Errors
    /// When the journal can't be written; the workload is then dropped.
    pub async fn create(
        &self,
        identity: Identity,
        mut workload: Box<dyn Workload>,
    ) -> Result<Status, RegistryError> {
        let journal = self.shared.journal.clone();
        let name = identity.name.clone();
        let written = blocking(move || journal.record(&identity, &Event::Created)).await;
        let record = match written {
            Ok(record) => record,
            Err(error) => {
                workload.discard().await;
                return Err(error.into());
            }
        };
        if let Err(error) = workload.resume().await {
            let journal = self.shared.journal.clone();
            workload.discard().await;
            blocking(move || journal.record(&record.identity, &Event::Removed(record.epoch)))
                .await?;
            return Err(error.into());
        }
        self.take_in(record, Some(workload));
        self.find(&name)
    }

    /// Lets every owner task end; workloads go on without this daemon.
    pub async fn shut_down(&self) {
        self.shared.shutdown.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(JournalError::Damaged("a record that was being written".into())),
    }
}

impl Table {
    fn name_taken(&self, name: &str) -> bool {
        let here = |handle: &OwnerHandle| {
            let status = handle.status();
            status.identity.name == name && status.state != State::Gone
        };
        self.owners.values().any(here) || self.arriving.values().any(|a| a.name == name)
    }

    /// Two attempts to move the same workload here would share its directory.
    fn arrives(&self, workload: WorkloadId) -> bool {
        self.arriving.values().any(|a| a.workload == workload)
    }

    /// Memory promised to workloads and not yet touched by them, in bytes.
    fn promised(&self) -> u64 {
        let here: u64 = self.owners.values().map(OwnerHandle::untouched).sum();
        here + self.arriving.values().map(|a| a.bytes).sum::<u64>()
    }
}

impl Shared {
    fn room(&self, table: &Table, bytes: u64) -> Result<(), Blocker> {
        let (_, available) = self.memory.read();
        let free = available.saturating_sub(table.promised());
        if bytes <= free {
            return Ok(());
        }
        Err(Blocker {
            code: "memory".into(),
            message: format!(
                "{} MiB of memory are needed and {} MiB are free on {}",
                bytes >> 20,
                free >> 20,
                self.here
            ),
            remedy: "stop or move something away from that host, or choose another".into(),
            host: self.here.clone(),
        })
    }

    fn arriving_status(&self, migration: MigrationId, arrived: &Arrived) -> Option<Status> {
        let record = self.journal.get(arrived.workload).ok().flatten();
        let sealed = record.as_ref().and_then(|r| r.sealed.clone());
        let sealed = sealed.filter(|s| s.from.migration == migration);
        let identity = match (&sealed, &arrived.manifest) {
            (Some(_), _) => record?.identity,
            (None, Some(manifest)) => crate::migration::destination::identity(manifest),
            (None, None) => return None,
        };
        let (state, epoch, peer, reason) = match sealed {
            Some(sealed) => (
                State::InDoubt,
                sealed.epoch,
                sealed.from.address,
                "complete here and waiting for its source's word",
            ),
            None => (State::Migrating, Epoch(0), String::new(), "arriving"),
        };
        let (migration, reason) = (Some(migration), reason.to_owned());
        Some(Status { identity, epoch, state, reason, peer, migration })
    }
}

/// Gives back what an arrival has claimed.
struct ClaimGuard {
    shared: Weak<Shared>,
    id: MigrationId,
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.table().arriving.remove(&self.id);
        }
    }
}

#[async_trait::async_trait]
impl Host for Registry {
    fn claim(
        &self,
        manifest: &Manifest,
        migration: MigrationId,
        dry_run: bool,
    ) -> Result<Claim, Blocker> {
        let mut table = self.shared.table();
        if table.arriving.contains_key(&migration) || table.arrives(manifest.workload) {
            return Err(Blocker {
                code: "arriving".into(),
                message: format!("{} is arriving on {} already", manifest.name, self.shared.here),
                remedy: "wait a minute for the other attempt to end, then start again".into(),
                host: self.shared.here.clone(),
            });
        }
        if table.name_taken(&manifest.name) {
            return Err(Blocker {
                code: "name-taken".into(),
                message: format!(
                    "another workload named {} is on {}",
                    manifest.name, self.shared.here
                ),
                remedy: "rename or remove one of them".into(),
                host: self.shared.here.clone(),
            });
        }
        self.shared.room(&table, manifest.memory_bytes)?;
        if dry_run {
            return Ok(Box::new(()));
        }
        Ok(self.insert_claim(&mut table, migration, manifest))
    }

    async fn arrived(&self, record: WorkloadRecord, workload: Box<dyn Workload>, claim: Claim) {
        self.take_in(record, Some(workload));
        drop(claim);
        tokio::task::spawn_blocking(crate::sys::heap::trim);
    }

    fn engine(&self, kind: Kind) -> Option<Arc<dyn Engine>> {
        self.shared.engine(kind)
    }

    fn peer(&self, address: &str) -> Arc<dyn Peer> {
        (self.shared.peers)(address)
    }
}

fn state_of(record: &WorkloadRecord, run: &RunState) -> (State, String) {
    match (&record.ownership, run) {
        (Ownership::Gone(_) | Ownership::Removed(_) | Ownership::Never, _) => {
            (State::Gone, String::new())
        }
        (Ownership::Released(_), _) => (State::InDoubt, String::new()),
        (Ownership::Owned, RunState::Running) => (State::Running, String::new()),
        (Ownership::Owned, RunState::Paused) => (State::Paused, String::new()),
        (Ownership::Owned, RunState::Ended(reason)) => (State::Stopped, reason.clone()),
    }
}
