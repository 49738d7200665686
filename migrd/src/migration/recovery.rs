//! What a host does about a record it finds after a start, and what it answers
//! when a peer asks. Pure.

use crate::migration::journal::{Counterpart, Ownership, Sealed, WorkloadRecord};
use crate::migration::link::Standing;
use crate::units::{Epoch, MigrationId};

/// What a record asks of a daemon that has just started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Duty {
    /// It is this host's: take it back, and let it run unless it was paused.
    /// A migration that was under way before the crash is over.
    Run {
        /// It stays paused.
        paused: bool,
    },
    /// It was given away: it must stand still; ask the peer.
    Settle(Counterpart),
    /// It waits here for its source's word: it must stand still; ask the source.
    Await(Sealed),
    /// Nothing of it may be here.
    Nothing,
}

/// The duty of `record`.
#[must_use]
pub fn duty(record: &WorkloadRecord) -> Duty {
    if let Some(sealed) = &record.sealed {
        return Duty::Await(sealed.clone());
    }
    match &record.ownership {
        Ownership::Owned => Duty::Run { paused: record.paused },
        Ownership::Released(to) => Duty::Settle(to.clone()),
        Ownership::Never | Ownership::Gone(_) | Ownership::Removed => Duty::Nothing,
    }
}

/// How `migration` stands at its source, for the destination that holds it
/// sealed. `under_way`: the migration is running in this daemon right now.
///
/// A migration that is not under way and was not released never will be, since
/// its id is not used again.
#[must_use]
pub fn standing_at_source(
    record: Option<&WorkloadRecord>,
    migration: MigrationId,
    epoch: Epoch,
    under_way: bool,
) -> Standing {
    let released = record.is_some_and(|record| match &record.ownership {
        Ownership::Released(to) | Ownership::Gone(to) => {
            to.migration == migration && record.epoch == epoch
        }
        Ownership::Never | Ownership::Owned | Ownership::Removed => false,
    });
    match (released, under_way) {
        (true, _) => Standing::Released,
        (false, true) => Standing::Pending,
        (false, false) => Standing::Aborted,
    }
}
