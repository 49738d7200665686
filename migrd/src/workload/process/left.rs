//! Memory of a tree that has left, as it stays in its processes until the destination has
//! it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use migr_proto::v1::KeeperPhase;

use super::images::frozen::Process;
use super::keeper::Keeper;
use super::receiving::process;
use crate::keeper::cgroup::Cgroup;
use crate::workload::{LeftMemory, Piece, WorkloadError};

/// The processes of a tree that is written and stands still. What was given of them is not
/// remembered: any daemon can give it, any number of times.
pub(super) struct Left {
    keeper: Arc<Keeper>,
    cgroup: PathBuf,
    bytes: u64,
    open: Mutex<BTreeMap<u32, Arc<Process>>>,
}

impl Left {
    /// Of the tree of `keeper`; so many bytes of it were left.
    pub(super) fn new(keeper: &Arc<Keeper>, cgroup: &Path, bytes: u64) -> Self {
        let (keeper, cgroup) = (Arc::clone(keeper), cgroup.to_owned());
        Self { keeper, cgroup, bytes, open: Mutex::default() }
    }

    fn process(&self, number: u32) -> std::io::Result<Arc<Process>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = open.get(&number) {
            return Ok(Arc::clone(found));
        }
        // Only those of this tree's own cgroup.
        let pid = process(&Cgroup::at(&self.cgroup), number)?;
        let found = Arc::new(Process::open(pid, number)?);
        open.insert(number, Arc::clone(&found));
        Ok(found)
    }
}

impl LeftMemory for Left {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, piece: Piece) -> Result<Vec<u8>, WorkloadError> {
        if self.keeper.phase() != KeeperPhase::Dumping {
            return Err(WorkloadError::new("its processes at the source have ended"));
        }
        let length = usize::try_from(piece.len_bytes()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length];
        let read = self
            .process(piece.process)
            .and_then(|process| process.read_late(piece.address, &mut bytes));
        match read {
            Ok(()) => Ok(bytes),
            Err(error) => Err(WorkloadError::caused(
                format!("memory of its process {} can't be read: {error}", piece.process),
                error,
            )),
        }
    }
}
