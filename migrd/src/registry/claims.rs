//! Names and memory that are set aside: for what runs here, and what arrives.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use tokio_util::sync::{CancellationToken, DropGuard};

use super::owner::OwnerHandle;
use super::{Registry, RegistryError, Shared, State, Status};
use crate::migration::destination::{Claim, Host, valid_name};
use crate::migration::journal::{Identity, WorkloadRecord};
use crate::migration::link::{Blocker, Peer};
use crate::units::{Epoch, MigrationId, WorkloadId};
use crate::workload::{Engine, Kind, Manifest, NetAddress, Workload};

#[derive(Default)]
pub(super) struct Table {
    pub(super) owners: BTreeMap<WorkloadId, OwnerHandle>,
    pub(super) arriving: BTreeMap<MigrationId, Arrived>,
    pub(super) under_way: std::collections::BTreeSet<MigrationId>,
}

/// A new workload on its way to its first instruction.
#[derive(Clone, Default)]
pub(super) struct Starting {
    /// It is to be no more.
    pub(super) called_off: CancellationToken,
    /// It runs, or nothing of it is left.
    pub(super) over: CancellationToken,
}

/// An arrival that has a claim on this host.
pub(super) struct Arrived {
    pub(super) workload: WorkloadId,
    pub(super) name: String,
    manifest: Option<Manifest>,
    bytes: u64,
    addresses: Vec<NetAddress>,
    /// It is made on this host, and comes from nowhere.
    new: Option<Starting>,
}

impl Table {
    pub(super) fn name_taken(&self, name: &str) -> bool {
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

    /// The start of a new workload, if that is what happens to it.
    pub(super) fn starting(&self, workload: WorkloadId) -> Option<Starting> {
        let found = self.arriving.values().find(|a| a.workload == workload);
        found.and_then(|arrived| arrived.new.clone())
    }

    /// Memory promised to workloads and not yet touched by them, in bytes.
    pub(super) fn promised(&self) -> u64 {
        let here: u64 = self.owners.values().map(OwnerHandle::untouched).sum();
        here + self.arriving.values().map(|a| a.bytes).sum::<u64>()
    }
}

impl Shared {
    pub(super) fn room(&self, table: &Table, bytes: u64) -> Result<(), Blocker> {
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

    fn addresses(&self, kind: Kind, config: &[u8]) -> Vec<NetAddress> {
        self.engine(kind).map_or_else(Vec::new, |engine| engine.addresses(config))
    }

    /// Whether nobody here has an address of what arrives: two would take each other's
    /// connections, whatever else of them is right.
    fn addresses_free(&self, table: &Table, manifest: &Manifest) -> Result<(), Blocker> {
        let wanted = self.addresses(manifest.kind, &manifest.config);
        if wanted.is_empty() {
            return Ok(());
        }
        let taken = |name: &str, has: &[NetAddress]| match has.iter().find(|a| wanted.contains(a)) {
            None => Ok(()),
            Some(address) => Err(Blocker {
                code: "address-taken".into(),
                message: format!("{name} has {address} on {} already", self.here),
                remedy: "stop or move one of the two; a new one can have another ip=, mac= or tap="
                    .into(),
                host: self.here.clone(),
            }),
        };
        for owner in table.owners.values() {
            let Status { identity, state, .. } = owner.status();
            let other = identity.id != manifest.workload;
            if other && !matches!(state, State::Gone | State::Stopped) {
                taken(&identity.name, &self.addresses(identity.kind, &identity.config))?;
            }
        }
        table.arriving.values().try_for_each(|arrived| taken(&arrived.name, &arrived.addresses))
    }

    pub(super) fn arriving_status(
        &self,
        migration: MigrationId,
        arrived: &Arrived,
    ) -> Option<Status> {
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
            None if arrived.new.is_some() => {
                let reason = "being started or restored here: it is not running yet";
                (State::Migrating, Epoch(0), String::new(), reason)
            }
            None => (State::Migrating, Epoch(0), String::new(), "arriving"),
        };
        let (migration, reason) = (Some(migration), reason.to_owned());
        Some(Status { identity, epoch, state, reason, peer, migration })
    }
}

impl Registry {
    /// Sets a name and memory aside for a workload that is made here.
    ///
    /// # Errors
    /// When the name can't be one or is used, or the memory is not free, or another
    /// workload has one of its addresses.
    pub fn claim_new(&self, manifest: &Manifest) -> Result<Claim, RegistryError> {
        if !valid_name(&manifest.name) {
            return Err(RegistryError::BadName(manifest.name.clone()));
        }
        let mut table = self.shared.table();
        if table.name_taken(&manifest.name) {
            return Err(RegistryError::NameTaken(manifest.name.clone()));
        }
        self.shared.room(&table, manifest.memory_bytes).map_err(RegistryError::NoRoom)?;
        let free = self.shared.addresses_free(&table, manifest);
        free.map_err(RegistryError::AddressTaken)?;
        let id = MigrationId::random();
        Ok(self.insert_claim(&mut table, id, manifest, Some(Starting::default())))
    }

    fn insert_claim(
        &self,
        table: &mut Table,
        id: MigrationId,
        manifest: &Manifest,
        new: Option<Starting>,
    ) -> Claim {
        let over = new.as_ref().map(|starting| starting.over.clone().drop_guard());
        let arrived = Arrived {
            workload: manifest.workload,
            name: manifest.name.clone(),
            manifest: Some(manifest.clone()),
            bytes: manifest.memory_bytes,
            addresses: self.shared.addresses(manifest.kind, &manifest.config),
            new,
        };
        table.arriving.insert(id, arrived);
        Box::new(ClaimGuard { shared: Arc::downgrade(&self.shared), id, _over: over })
    }

    /// Sets aside what a sealed copy found after a restart holds.
    #[must_use]
    pub fn claim_remembered(&self, identity: &Identity, migration: MigrationId) -> Claim {
        let arrived = Arrived {
            workload: identity.id,
            name: identity.name.clone(),
            manifest: None,
            bytes: identity.memory_bytes,
            addresses: self.shared.addresses(identity.kind, &identity.config),
            new: None,
        };
        self.shared.table().arriving.insert(migration, arrived);
        Box::new(ClaimGuard { shared: Arc::downgrade(&self.shared), id: migration, _over: None })
    }
}

/// Gives back what an arrival has claimed.
struct ClaimGuard {
    shared: Weak<Shared>,
    id: MigrationId,
    /// Says so when it was given back.
    _over: Option<DropGuard>,
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
        self.shared.addresses_free(&table, manifest)?;
        if dry_run {
            return Ok(Box::new(()));
        }
        Ok(self.insert_claim(&mut table, migration, manifest, None))
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
