//! Memory that workloads have left behind here, for the hosts that they went to.
//!
//! Nothing is remembered of what was given: whoever asks again gets it again, also from a
//! daemon that was restarted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::migration::failpoint;
use crate::migration::link::{Pulled, Standing};
use crate::units::{HostId, MigrationId};
use crate::workload::{LeftMemory, Piece};

/// The memory that is served. Cheap to clone.
#[derive(Clone, Default)]
pub struct Serving(Arc<Mutex<HashMap<MigrationId, Arc<Served>>>>);

/// Memory of one workload.
struct Served {
    /// The only host that gets it.
    to: HostId,
    memory: Arc<dyn LeftMemory>,
    /// The workload is that host's by the journal.
    released: AtomicBool,
    /// How many pages were given.
    pages: AtomicU64,
    /// Why some could not be given.
    lost: Mutex<Option<String>>,
}

/// What somebody hears who asks for memory that is not served, by how the migration stands
/// in the journal here.
#[must_use]
pub fn not_served(standing: Standing) -> Pulled {
    let lost = |why: &str| Pulled::Lost(why.to_owned());
    match standing {
        Standing::Released => lost(
            "the copy at the source that had it is gone: its keeper has ended, or an operator gave \
             it up",
        ),
        Standing::Aborted => lost(
            "it is not this host's by the journal of the source, where an operator may have set \
             it running",
        ),
        Standing::Pending
        | Standing::Sealed
        | Standing::Owned
        | Standing::Filling
        | Standing::Discarded => Pulled::Later("the source does not serve it yet".into()),
    }
}

/// As long as it lives the memory is served.
pub struct Serves {
    all: Serving,
    migration: MigrationId,
    served: Arc<Served>,
}

impl Serving {
    fn lock(&self) -> MutexGuard<'_, HashMap<MigrationId, Arc<Served>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves memory of `migration` to the host `to`.
    #[must_use]
    pub fn serve(&self, migration: MigrationId, to: HostId, memory: Arc<dyn LeftMemory>) -> Serves {
        let (released, pages, lost) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::default());
        let served = Arc::new(Served { to, memory, released, pages, lost });
        self.lock().insert(migration, Arc::clone(&served));
        Serves { all: self.clone(), migration, served }
    }

    /// What `asker` gets; `None` when nothing of that migration is served to it.
    pub async fn read(
        &self,
        migration: MigrationId,
        asker: HostId,
        piece: Piece,
    ) -> Option<Pulled> {
        let served = self.lock().get(&migration).cloned().filter(|served| served.to == asker)?;
        if served.released.load(Ordering::SeqCst) {
            failpoint::wait_at("source-pull").await;
        }
        let reading = Arc::clone(&served);
        let read = tokio::task::spawn_blocking(move || reading.memory.read(piece)).await;
        Some(match read {
            Ok(Ok(bytes)) => {
                served.pages.fetch_add(piece.pages.into(), Ordering::SeqCst);
                Pulled::Bytes(bytes)
            }
            Ok(Err(error)) => {
                let why = error.to_string();
                tracing::error!(%migration, why, "memory that was left behind can't be given");
                *served.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.clone());
                Pulled::Lost(why)
            }
            Err(error) => Pulled::Later(error.to_string()),
        })
    }
}

impl Serves {
    /// The journal says that it was given away.
    pub fn is_released(&self) {
        self.served.released.store(true, Ordering::SeqCst);
    }

    /// How many pages were given so far.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.served.pages.load(Ordering::SeqCst)
    }

    /// How many bytes there are, if that is known; 0 otherwise.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.served.memory.bytes()
    }

    /// Why some could not be given, if that was so.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        self.served.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Serves {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if all.get(&self.migration).is_some_and(|now| Arc::ptr_eq(now, &self.served)) {
            all.remove(&self.migration);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;
    use crate::workload::WorkloadError;

    /// Has zeros everywhere but at address 0, where it has nothing.
    struct Zeros;

    impl LeftMemory for Zeros {
        fn bytes(&self) -> u64 {
            PAGE_SIZE
        }

        fn read(&self, piece: Piece) -> Result<Vec<u8>, WorkloadError> {
            if piece.address == 0 {
                return Err(WorkloadError::new("nothing is there"));
            }
            Ok(vec![0; usize::try_from(piece.len_bytes()).expect("small")])
        }
    }

    fn piece(page: u64, pages: u32) -> Piece {
        Piece { process: 1, address: page * PAGE_SIZE, pages }
    }

    #[tokio::test]
    async fn only_the_host_that_it_was_given_to_gets_memory_and_only_while_it_is_served() {
        let (all, id) = (Serving::default(), MigrationId::random());
        let (to, other) = (HostId::random(), HostId::random());
        assert_eq!(all.read(id, to, piece(1, 2)).await, None, "nothing is served yet");
        let serves = all.serve(id, to, Arc::new(Zeros));
        assert_eq!(all.read(id, other, piece(1, 2)).await, None, "another host");
        assert_eq!(all.read(MigrationId::random(), to, piece(1, 2)).await, None);
        let zeros = Pulled::Bytes(vec![0; 8192]);
        for asked in 1..=2 {
            assert_eq!(all.read(id, to, piece(1, 2)).await, Some(zeros.clone()));
            assert_eq!(serves.pages(), asked * 2, "as often as it is asked");
        }
        assert_eq!(serves.lost(), None);
        let lost = Some(Pulled::Lost("nothing is there".into()));
        assert_eq!(all.read(id, to, piece(0, 1)).await, lost);
        assert_eq!((serves.pages(), serves.lost().as_deref()), (4, Some("nothing is there")));
        drop(serves);
        assert_eq!(all.read(id, to, piece(1, 2)).await, None, "it is over");
    }

    #[tokio::test]
    async fn what_is_served_anew_outlives_what_was_served_before() {
        let (all, id, to) = (Serving::default(), MigrationId::random(), HostId::random());
        let before = all.serve(id, to, Arc::new(Zeros));
        let now = all.serve(id, to, Arc::new(Zeros));
        drop(before);
        assert!(all.read(id, to, piece(1, 1)).await.is_some());
        drop(now);
        assert!(all.read(id, to, piece(1, 1)).await.is_none());
    }

    #[test]
    fn memory_is_lost_only_where_the_journal_says_that_nobody_can_have_it_any_more() {
        for standing in [Standing::Released, Standing::Aborted] {
            assert!(matches!(not_served(standing), Pulled::Lost(_)), "{standing:?}");
        }
        assert!(matches!(not_served(Standing::Pending), Pulled::Later(_)));
    }
}
