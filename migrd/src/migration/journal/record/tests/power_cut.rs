//! The power goes at every single operation of the disk.

use super::storage::{Disk, Survivors};
use super::*;

fn open(disk: &Disk) -> Journal {
    let mut builder = Database::builder();
    let database = builder.set_cache_size(1 << 20).create_with_backend(disk.clone());
    Journal::over(database.expect("the file is whole")).expect("a journal")
}

fn kept(disk: &Disk) -> WorkloadRecord {
    let record = open(disk).get(identity().id).expect("not damaged");
    record.unwrap_or_else(|| WorkloadRecord::never(identity()))
}

/// A disk whose journal holds what `history` made.
fn disk_after(history: &[Event]) -> Disk {
    let disk = Disk::default();
    let journal = open(&disk);
    for event in history {
        journal.record(&identity(), event).expect("allowed");
    }
    drop(journal);
    disk
}

/// The irrevocable writes, each with what comes before it.
fn histories() -> Vec<(Vec<Event>, Event)> {
    let sealed = Event::Sealed(seal(1, 2));
    let released = vec![Event::Created, Event::Released(peer(1))];
    vec![
        (vec![], Event::Created),
        (vec![Event::Created], Event::Released(peer(1))),
        (released.clone(), Event::TakenBack(migration(1))),
        (released, Event::Confirmed(migration(1))),
        (vec![], sealed.clone()),
        (vec![sealed.clone()], Event::Activated(migration(1))),
        (vec![sealed.clone()], Event::Discarded(migration(1))),
        (vec![sealed, Event::Activated(migration(1))], Event::NeverRan(peer(1))),
    ]
}

#[test]
fn a_change_that_was_confirmed_survives_any_power_cut() {
    for (history, last) in histories() {
        let disk = disk_after(&history);
        let journal = open(&disk);
        let after = journal.record(&identity(), &last).expect("allowed");
        for survivors in [Survivors::None, Survivors::All, Survivors::Even, Survivors::Odd] {
            let found = kept(&disk.power_cut(survivors));
            assert_eq!(found, after, "{last:?}, {survivors:?}");
        }
        let promises = matches!(last, Event::Discarded(_) | Event::NeverRan(_));
        let again = open(&disk.power_cut(Survivors::None));
        assert_eq!(again.is_discarded(migration(1)).expect("readable"), promises, "{last:?}");
    }
}

#[test]
fn a_power_cut_at_any_operation_leaves_the_record_as_before_or_as_after() {
    let (mut before_seen, mut after_seen, mut failed) = (0, 0, 0);
    for (history, last) in histories() {
        let disk = disk_after(&history);
        let before = kept(&disk);
        let after = before.after(&last).expect("allowed");
        for operations in 0.. {
            let disk = disk.power_cut(Survivors::All);
            let journal = open(&disk);
            disk.fail_after(operations);
            let written = journal.record(&identity(), &last);
            for survivors in [Survivors::None, Survivors::All, Survivors::Even, Survivors::Odd] {
                let cut = disk.power_cut(survivors);
                let found = kept(&cut);
                let told = format!("{last:?} after {operations} operations, {survivors:?}");
                let promised = open(&cut).is_discarded(migration(1)).expect("readable");
                let promises = matches!(last, Event::Discarded(_) | Event::NeverRan(_));
                if found == after {
                    after_seen += 1;
                    assert_eq!(promised, promises, "{told}: the promise comes with the record");
                } else {
                    before_seen += 1;
                    assert_eq!(found, before, "{told}");
                    assert!(written.is_err(), "{told}: Ok means that it is on the disk");
                    assert!(!promised, "{told}");
                }
            }
            // Ends the journal while its disk still fails: a closing daemon
            // must not finish what it said had failed.
            drop(journal);
            if written.is_ok() {
                break;
            }
            failed += 1;
        }
    }
    assert!(before_seen > 50 && after_seen > 30, "{before_seen} before, {after_seen} after");
    assert!(failed > 15, "only {failed} writes were cut");
}
