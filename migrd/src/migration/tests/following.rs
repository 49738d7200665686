//! A workload whose memory follows when it runs at its destination already.

use std::time::Duration;

use super::failures::{FAULTS, story};
use super::world::{Call, Fault, PAGES, World, request};
use crate::migration::phase::{Mode, Outcome};
use crate::migration::recovery::{Duty, duty};

#[tokio::test]
async fn memory_that_follows_arrives_as_it_was_and_the_report_counts_it() {
    let world = World::new();
    let identity = world.workload(20);
    let guest = world.guest("a", identity.id);
    let report = world.migrate(&identity, "a", "b", request(Mode::Postcopy)).await;
    let report = report.expect("a report");
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.failure);
    assert_eq!((report.mode, report.epoch.0), (Mode::Postcopy, 2));
    assert!(report.tally.after_switch >= PAGES / 2, "{:?}", report.tally);
    assert_eq!(report.tally.lanes.data_pages, 0, "nothing of it went before");
    assert_eq!(world.guest("b", identity.id).lacking(), 0);
    assert_eq!(guest.checksum(), world.guest("b", identity.id).checksum());
    world.assert_exactly_one_runs("followed").await;
    let back = world.migrate(&identity, "b", "a", request(Mode::Postcopy)).await.expect("a report");
    assert_eq!((back.outcome, back.epoch.0), (Outcome::Completed, 3), "{:?}", back.failure);
    world.assert_exactly_one_runs("back").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_single_fault_leaves_exactly_one_running_that_has_everything() {
    let mut happened = 0;
    for call in [Call::Offer, Call::Seal, Call::Activate, Call::Pull] {
        for fault in FAULTS {
            happened += u32::from(story(call, 1, fault, Mode::Postcopy, 0).await);
        }
    }
    // In the middle of what follows, and of the source's questions about it.
    for (call, nth) in [(Call::Pull, 100), (Call::Pull, 255), (Call::Resolve, 1)] {
        for fault in FAULTS {
            happened += u32::from(story(call, nth, fault, Mode::Postcopy, 0).await);
        }
    }
    assert!(happened >= 6 * 9, "only {happened} of the planned faults have happened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemons_that_die_while_memory_follows_go_on_where_they_were() {
    for fault in [Fault::TakerDiesAfter, Fault::GiverDiesAfter, Fault::BothDie, Fault::Cut] {
        let world = World::new();
        let identity = world.workload(0);
        let before = world.guest("a", identity.id).checksum();
        world.plan(Call::Pull, 50, fault);
        let going = world.migrate(&identity, "a", "b", request(Mode::Postcopy));
        let _ = tokio::time::timeout(Duration::from_millis(500), going).await;
        assert!(world.all_happened(), "{fault:?}");
        let kept = world.host("a").journal.get(identity.id).expect("journal").expect("a record");
        assert!(matches!(duty(&kept), Duty::Settle(_)), "{fault:?}: the source let go: {kept:?}");
        assert!(world.guest("b", identity.id).lacking() > 0, "{fault:?}");
        world.heal();
        world.host("a").start();
        world.host("b").start();
        world.assert_exactly_one_runs(&format!("{fault:?}")).await;
        let there = world.guest("b", identity.id);
        assert_eq!((there.lacking(), there.checksum()), (0, before), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_whose_memory_is_lost_at_the_source_is_ended_and_the_report_says_so() {
    let world = World::new();
    let identity = world.workload(0);
    let source = world.guest("a", identity.id);
    world.plan(Call::Pull, 50, Fault::Silence);
    let going = {
        let (world, identity) = (world.clone(), identity.clone());
        tokio::spawn(async move {
            world.migrate(&identity, "a", "b", request(Mode::Postcopy)).await.expect("a report")
        })
    };
    while !world.all_happened() {
        tokio::task::yield_now().await;
    }
    source.end("killed");
    let report = going.await.expect("no panic");
    assert_eq!(report.outcome, Outcome::InDoubt);
    let failure = report.failure.expect("a reason");
    assert!(failure.message.contains("the fake that left is dead"), "{failure:?}");
    assert!(!world.guest("b", identity.id).runs());
    let left = world.host("b").journal.get(identity.id).expect("journal").expect("a record");
    assert_eq!(left.filling, None);
}
