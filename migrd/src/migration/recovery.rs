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
        /// Who still has memory of it.
        filling: Option<Counterpart>,
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
        Ownership::Owned => Duty::Run { paused: record.paused, filling: record.filling.clone() },
        Ownership::Released(to) => Duty::Settle(to.clone()),
        Ownership::Never | Ownership::Gone(_) | Ownership::Removed(_) => Duty::Nothing,
    }
}

/// How `migration` stands at its source, for the destination that holds it
/// sealed. `under_way`: the migration is running in this daemon right now.
///
/// A migration that is not under way and was not released never will be, since
/// its id is not used again. But only the journal that it began from can say
/// so: one that knows nothing of the workload, or nothing as late as the
/// migration, is another host's or an old copy, and must not make the
/// destination drop what may be the last copy.
#[must_use]
pub fn standing_at_source(
    record: Option<&WorkloadRecord>,
    migration: MigrationId,
    epoch: Epoch,
    under_way: bool,
) -> Standing {
    let Some(record) = record else { return Standing::Pending };
    let to = match &record.ownership {
        Ownership::Released(to) | Ownership::Gone(to) | Ownership::Removed(Some(to)) => Some(to),
        Ownership::Never | Ownership::Owned | Ownership::Removed(None) => None,
    };
    if to.is_some_and(|to| to.migration == migration) && record.epoch == epoch {
        return Standing::Released;
    }
    let knows = record.ownership != Ownership::Never && record.epoch.0 >= epoch.0.saturating_sub(1);
    if under_way || !knows { Standing::Pending } else { Standing::Aborted }
}

/// How `migration` stands by the journal of its destination, for the source
/// that has released it in `epoch`; `promised`: the journal says that it will
/// never run here. `None`: the journal knows nothing of it, and a promise never
/// to run it has to be on the disk before the answer.
#[must_use]
pub fn standing_at_destination(
    record: Option<&WorkloadRecord>,
    migration: MigrationId,
    epoch: Epoch,
    promised: bool,
) -> Option<Standing> {
    if promised {
        return Some(Standing::Discarded);
    }
    let record = record?;
    if record.sealed.as_ref().is_some_and(|s| s.from.migration == migration) {
        return Some(Standing::Sealed);
    }
    // Handed back as never run: true even when the promise itself is so old
    // that it was dropped.
    let back = match &record.ownership {
        Ownership::Gone(to) | Ownership::Removed(Some(to)) => to.migration == migration,
        Ownership::Never | Ownership::Owned | Ownership::Released(_) | Ownership::Removed(None) => {
            false
        }
    };
    let from = record.filling.as_ref();
    if record.owned() && from.is_some_and(|from| from.migration == migration) {
        return Some(Standing::Filling);
    }
    match (back, record.epoch >= epoch) {
        (true, _) => Some(Standing::Discarded),
        (false, true) => Some(Standing::Owned),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::journal::{Event, Identity};
    use crate::units::WorkloadId;
    use crate::workload::Kind;

    fn never() -> WorkloadRecord {
        WorkloadRecord::never(Identity {
            id: WorkloadId::random(),
            name: "web".into(),
            kind: Kind::Vm,
            config: Vec::new(),
            memory_bytes: 1,
            cpus: 1,
            created_unix_ms: 0,
        })
    }

    fn after(events: &[Event]) -> WorkloadRecord {
        let step = |record: WorkloadRecord, event| record.after(event).expect("allowed");
        events.iter().fold(never(), step)
    }

    fn to(migration: MigrationId) -> Counterpart {
        Counterpart {
            migration,
            address: "b:1".into(),
            host: crate::units::HostId::from_bytes([9; 16]),
        }
    }

    #[test]
    fn only_the_journal_that_a_migration_began_from_says_that_it_is_over() {
        let id = MigrationId::random();
        let at = |record: Option<&WorkloadRecord>, epoch| {
            standing_at_source(record, id, Epoch(epoch), false)
        };
        assert_eq!(at(None, 2), Standing::Pending, "another daemon at that address");
        assert_eq!(at(Some(&never()), 2), Standing::Pending, "it was never here");
        let owned = after(&[Event::Created]);
        assert_eq!(at(Some(&owned), 2), Standing::Aborted);
        assert_eq!(at(Some(&owned), 3), Standing::Pending, "an older copy of the journal");
        assert_eq!(standing_at_source(Some(&owned), id, Epoch(2), true), Standing::Pending);
    }

    #[test]
    fn a_release_is_answered_for_even_after_the_operator_forgot_it() {
        let id = MigrationId::random();
        let mut events = vec![Event::Created, Event::Released(to(id))];
        for next in [Event::GivenUp, Event::Removed(Epoch(2)), Event::Removed(Epoch(2))] {
            let record = after(&events);
            let standing = standing_at_source(Some(&record), id, Epoch(2), false);
            assert_eq!(standing, Standing::Released, "after {:?}", events.last());
            let other = MigrationId::random();
            let standing = standing_at_source(Some(&record), other, Epoch(2), false);
            assert_eq!(standing, Standing::Aborted, "another migration");
            events.push(next);
        }
    }

    #[test]
    fn what_was_handed_back_is_not_taken_for_owned_when_the_promise_is_forgotten() {
        let id = MigrationId::random();
        let sealed = Sealed { from: to(id), epoch: Epoch(2), paused: false, follows: false };
        let owned = [Event::Sealed(sealed), Event::Activated(id)];
        let standing =
            |record: &WorkloadRecord| standing_at_destination(Some(record), id, Epoch(2), false);
        assert_eq!(standing(&after(&owned[..1])), Some(Standing::Sealed));
        assert_eq!(standing(&after(&owned)), Some(Standing::Owned));
        let back = after(&owned).after(&Event::NeverRan(to(id))).expect("allowed");
        assert_eq!(standing(&back), Some(Standing::Discarded));
        assert_eq!(standing_at_destination(None, id, Epoch(2), false), None);
        assert_eq!(standing_at_destination(None, id, Epoch(2), true), Some(Standing::Discarded));
    }

    #[test]
    fn a_source_hears_that_it_is_needed_until_the_last_of_its_memory_has_come() {
        let id = MigrationId::random();
        let sealed = Sealed { from: to(id), epoch: Epoch(2), paused: false, follows: true };
        let owned = after(&[Event::Sealed(sealed), Event::Activated(id)]);
        let standing =
            |record: &WorkloadRecord| standing_at_destination(Some(record), id, Epoch(2), false);
        assert_eq!(standing(&owned), Some(Standing::Filling));
        assert_eq!(duty(&owned), Duty::Run { paused: false, filling: Some(to(id)) });
        let over = [Event::Filled(id), Event::Removed(Epoch(2))];
        for event in over {
            assert_eq!(standing(&owned.after(&event).expect("allowed")), Some(Standing::Owned));
        }
        let other = MigrationId::random();
        let older = standing_at_destination(Some(&owned), other, Epoch(2), false);
        assert_eq!(older, Some(Standing::Owned), "another migration's source is not needed");
    }
}
