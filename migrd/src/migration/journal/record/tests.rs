//! Tables of every transition, and random histories replayed from the journal.

use std::sync::Arc;

use proptest::prelude::*;
use redb::{Database, backends::InMemoryBackend};

use super::super::{DISCARDED, DISCARDED_KEPT, Journal, JournalError, META, VERSION, WORKLOADS};
use super::*;
use crate::migration::recovery::{Duty, duty};

fn migration(number: u8) -> MigrationId {
    MigrationId::from_bytes([number; 16])
}

fn peer(number: u8) -> Counterpart {
    Counterpart {
        migration: migration(number),
        address: "b:1".into(),
        host: HostId::from_bytes([9; 16]),
    }
}

fn seal(number: u8, epoch: u64) -> Sealed {
    Sealed { from: peer(number), epoch: Epoch(epoch), paused: false, follows: false }
}

fn identity() -> Identity {
    Identity {
        id: WorkloadId::from_bytes([9; 16]),
        name: "web".into(),
        kind: Kind::Vm,
        config: vec![1, 2],
        memory_bytes: 4096,
        cpus: 1,
        created_unix_ms: 5,
    }
}

fn record(epoch: u64, ownership: Ownership, sealed: Option<Sealed>) -> WorkloadRecord {
    WorkloadRecord { epoch: Epoch(epoch), ownership, sealed, ..WorkloadRecord::never(identity()) }
}

fn in_memory() -> Journal {
    let backend = InMemoryBackend::new();
    let database = Database::builder().create_with_backend(backend).expect("redb");
    Journal::over(database).expect("a journal")
}

/// Every ownership in epoch 4 (0 for one that was never here), with and without
/// a copy of migration 2 sealed in epoch 6.
fn standings() -> Vec<WorkloadRecord> {
    let ownerships = [
        (0, Ownership::Never),
        (4, Ownership::Owned),
        (4, Ownership::Released(peer(1))),
        (4, Ownership::Gone(peer(1))),
        (4, Ownership::Removed(None)),
        (4, Ownership::Removed(Some(peer(1)))),
    ];
    let both = |(epoch, ownership): (u64, Ownership)| {
        [None, Some(seal(2, 6))].map(|sealed| record(epoch, ownership.clone(), sealed))
    };
    ownerships.into_iter().flat_map(both).collect()
}

fn events() -> Vec<Event> {
    vec![
        Event::Created,
        Event::Paused(true),
        Event::Ended("it exited with status 3".into()),
        Event::Released(peer(3)),
        Event::Confirmed(migration(1)),
        Event::Confirmed(migration(3)),
        Event::TakenBack(migration(1)),
        Event::TakenBack(migration(3)),
        Event::Sealed(seal(2, 5)),
        Event::Sealed(seal(2, 4)),
        Event::Activated(migration(2)),
        Event::Activated(migration(3)),
        Event::Filled(migration(2)),
        Event::Discarded(migration(2)),
        Event::Discarded(migration(3)),
        Event::NeverRan(peer(1)),
        Event::ForcedHere,
        Event::GivenUp,
        Event::Removed(Epoch(4)),
        Event::Removed(Epoch(3)),
    ]
}

/// What the table in docs/failure-model.md says: epoch, ownership and whether a
/// sealed copy is left; `None`: refused.
fn expected(before: &WorkloadRecord, event: &Event) -> Option<(u64, Ownership, bool)> {
    use Ownership::{Gone, Never, Owned, Released, Removed};
    let sealed = before.sealed.is_some();
    let removed = |to: Option<Counterpart>| Some((4, Removed(to), false));
    match (&before.ownership, sealed, event) {
        (Never, false, Event::Created) => Some((1, Owned, false)),
        (Owned, _, Event::Paused(_) | Event::Ended(_)) => Some((4, Owned, sealed)),
        (Owned, _, Event::Released(to)) => Some((5, Released(to.clone()), sealed)),
        (Released(to), _, Event::Confirmed(id)) if to.migration == *id => {
            Some((4, Gone(to.clone()), sealed))
        }
        (Released(to), _, Event::TakenBack(id)) if to.migration == *id => Some((5, Owned, sealed)),
        (Never, false, Event::Sealed(_)) => Some((0, Never, true)),
        (Gone(_) | Removed(_), false, Event::Sealed(s)) if s.epoch.0 == 5 => {
            Some((4, before.ownership.clone(), true))
        }
        (_, true, Event::Activated(id)) if *id == migration(2) => Some((6, Owned, false)),
        (kept, true, Event::Discarded(id)) if *id == migration(2) => {
            Some((before.epoch.0, kept.clone(), false))
        }
        (Owned, _, Event::NeverRan(source)) => Some((4, Gone(source.clone()), sealed)),
        (_, true, Event::ForcedHere) => Some((7, Owned, false)),
        (Released(_), false, Event::ForcedHere) => Some((5, Owned, false)),
        (Released(to), _, Event::GivenUp) => Some((4, Gone(to.clone()), sealed)),
        (Owned, false, Event::Removed(Epoch(4))) => removed(None),
        (Gone(to), false, Event::Removed(Epoch(4))) => removed(Some(to.clone())),
        (Removed(to), false, Event::Removed(Epoch(4))) => removed(to.clone()),
        _ => None,
    }
}

#[test]
fn every_event_does_to_every_standing_what_the_table_says() {
    let mut allowed = 0;
    for before in standings() {
        for event in events() {
            let told = format!("{event:?} in {:?}, sealed {:?}", before.ownership, before.sealed);
            let after = before.after(&event);
            match expected(&before, &event) {
                Some((epoch, ownership, sealed)) => {
                    allowed += 1;
                    let after = after.unwrap_or_else(|e| panic!("{told}: {e}"));
                    assert_eq!(after.epoch, Epoch(epoch), "{told}");
                    assert_eq!(after.ownership, ownership, "{told}");
                    assert_eq!(after.sealed.is_some(), sealed, "{told}");
                }
                None => {
                    let refused = after.expect_err(&told).to_string();
                    assert!(refused.contains("web") && refused.contains("does not allow"));
                }
            }
        }
    }
    assert_eq!(allowed, 43, "of {} pairs", standings().len() * events().len());
}

#[test]
fn a_host_runs_only_what_its_record_owns_and_what_is_not_sealed() {
    for standing in standings() {
        let runs = matches!(duty(&standing), Duty::Run { .. });
        assert_eq!(runs, standing.owned() && standing.sealed.is_none(), "{standing:?}");
    }
}

#[test]
fn a_pause_travels_with_the_seal() {
    let paused = Sealed { paused: true, ..seal(2, 2) };
    let never = WorkloadRecord::never(identity());
    let sealed = never.after(&Event::Sealed(paused)).expect("allowed");
    for event in [Event::Activated(migration(2)), Event::ForcedHere] {
        assert!(sealed.after(&event).expect("allowed").paused, "{event:?}");
    }
}

#[test]
fn what_has_memory_at_its_source_is_not_given_away_until_that_has_come() {
    let follows = Sealed { follows: true, ..seal(2, 2) };
    let sealed = WorkloadRecord::never(identity()).after(&Event::Sealed(follows));
    let sealed = sealed.expect("allowed");
    for event in [Event::Activated(migration(2)), Event::ForcedHere] {
        let owned = sealed.after(&event).expect("allowed");
        assert_eq!(owned.filling, Some(peer(2)), "{event:?}");
        owned.after(&Event::Released(peer(3))).expect_err("its memory is not here");
        owned.after(&Event::Filled(migration(3))).expect_err("another migration");
        let whole = owned.after(&Event::Filled(migration(2))).expect("allowed");
        assert_eq!((whole.filling.as_ref(), whole.epoch), (None, owned.epoch));
        whole.after(&Event::Released(peer(3))).expect("allowed");
        whole.after(&Event::Filled(migration(2))).expect_err("it is whole already");
        let back = owned.after(&Event::NeverRan(peer(2))).expect("allowed");
        let removed = owned.after(&Event::Removed(owned.epoch)).expect("allowed");
        assert!(back.filling.is_none() && removed.filling.is_none());
    }
}

#[test]
fn what_has_ended_is_neither_given_away_nor_taken_for_what_never_ran() {
    let owned = WorkloadRecord::never(identity()).after(&Event::Created).expect("allowed");
    let end = Event::Ended("it exited with status 3".into());
    let ended = owned.after(&end).expect("allowed");
    assert_eq!(ended.ended.as_deref(), Some("it exited with status 3"));
    assert_eq!((ended.epoch, ended.owned()), (owned.epoch, true));
    let refused = [end, Event::Released(peer(1)), Event::NeverRan(peer(1)), Event::Paused(true)];
    for event in refused {
        ended.after(&event).expect_err(&format!("{event:?}"));
    }
    let removed = ended.after(&Event::Removed(ended.epoch)).expect("allowed");
    let later = Sealed { epoch: Epoch(2), ..seal(2, 2) };
    let sealed = removed.after(&Event::Sealed(later)).expect("a snapshot of it may come back");
    for event in [Event::Activated(migration(2)), Event::ForcedHere] {
        assert_eq!(sealed.after(&event).expect("allowed").ended, None, "{event:?}");
    }
}

#[test]
fn a_record_of_an_earlier_version_lacks_nothing() {
    let journal = in_memory();
    let whole = journal.record(&identity(), &Event::Sealed(seal(1, 2))).expect("created");
    let text = serde_json::to_string(&whole).expect("encodes");
    let earlier = text.replace(r#","follows":false"#, "").replace(r#","filling":null"#, "");
    let earlier = earlier.replace(r#","ended":null"#, "");
    assert!(earlier.len() + 40 < text.len(), "{text}");
    put_raw(&journal, earlier.as_bytes());
    assert_eq!(journal.get(identity().id).expect("a record"), Some(whole));
}

#[test]
fn a_promise_is_kept_against_every_later_seal_and_activation() {
    let journal = in_memory();
    let write = |event: Event| journal.record(&identity(), &event);
    write(Event::Sealed(seal(1, 2))).expect("a copy arrives");
    write(Event::Discarded(migration(1))).expect("it is given up");
    assert!(journal.is_discarded(migration(1)).expect("readable"));
    let again = write(Event::Sealed(seal(1, 2))).expect_err("promised");
    assert!(matches!(again, JournalError::Promised(id) if id == migration(1)));

    write(Event::Sealed(seal(2, 2))).expect("another migration may come");
    journal.discard_unknown(migration(2)).expect("promised while it is sealed");
    let owned = write(Event::Activated(migration(2))).expect_err("promised");
    assert!(matches!(owned, JournalError::Promised(id) if id == migration(2)));
    assert!(!journal.get(identity().id).expect("readable").expect("a record").owned());
}

#[test]
fn what_was_handed_back_as_never_run_is_promised() {
    let journal = in_memory();
    let write = |event: Event| journal.record(&identity(), &event).expect("allowed");
    write(Event::Sealed(seal(1, 2)));
    write(Event::Activated(migration(1)));
    write(Event::NeverRan(peer(1)));
    assert!(journal.is_discarded(migration(1)).expect("readable"));
}

#[test]
fn the_newest_promise_is_kept_however_many_are_older_and_whatever_the_clock_says() {
    let journal = in_memory();
    let write = journal.begin_write().expect("redb");
    {
        // As if each had been given at a far later time than now.
        let mut table = write.open_table(DISCARDED).expect("redb");
        for number in 0..DISCARDED_KEPT {
            let place = u64::MAX / 2 + u64::try_from(number).expect("small");
            let key = *uuid_of(number).as_bytes();
            table.insert(&key, place).expect("redb");
        }
    }
    write.commit().expect("redb");
    let newest = MigrationId::random();
    journal.discard_unknown(newest).expect("promised");
    let kept = |id| journal.is_discarded(id).expect("readable");
    assert!(kept(newest), "the newest is kept");
    assert!(kept(uuid_of(DISCARDED_KEPT - 1)), "so is the one before");
    assert!(!kept(uuid_of(0)), "the oldest is dropped");
    assert!(kept(uuid_of(DISCARDED_KEPT / 4)), "a quarter is dropped, not more");
}

fn uuid_of(number: usize) -> MigrationId {
    MigrationId::from_bytes(u128::try_from(number).expect("small").to_be_bytes())
}

fn put_raw(journal: &Journal, bytes: &[u8]) {
    let write = journal.begin_write().expect("redb");
    {
        let mut table = write.open_table(WORKLOADS).expect("redb");
        table.insert(identity().id.as_bytes(), bytes).expect("redb");
    }
    write.commit().expect("redb");
}

#[test]
fn a_damaged_record_is_reported_and_never_taken_for_another() {
    let journal = in_memory();
    let whole = journal.record(&identity(), &Event::Created).expect("created");
    let bytes = serde_json::to_vec(&whole).expect("encodes");
    let damaged = |e: JournalError| matches!(e, JournalError::Damaged(_));
    for cut in 0..bytes.len() {
        put_raw(&journal, &bytes[..cut]);
        assert!(damaged(journal.get(identity().id).expect_err("cut short")), "at {cut}");
    }
    let text = String::from_utf8(bytes.clone()).expect("JSON");
    for (known, unknown) in
        [("owned", "owns"), ("\"epoch\":1", "\"epoch\":-1"), ("\"vm\"", "\"x\"")]
    {
        assert!(text.contains(known), "{known} in {text}");
        put_raw(&journal, text.replace(known, unknown).as_bytes());
        assert!(damaged(journal.get(identity().id).expect_err(unknown)), "{unknown}");
        assert!(damaged(journal.all().expect_err(unknown)), "{unknown}");
        let refused = journal.record(&identity(), &Event::Created).expect_err(unknown);
        assert!(damaged(refused), "nothing is written over a damaged record");
    }
    put_raw(&journal, &bytes);
    assert_eq!(journal.get(identity().id).expect("whole again"), Some(whole));
}

#[test]
fn a_kind_is_written_by_its_name_so_that_records_of_earlier_versions_are_read() {
    let journal = in_memory();
    let whole = journal.record(&identity(), &Event::Created).expect("created");
    let text = serde_json::to_string(&whole).expect("encodes");
    assert!(text.contains(r#""kind":"vm""#), "{text}");
    put_raw(&journal, text.replace(r#""kind":"vm""#, r#""kind":"process""#).as_bytes());
    let read = journal.get(identity().id).expect("a record").expect("it is there");
    assert_eq!(read.identity, Identity { kind: Kind::Process, ..identity() });
}

#[test]
fn a_journal_of_a_newer_version_is_left_alone() {
    let memory = Arc::new(InMemoryBackend::new());
    let shared = storage::Shared(memory);
    let open = || Database::builder().create_with_backend(shared.clone()).expect("redb");
    let journal = Journal::over(open()).expect("a journal");
    let write = journal.begin_write().expect("redb");
    {
        let mut meta = write.open_table(META).expect("redb");
        meta.insert("version", [VERSION + 1].as_slice()).expect("redb");
    }
    write.commit().expect("redb");
    drop(journal);
    let newer = Journal::over(open()).err().expect("refused");
    assert!(matches!(newer, JournalError::Newer(v) if v == VERSION + 1), "{newer}");
}

fn any_event() -> impl Strategy<Value = Event> {
    let id = || (1_u8..4).prop_map(migration);
    prop_oneof![
        Just(Event::Created),
        any::<bool>().prop_map(Event::Paused),
        Just(Event::Ended("it was ended by SIGKILL".into())),
        (1_u8..4).prop_map(|n| Event::Released(peer(n))),
        id().prop_map(Event::Confirmed),
        id().prop_map(Event::TakenBack),
        (1_u8..4, 0_u64..9, any::<bool>())
            .prop_map(|(n, e, follows)| Event::Sealed(Sealed { follows, ..seal(n, e) })),
        id().prop_map(Event::Filled),
        id().prop_map(Event::Activated),
        id().prop_map(Event::Discarded),
        (1_u8..4).prop_map(|n| Event::NeverRan(peer(n))),
        Just(Event::ForcedHere),
        Just(Event::GivenUp),
        (0_u64..9).prop_map(|e| Event::Removed(Epoch(e))),
    ]
}

/// Applies `history` to `journal` next to the pure rule and compares.
fn replay(journal: &Journal, history: &[Event]) -> WorkloadRecord {
    let mut pure = WorkloadRecord::never(identity());
    let mut promised = Vec::new();
    for event in history {
        let broken = match event {
            Event::Sealed(s) => promised.contains(&s.from.migration),
            Event::Activated(id) => promised.contains(id),
            _ => false,
        };
        match (journal.record(&identity(), event), pure.after(event)) {
            (Ok(written), Ok(next)) => {
                assert!(!broken, "{event:?} breaks a promise");
                assert_eq!(written, next, "{event:?}");
                assert!(next.epoch >= pure.epoch, "{event:?} lets the epoch fall");
                let copy = next.sealed.as_ref();
                assert!(copy.is_none_or(|s| s.epoch > next.epoch), "{event:?}: an old copy");
                assert!(copy.is_none() || !next.owned(), "{event:?}: owned and sealed");
                let released = matches!(next.ownership, Ownership::Released(_));
                assert!(copy.is_none() || !released, "{event:?}: released and sealed");
                assert!(next.filling.is_none() || next.owned(), "{event:?}: fills and not owned");
                assert!(next.ended.is_none() || next.owned(), "{event:?}: ended and not owned");
                if let Event::Discarded(id) | Event::NeverRan(Counterpart { migration: id, .. }) =
                    event
                {
                    promised.push(*id);
                }
                pure = next;
            }
            (Err(JournalError::Promised(_)), _) => assert!(broken, "{event:?}: no such promise"),
            (Err(JournalError::NotAllowed(_)), Err(_)) => {}
            (written, next) => panic!("{event:?}: {written:?} and {next:?}"),
        }
        let kept = journal.get(identity().id).expect("readable");
        assert_eq!(kept.unwrap_or_else(|| WorkloadRecord::never(identity())), pure);
    }
    for id in &promised {
        assert!(journal.is_discarded(*id).expect("readable"));
    }
    pure
}

proptest! {
    #[test]
    fn any_history_in_the_journal_is_what_the_pure_rule_says(
        history in prop::collection::vec(any_event(), 0..60)
    ) {
        replay(&in_memory(), &history);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_history_is_there_again_when_the_file_is_opened_again(
        history in prop::collection::vec(any_event(), 1..25)
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal.redb");
        let last = replay(&Journal::open(&path).expect("a journal"), &history);
        let again = Journal::open(&path).expect("the same journal");
        let found = again.get(identity().id).expect("readable");
        prop_assert_eq!(found.unwrap_or_else(|| WorkloadRecord::never(identity())), last);
    }
}

mod power_cut;
mod storage;
