//! A workload whose memory goes ahead in copies of what has changed.

use std::time::Duration;

use super::failures::FAULTS;
use super::world::{Call, Fault, PAGES, World, request};
use crate::migration::phase::{Mode, Outcome};
use crate::workload::fake::Op;

#[tokio::test]
async fn copies_arrive_whole_and_every_round_is_in_the_report() {
    for parts in [1, 3] {
        let world = World::new();
        let identity = world.workload(20);
        let guest = world.guest("a", identity.id);
        guest.copies_in(parts);
        let mut order = request(Mode::Precopy);
        order.max_downtime = None;
        let report = world.migrate(&identity, "a", "b", order).await.expect("a report");
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.failure);
        assert_eq!((report.mode, report.tally.verified), (Mode::Precopy, Some(true)));
        assert_eq!(guest.checksum(), world.guest("b", identity.id).checksum());
        let rounds = &report.tally.rounds;
        assert!(rounds.len() >= 2, "{rounds:?}");
        assert_eq!(rounds[0].pages, PAGES / 2, "the first copy has everything");
        for pair in rounds.windows(2) {
            assert_eq!(pair[0].dirty_after, pair[1].pages, "{rounds:?}");
        }
        assert_eq!(rounds[1].pages, 20, "{rounds:?}");
        let last = rounds.last().expect("a round");
        assert_eq!(last.dirty_after, 20, "what was written before the stop: {rounds:?}");
        world.assert_exactly_one_runs("in copies").await;
    }
}

#[tokio::test]
async fn a_limit_that_copies_cannot_meet_is_given_up_and_it_runs_on_untracked() {
    let world = World::new();
    let identity = world.workload(100);
    let guest = world.guest("a", identity.id);
    guest.copies_in(2);
    let mut order = request(Mode::Precopy);
    order.max_downtime = Some(Duration::from_nanos(1));
    let report = world.migrate(&identity, "a", "b", order).await.expect("a report");
    assert_eq!(report.outcome, Outcome::Failed);
    let failure = report.failure.expect("a reason");
    assert!(failure.message.contains("dirties memory too fast"), "{failure:?}");
    assert!(guest.runs() && !guest.is_tracked());
    world.assert_exactly_one_runs("not converging").await;
}

#[tokio::test]
async fn a_workload_without_room_for_another_copy_is_stopped_and_moves() {
    let world = World::new();
    let identity = world.workload(100);
    let guest = world.guest("a", identity.id);
    guest.copies_in(1);
    guest.has_room_for(1);
    let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
    let report = report.expect("a report");
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.failure);
    assert_eq!(report.tally.rounds.len(), 1);
    assert_eq!(report.tally.rounds[0].dirty_after, 100);
    world.assert_exactly_one_runs("no room").await;
}

#[tokio::test]
async fn a_copy_that_fails_or_is_cancelled_leaves_it_running_and_untracked() {
    for after in 0..4 {
        for cancelled in [false, true] {
            let world = World::new();
            let identity = world.workload(50);
            let guest = world.guest("a", identity.id);
            guest.copies_in(2);
            if cancelled {
                guest.hangs_after(after);
            } else {
                guest.failing_after(Op::CopyAhead, after, 1);
            }
            let mut order = request(Mode::Precopy);
            order.max_downtime = Some(Duration::ZERO);
            let going = world.migrate(&identity, "a", "b", order);
            let cancelling = async {
                let begun = usize::try_from(after).expect("a few") + 1;
                let count = || guest.calls().iter().filter(|op| **op == Op::CopyAhead).count();
                while cancelled && count() < begun {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                if cancelled {
                    world.cancel.cancel();
                }
            };
            let (report, ()) = tokio::join!(going, cancelling);
            let outcome = if cancelled { Outcome::Cancelled } else { Outcome::Failed };
            let told = format!("after {after} parts, cancelled: {cancelled}");
            assert_eq!(report.expect("a report").outcome, outcome, "{told}");
            assert!(guest.runs() && !guest.is_tracked(), "{told}");
            world.assert_exactly_one_runs(&told).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_single_fault_at_a_copy_leaves_exactly_one_running() {
    let calls = [
        (Call::Lanes, 1),
        (Call::Send, 1),
        (Call::Send, 3),
        (Call::Flush, 1),
        (Call::Flush, 3),
        (Call::Seal, 1),
        (Call::Activate, 1),
    ];
    for (call, nth) in calls {
        for fault in FAULTS {
            let world = World::new();
            let identity = world.workload(30);
            world.guest("a", identity.id).copies_in(2);
            world.plan(call, nth, fault);
            let told = format!("{fault:?} at {call:?} {nth}");
            let mut order = request(Mode::Precopy);
            order.max_downtime = None;
            let going = world.migrate(&identity, "a", "b", order);
            let _ = tokio::time::timeout(Duration::from_millis(700), going).await;
            assert!(world.all_happened(), "{told} has not happened");
            world.heal();
            world.host("a").start();
            world.host("b").start();
            world.assert_exactly_one_runs(&told).await;
        }
    }
}

#[tokio::test]
async fn a_link_that_is_cut_in_a_copy_is_noticed_and_it_runs_on() {
    let world = World::new();
    let identity = world.workload(30);
    let guest = world.guest("a", identity.id);
    guest.copies_in(3);
    world.plan(Call::Flush, 2, Fault::Cut);
    let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
    assert_eq!(report.expect("a report").outcome, Outcome::Failed);
    assert!(guest.runs() && !guest.is_tracked());
    world.heal();
    world.assert_exactly_one_runs("cut in a copy").await;
}
