//! Which workloads this host has, and who may touch them.
//!
//! Owns the map of workloads and names, and the memory that is promised. Each
//! workload has one owner task ([`owner`]); everything that happens to it goes
//! through that task's inbox. May not touch the wire or the insides of phases.

mod claims;
mod owner;
mod status;
mod verbs;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::host_memory::HostMemory;
use crate::migration::journal::{Event, Identity, Journal, JournalError, WorkloadRecord};
use crate::migration::link::{Peer, Pull, Pulled, Standing};
use crate::migration::recovery::standing_at_source;
use crate::migration::source::FixedCost;
use crate::migration::source::released::Released;
use crate::migration::source::serving::{Serving, not_served};
use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::workload::{Engine, Kind, Workload};
use claims::Table;
use owner::{Command, Holding, Owner, OwnerHandle};

pub use owner::{FrozenWork, Looked, Saving};
pub use status::{RegistryError, State, Status, Watching};

/// Finds the daemon at an address.
pub type Peers = Arc<dyn Fn(&str) -> Arc<dyn Peer> + Send + Sync>;

/// What the stop of a process tree is taken to cost besides memory until one was seen.
const TREE_COST: Duration = Duration::from_millis(150);

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
    vm_cost: FixedCost,
    tree_cost: FixedCost,
    rates: Mutex<BTreeMap<String, f64>>,
    serving: Serving,
    lanes: u32,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    table: Mutex<Table>,
}

/// How this host is set up.
pub struct Setup {
    /// Its address, as peers reach it.
    pub here: String,
    /// Its id.
    pub host: HostId,
    /// Its journal.
    pub journal: Journal,
    /// What makes workloads, for each kind that this host can run.
    pub engines: Vec<(Kind, Arc<dyn Engine>)>,
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

    /// What a stop of such a workload costs besides memory.
    fn fixed_cost(&self, kind: Kind) -> &FixedCost {
        match kind {
            Kind::Vm => &self.vm_cost,
            Kind::Process | Kind::Container => &self.tree_cost,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Vm => "vm",
        Kind::Process => "process",
        Kind::Container => "container",
    }
}

impl Registry {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let Setup { here, host, journal, engines, peers, lanes, shutdown } = setup;
        let named = engines.into_iter().map(|(kind, engine)| (kind_name(kind), engine));
        let engines = named.collect();
        Self {
            shared: Arc::new(Shared {
                here,
                host,
                journal,
                engines,
                peers,
                memory: HostMemory::of_this_host(),
                vm_cost: FixedCost::default(),
                tree_cost: FixedCost::about(TREE_COST),
                rates: Mutex::default(),
                serving: Serving::default(),
                lanes,
                shutdown,
                tasks: TaskTracker::new(),
                table: Mutex::default(),
            }),
        }
    }

    /// Takes a workload in whose record says that this host owns it.
    pub fn take_in(&self, record: WorkloadRecord, workload: Option<Box<dyn Workload>>) {
        let holding = match workload {
            Some(workload) => Holding::Here(workload),
            None => {
                let runner = match record.identity.kind {
                    Kind::Vm => "VMM",
                    Kind::Process | Kind::Container => "keeper",
                };
                Holding::Lost(format!("its {runner} is gone: the host restarted, or it was killed"))
            }
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
        found.ok_or_else(|| RegistryError::NotHereYet(name.to_owned()))
    }

    async fn ask<T>(
        &self,
        name: &str,
        command: impl FnOnce(oneshot::Sender<Result<T, RegistryError>>) -> Command,
    ) -> Result<T, RegistryError> {
        self.owner(name)?.ask(command).await
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

    /// Where memory is served that workloads have left behind here.
    #[must_use]
    pub fn serving(&self) -> &Serving {
        &self.shared.serving
    }

    /// Memory of a workload that was given away by `migration`, for the host `asker`.
    ///
    /// # Errors
    /// When the journal can't be read.
    pub async fn pulled(&self, pull: &Pull, asker: HostId) -> Result<Pulled, JournalError> {
        let Pull { migration, workload, epoch, piece, host: _ } = *pull;
        if let Some(pulled) = self.shared.serving.read(migration, asker, piece).await {
            return Ok(pulled);
        }
        Ok(not_served(self.standing(migration, workload, epoch)?))
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

    /// Journals a new workload, sets it running and takes it in.
    ///
    /// # Errors
    /// When the journal can't be written, or it does not run, or somebody stops it before
    /// it does; it is then dropped.
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
        let starting = self.shared.table().starting(record.identity.id).unwrap_or_default();
        let resumed = tokio::select! {
            biased;
            () = starting.called_off.cancelled() => Err(RegistryError::CalledOff(name.clone())),
            resumed = workload.resume() => resumed.map_err(RegistryError::from),
        };
        if let Err(error) = resumed {
            let journal = self.shared.journal.clone();
            workload.discard().await;
            blocking(move || journal.record(&record.identity, &Event::Removed(record.epoch)))
                .await?;
            return Err(error);
        }
        self.take_in(record, Some(workload));
        self.find(&name)
    }

    /// Has a workload that is being started or restored be no more, if `name` is one; how it
    /// stands then.
    async fn call_off(&self, name: &str) -> Option<Status> {
        let status = self.find(name).ok()?;
        let starting = self.shared.table().starting(status.identity.id)?;
        starting.called_off.cancel();
        starting.over.cancelled().await;
        // It may just have begun to run.
        let reason = "its start was called off; nothing of it is left".to_owned();
        let gone = Status { state: State::Stopped, migration: None, reason, ..status };
        (!self.shared.table().owners.contains_key(&gone.identity.id)).then_some(gone)
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

#[cfg(test)]
mod tests;
