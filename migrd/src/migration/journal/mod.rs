//! The durable word of this host: which workloads it may run.
//!
//! Owns the journal file (redb) and the order in which a record may change.
//! Every change is one transaction that is on the disk when the call returns.
//! Knows nothing of the wire or of kinds of workload.

mod record;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

pub use record::{Counterpart, Event, Identity, NotAllowed, Ownership, Sealed, WorkloadRecord};

use crate::units::{HostId, MigrationId, WorkloadId};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const WORKLOADS: TableDefinition<'_, &[u8; 16], &[u8]> = TableDefinition::new("workloads");
/// Migrations this host will never run, in the order it said so. An id that is in
/// no table is refused just as well, so old ones may be dropped.
const DISCARDED: TableDefinition<'_, &[u8; 16], u64> = TableDefinition::new("discarded");

/// How many promises are kept before the oldest are dropped.
const DISCARDED_KEPT: usize = 4096;
/// Version of the records' encoding.
const VERSION: u8 = 1;

/// The journal could not be read or written, or an event was not allowed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The journal's file.
    #[error(
        "cannot open the journal {path}: {source}; check that the directory is writable and not full, and that no other migrd uses it"
    )]
    Open {
        /// Its path.
        path: String,
        /// What redb said.
        #[source]
        source: Box<redb::Error>,
    },
    /// A transaction failed; nothing of it is in the journal.
    #[error(
        "cannot write the journal: {0}; check that the state directory's file system is not full"
    )]
    Storage(#[source] Box<redb::Error>),
    /// A record can't be read.
    #[error(
        "the journal's record of {0} is damaged; restore the state directory from a backup or remove the workload"
    )]
    Damaged(String),
    /// The journal was written by a newer migrd.
    #[error(
        "the journal is of version {0}, this migrd knows up to {VERSION}; start the newer migrd"
    )]
    Newer(u8),
    /// The event can't follow.
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    /// This host has said that it will never run that migration.
    #[error("this host has discarded migration {0} and will never run it; start a new one")]
    Promised(MigrationId),
}

fn storage(error: impl Into<redb::Error>) -> JournalError {
    JournalError::Storage(Box::new(error.into()))
}

/// The journal of one host. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    file: Arc<JournalFile>,
}

struct JournalFile {
    /// None between a failure and the next attempt to open it again.
    database: RwLock<Option<Database>>,
    /// Where it can be opened again; a backend of a test can't be.
    path: Option<PathBuf>,
    /// A transaction has failed. redb does nothing more with a file after an
    /// I/O error until it is opened again, even if there is room by then.
    suspect: AtomicBool,
}

impl Journal {
    /// Opens the journal at `path`, or makes an empty one.
    ///
    /// # Errors
    /// When the file can't be opened, locked or read, or is of a newer version.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let opened = Database::create(path);
        let database = opened.map_err(|source| JournalError::Open {
            path: path.display().to_string(),
            source: Box::new(source.into()),
        })?;
        Self::made(database, Some(path.to_owned()))
    }

    /// A journal over any redb backend, for tests that make the storage fail.
    ///
    /// # Errors
    /// When the backend can't be read or holds something else.
    pub fn over(database: Database) -> Result<Self, JournalError> {
        Self::made(database, None)
    }

    fn made(database: Database, path: Option<PathBuf>) -> Result<Self, JournalError> {
        let database = RwLock::new(Some(database));
        let file = JournalFile { database, path, suspect: AtomicBool::new(false) };
        let journal = Self { file: Arc::new(file) };
        journal.prepare()?;
        Ok(journal)
    }

    /// Opens the file again if a transaction has failed since it was opened.
    fn recover(&self) -> Result<(), JournalError> {
        let Some(path) = &self.file.path else { return Ok(()) };
        if !self.file.suspect.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut slot = self.file.database.write().unwrap_or_else(PoisonError::into_inner);
        if self.file.suspect.load(Ordering::Acquire) {
            drop(slot.take());
            let opened = Database::create(path).map_err(|source| JournalError::Open {
                path: path.display().to_string(),
                source: Box::new(source.into()),
            })?;
            *slot = Some(opened);
            self.file.suspect.store(false, Ordering::Release);
            tracing::warn!(path = %path.display(), "the journal was opened again after a failure");
        }
        Ok(())
    }

    fn with<T>(
        &self,
        begin: impl FnOnce(&Database) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        self.recover()?;
        let slot = self.file.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = slot.as_ref().ok_or_else(|| storage(redb::StorageError::PreviousIo))?;
        begin(database)
    }

    fn begin_write(&self) -> Result<redb::WriteTransaction, JournalError> {
        self.noticing(self.with(|database| database.begin_write().map_err(storage)))
    }

    fn begin_read(&self) -> Result<redb::ReadTransaction, JournalError> {
        self.noticing(self.with(|database| database.begin_read().map_err(storage)))
    }

    /// Has the file opened again before it is used again, if `result` says that
    /// it failed.
    fn noticing<T>(&self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        if matches!(result, Err(JournalError::Storage(_))) {
            self.file.suspect.store(true, Ordering::Release);
        }
        result
    }

    fn prepare(&self) -> Result<(), JournalError> {
        let write = self.begin_write()?;
        {
            let mut meta = write.open_table(META).map_err(storage)?;
            let version = meta.get("version").map_err(storage)?.map(|v| v.value().first().copied());
            match version {
                None => {
                    meta.insert("version", [VERSION].as_slice()).map_err(storage)?;
                }
                Some(Some(version)) if version > VERSION => {
                    return Err(JournalError::Newer(version));
                }
                Some(_) => {}
            }
            write.open_table(WORKLOADS).map_err(storage)?;
            write.open_table(DISCARDED).map_err(storage)?;
        }
        write.commit().map_err(storage)
    }

    /// This host's id; made at the first call.
    ///
    /// # Errors
    /// When the journal can't be read or written.
    pub fn host_id(&self) -> Result<HostId, JournalError> {
        self.noticing(self.host_id_once())
    }

    fn host_id_once(&self) -> Result<HostId, JournalError> {
        let write = self.begin_write()?;
        let id = {
            let mut meta = write.open_table(META).map_err(storage)?;
            let known = meta.get("host_id").map_err(storage)?.map(|v| v.value().to_vec());
            match known.and_then(|v| <[u8; 16]>::try_from(v).ok()) {
                Some(bytes) => HostId::from_bytes(bytes),
                None => {
                    let id = HostId::random();
                    meta.insert("host_id", id.as_bytes().as_slice()).map_err(storage)?;
                    id
                }
            }
        };
        write.commit().map_err(storage)?;
        Ok(id)
    }

    /// What the journal says of `id`.
    ///
    /// # Errors
    /// When the journal can't be read.
    pub fn get(&self, id: WorkloadId) -> Result<Option<WorkloadRecord>, JournalError> {
        self.noticing(self.get_once(id))
    }

    fn get_once(&self, id: WorkloadId) -> Result<Option<WorkloadRecord>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(WORKLOADS).map_err(storage)?;
        let bytes = table.get(id.as_bytes()).map_err(storage)?;
        bytes.map(|b| decode(id, b.value())).transpose()
    }

    /// Every record.
    ///
    /// # Errors
    /// When the journal can't be read.
    pub fn all(&self) -> Result<Vec<WorkloadRecord>, JournalError> {
        self.noticing(self.all_once())
    }

    fn all_once(&self) -> Result<Vec<WorkloadRecord>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(WORKLOADS).map_err(storage)?;
        let entries = table.iter().map_err(storage)?;
        entries
            .map(|entry| {
                let (key, value) = entry.map_err(storage)?;
                decode(WorkloadId::from_bytes(*key.value()), value.value())
            })
            .collect()
    }

    /// Whether this host has promised never to run `migration`.
    ///
    /// # Errors
    /// When the journal can't be read.
    pub fn is_discarded(&self, migration: MigrationId) -> Result<bool, JournalError> {
        self.noticing(self.is_discarded_once(migration))
    }

    fn is_discarded_once(&self, migration: MigrationId) -> Result<bool, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(DISCARDED).map_err(storage)?;
        Ok(table.get(migration.as_bytes()).map_err(storage)?.is_some())
    }

    /// Lets `event` happen to the workload of `identity`, durably: when this
    /// returns the new record, it is on the disk.
    ///
    /// Waits for the disk; call it where blocking is allowed.
    ///
    /// # Errors
    /// When the event is not allowed or the disk refuses; the record is then
    /// what it was.
    pub fn record(
        &self,
        identity: &Identity,
        event: &Event,
    ) -> Result<WorkloadRecord, JournalError> {
        self.noticing(self.record_once(identity, event))
    }

    fn record_once(
        &self,
        identity: &Identity,
        event: &Event,
    ) -> Result<WorkloadRecord, JournalError> {
        let write = self.begin_write()?;
        let next = {
            let mut table = write.open_table(WORKLOADS).map_err(storage)?;
            let before = match table.get(identity.id.as_bytes()).map_err(storage)? {
                Some(bytes) => decode(identity.id, bytes.value())?,
                None => WorkloadRecord::never(identity.clone()),
            };
            let mut next = before.after(event)?;
            if let Event::Sealed(Sealed { from: Counterpart { migration, .. }, .. })
            | Event::Activated(migration) = event
            {
                let promises = write.open_table(DISCARDED).map_err(storage)?;
                if promises.get(migration.as_bytes()).map_err(storage)?.is_some() {
                    return Err(JournalError::Promised(*migration));
                }
            }
            next.identity = identity.clone();
            let bytes = serde_json::to_vec(&next)
                .map_err(|_| JournalError::Damaged(identity.name.clone()))?;
            table.insert(identity.id.as_bytes(), bytes.as_slice()).map_err(storage)?;
            match event {
                Event::Discarded(migration) | Event::NeverRan(Counterpart { migration, .. }) => {
                    promise(&write, *migration)?
                }
                Event::Created
                | Event::Paused(_)
                | Event::Ended(_)
                | Event::Released(_)
                | Event::Confirmed(_)
                | Event::TakenBack(_)
                | Event::Sealed(_)
                | Event::Activated(_)
                | Event::Filled(_)
                | Event::ForcedHere
                | Event::GivenUp
                | Event::Removed(_) => {}
            }
            next
        };
        write.commit().map_err(storage)?;
        Ok(next)
    }

    /// Promises never to run `migration`, of which the journal knows nothing.
    ///
    /// # Errors
    /// When the disk refuses; nothing is then promised.
    pub fn discard_unknown(&self, migration: MigrationId) -> Result<(), JournalError> {
        self.noticing(self.discard_unknown_once(migration))
    }

    fn discard_unknown_once(&self, migration: MigrationId) -> Result<(), JournalError> {
        let write = self.begin_write()?;
        promise(&write, migration)?;
        write.commit().map_err(storage)
    }
}

fn promise(write: &redb::WriteTransaction, migration: MigrationId) -> Result<(), JournalError> {
    let mut table = write.open_table(DISCARDED).map_err(storage)?;
    let mut given: Vec<(u64, [u8; 16])> = Vec::new();
    for entry in table.iter().map_err(storage)? {
        let (key, place) = entry.map_err(storage)?;
        given.push((place.value(), *key.value()));
    }
    given.sort_unstable();
    // Numbered, not timed: the newest stays the newest if the clock goes back.
    let place = given.last().map_or(0, |(last, _)| last.saturating_add(1));
    table.insert(migration.as_bytes(), place).map_err(storage)?;
    if given.len() >= DISCARDED_KEPT {
        let again = migration.as_bytes();
        for (_, key) in given.iter().filter(|(_, k)| k != again).take(given.len() / 4) {
            table.remove(key).map_err(storage)?;
        }
    }
    Ok(())
}

fn decode(id: WorkloadId, bytes: &[u8]) -> Result<WorkloadRecord, JournalError> {
    serde_json::from_slice(bytes).map_err(|_| JournalError::Damaged(id.to_string()))
}
