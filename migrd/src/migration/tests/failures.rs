//! Every fault at every call of both sides: never two, never none.

use std::time::Duration;

use super::world::{Call, Fault, World, request};
use crate::migration::phase::{Mode, Outcome};
use crate::workload::fake::Op;

const CALLS: [Call; 6] =
    [Call::Offer, Call::Lanes, Call::Send, Call::Flush, Call::Seal, Call::Activate];
pub(super) const FAULTS: [Fault; 9] = [
    Fault::RequestLost,
    Fault::ReplyLost,
    Fault::TakerDiesBefore,
    Fault::TakerDiesAfter,
    Fault::GiverDiesBefore,
    Fault::GiverDiesAfter,
    Fault::BothDie,
    Fault::Cut,
    Fault::Cancel,
];

#[tokio::test]
async fn a_migration_that_nothing_disturbs_completes_with_the_same_memory() {
    for (mode, dirties) in [(Mode::Precopy, 0), (Mode::Precopy, 20), (Mode::Stop, 20)] {
        let world = World::new();
        let identity = world.workload(dirties);
        let report = world.migrate(&identity, "a", "b", request(mode)).await.expect("a report");
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.failure);
        assert_eq!(report.epoch.0, 2);
        assert_eq!(report.tally.verified, Some(true));
        assert_eq!(report.tally.rounds.is_empty(), mode == Mode::Stop);
        world.assert_exactly_one_runs("undisturbed").await;
        let back = world.migrate(&identity, "b", "a", request(mode)).await.expect("a report");
        assert_eq!((back.outcome, back.epoch.0), (Outcome::Completed, 3), "{:?}", back.failure);
        world.assert_exactly_one_runs("back").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_whose_end_was_not_heard_of_is_not_in_the_way_of_the_next() {
    let world = World::new();
    let identity = world.workload(10);
    world.plan(Call::Seal, 1, Fault::RequestLost);
    world.plan(Call::Abandon, 1, Fault::RequestLost);
    let first = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await.expect("a report");
    assert_eq!(first.outcome, Outcome::Failed);
    assert!(world.all_happened());
    let again = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await.expect("a report");
    assert_eq!(again.outcome, Outcome::Completed, "{:?}", again.failure);
    world.assert_exactly_one_runs("the second attempt").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_never_complete_is_dropped_when_its_source_gives_up() {
    let world = World::new();
    let identity = world.workload(10);
    world.never_loads("b");
    world.plan(Call::Seal, 1, Fault::Cancel);
    let report = world.migrate(&identity, "a", "b", request(Mode::Stop)).await.expect("a report");
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.failure);
    assert!(world.guest("b", identity.id).calls().contains(&Op::Load));
    // It is not in the way of another.
    assert_eq!(world.offer_in(&identity, 2).await, [""; 0]);
    world.assert_exactly_one_runs("given up").await;
}

/// One story: a fault at a call; then the network heals and both daemons run.
pub(super) async fn story(call: Call, nth: u32, fault: Fault, mode: Mode, parts: u64) -> bool {
    let world = World::new();
    let identity = world.workload(30);
    world.guest("a", identity.id).in_parts(parts);
    world.plan(call, nth, fault);
    let told = format!("{fault:?} at {call:?} {nth} in mode {mode:?}, {parts} parts");
    let going = world.migrate(&identity, "a", "b", request(mode));
    let report = tokio::time::timeout(Duration::from_millis(700), going).await;
    let happened = world.all_happened();
    if let Ok(Some(report)) = &report {
        let (runs, _) = world.census.counts();
        match report.outcome {
            Outcome::Completed => assert_eq!(report.epoch.0, 2, "{told}"),
            Outcome::Cancelled | Outcome::Failed => {
                assert!(report.failure.is_some(), "{told}: a failure has a reason");
                let before = report.phase_of_failure();
                if before < crate::migration::phase::Phase::Released {
                    assert_eq!(runs, 1, "{told}: an abort leaves it running");
                }
            }
            Outcome::InDoubt => assert_eq!(runs, 0, "{told}: in doubt does not run"),
        }
    }
    world.heal();
    world.host("a").start();
    world.host("b").start();
    world.assert_exactly_one_runs(&told).await;
    happened
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_single_fault_leaves_exactly_one_running() {
    let mut happened = 0;
    for call in CALLS {
        for fault in FAULTS {
            for mode in [Mode::Precopy, Mode::Stop] {
                happened += u32::from(story(call, 1, fault, mode, 0).await);
            }
        }
    }
    assert_eq!(happened, 6 * 9 * 2, "every planned fault must have happened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_fault_while_settling_leaves_exactly_one_running() {
    let settling = [Call::Activate, Call::Resolve, Call::Abandon];
    let mut happened = 0;
    for first in [Fault::RequestLost, Fault::ReplyLost, Fault::TakerDiesBefore] {
        for call in settling {
            for fault in FAULTS {
                let world = World::new();
                let identity = world.workload(10);
                let at = if call == Call::Abandon { Call::Seal } else { Call::Activate };
                world.plan(at, 1, first);
                world.plan(call, if call == Call::Activate { 2 } else { 1 }, fault);
                let told = format!("{first:?} at {at:?}, then {fault:?} at {call:?}");
                let going = world.migrate(&identity, "a", "b", request(Mode::Precopy));
                let _ = tokio::time::timeout(Duration::from_millis(300), going).await;
                world.host("b").start();
                tokio::time::sleep(Duration::from_millis(60)).await;
                happened += u32::from(world.all_happened());
                world.heal();
                world.host("a").start();
                world.host("b").start();
                world.assert_exactly_one_runs(&told).await;
            }
        }
    }
    assert!(happened > 40, "only {happened} stories had both faults");
}

#[tokio::test]
async fn a_workload_that_fails_at_any_step_of_the_source_keeps_running_there() {
    let ops = [
        Op::StartTracking,
        Op::Dirty,
        Op::Clear,
        Op::Drain,
        Op::Freeze,
        Op::Rest,
        Op::Save,
        Op::Hash,
        Op::LetGo,
    ];
    for op in ops {
        for mode in [Mode::Precopy, Mode::Stop] {
            let world = World::new();
            let identity = world.workload(10);
            let guest = world.guest("a", identity.id);
            guest.failing_at(op, 1);
            let report = world.migrate(&identity, "a", "b", request(mode)).await.expect("report");
            if mode == Mode::Stop && matches!(op, Op::StartTracking | Op::Clear) {
                assert_eq!(report.outcome, Outcome::Completed);
                continue;
            }
            assert_eq!(report.outcome, Outcome::Failed, "{op:?}");
            assert!(guest.runs(), "{op:?} in {mode:?} leaves it running at the source");
            world.assert_exactly_one_runs(&format!("{op:?}")).await;
        }
    }
}

#[tokio::test]
async fn a_destination_that_cannot_load_or_start_gives_it_back() {
    for (op, times) in [(Op::Load, 1), (Op::Start, 9)] {
        let world = World::new();
        let identity = world.workload(10);
        world.fail_at("b", op, times);
        let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
        let report = report.expect("a report");
        assert_eq!(report.outcome, Outcome::Failed, "{op:?}");
        assert!(world.guest("a", identity.id).runs(), "{op:?}");
        world.assert_exactly_one_runs(&format!("{op:?}")).await;
        if op == Op::Start {
            assert_eq!(report.epoch.0, 3, "taken back two epochs on");
        }
        world.fail_at("b", op, 0);
        let again = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
        assert_eq!(again.expect("a report").outcome, Outcome::Completed, "after {op:?}");
    }
}

#[tokio::test]
async fn a_start_that_fails_once_is_tried_again() {
    let world = World::new();
    let identity = world.workload(10);
    world.fail_at("b", Op::Start, 1);
    let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
    assert_eq!(report.expect("a report").outcome, Outcome::Completed);
    world.assert_exactly_one_runs("second start").await;
}

#[tokio::test]
async fn a_workload_that_dirties_too_much_is_refused_with_the_numbers() {
    let world = World::new();
    let identity = world.workload(400);
    let mut request = request(Mode::Precopy);
    request.max_downtime = Some(Duration::ZERO);
    let report = world.migrate(&identity, "a", "b", request).await.expect("a report");
    assert_eq!(report.outcome, Outcome::Failed);
    let failure = report.failure.expect("a reason");
    assert!(failure.message.contains("dirties memory too fast"), "{failure:?}");
    assert!(failure.remedy.contains("--max-downtime"), "{failure:?}");
    world.assert_exactly_one_runs("not converging").await;
}

#[tokio::test]
async fn a_workload_that_ends_meanwhile_is_reported_and_runs_nowhere() {
    let world = World::new();
    let identity = world.workload(0);
    world.guest("a", identity.id).end("the guest shut down");
    let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
    let failure = report.expect("a report").failure.expect("a reason");
    assert!(failure.message.contains("the guest shut down"), "{failure:?}");
    assert_eq!(world.census.counts().0, 0);
    assert!(world.host("b").journal.all().expect("journal").is_empty());
}

#[tokio::test]
async fn a_timeout_ends_the_migration_and_the_workload_goes_on() {
    let world = World::new();
    let identity = world.workload(400);
    let mut request = request(Mode::Precopy);
    request.timeout = Some(Duration::ZERO);
    let report = world.migrate(&identity, "a", "b", request).await.expect("a report");
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.failure.expect("a reason").message.contains("timeout"));
    world.assert_exactly_one_runs("timed out").await;
}

#[tokio::test]
async fn a_paused_workload_arrives_paused() {
    let world = World::new();
    let identity = world.workload(0);
    world.pause("a", &identity);
    let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
    assert_eq!(report.expect("a report").outcome, Outcome::Completed);
    assert_eq!(world.census.counts().0, 0, "nobody resumed it");
    let record = world.host("b").journal.get(identity.id).expect("journal").expect("a record");
    assert!(record.owned() && record.paused);
}

#[tokio::test]
async fn a_batch_that_never_arrived_is_missed_before_the_seal() {
    let world = World::new();
    let identity = world.workload(10);
    world.plan(Call::Send, 1, Fault::Swallowed);
    let mut request = request(Mode::Precopy);
    request.verify = false;
    let report = world.migrate(&identity, "a", "b", request).await.expect("a report");
    assert!(world.all_happened());
    assert_eq!(report.outcome, Outcome::Failed);
    let failure = report.failure.expect("a reason");
    assert!(failure.message.contains("did not arrive whole"), "{failure:?}");
    world.assert_exactly_one_runs("a batch was swallowed").await;
}

#[tokio::test]
async fn lanes_are_closed_when_the_copy_is_sealed() {
    let world = World::new();
    let identity = world.workload(10);
    let report = world.migrate(&identity, "a", "b", request(Mode::Precopy)).await;
    assert!(world.lanes_are_closed(report.expect("a report").migration));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_answers_is_given_up_and_the_workload_goes_on() {
    for call in [Call::Offer, Call::Lanes, Call::Seal] {
        let world = World::new();
        let identity = world.workload(10);
        world.plan(call, 1, Fault::Silence);
        let going = world.migrate(&identity, "a", "b", request(Mode::Stop));
        let report = tokio::time::timeout(Duration::from_secs(3600), going).await;
        let report = report.expect("it ends").expect("a report");
        let failure = report.failure.expect("a reason");
        assert!(failure.message.contains("no answer within"), "{call:?}: {failure:?}");
        assert!(world.guest("a", identity.id).runs(), "{call:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_gone_deaf_does_not_hold_a_workload_that_stands_still() {
    for call in [Call::Flush, Call::Seal] {
        let world = World::new();
        let identity = world.workload(10);
        world.plan(call, 1, Fault::Deaf);
        let began = tokio::time::Instant::now();
        let going = world.migrate(&identity, "a", "b", request(Mode::Stop));
        let guest = world.guest("a", identity.id);
        let back = async {
            while !(world.all_happened() && guest.runs()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            began.elapsed()
        };
        let (report, stood) = tokio::join!(going, back);
        let failure = report.expect("a report").failure.expect("a reason");
        assert!(failure.message.contains("no answer within 3s"), "{call:?}: {failure:?}");
        // By the paused clock, which only waits move.
        assert!(stood < Duration::from_secs(4), "{call:?}: it stood still for {stood:?}");
        world.heal();
        world.assert_exactly_one_runs("the peer went deaf").await;
    }
}

#[tokio::test]
async fn an_epoch_that_leaves_no_room_for_the_next_is_refused() {
    for epoch in [0, 1, u64::MAX - 1, u64::MAX] {
        let world = World::new();
        let identity = world.workload(0);
        let blockers = world.offer_in(&identity, epoch).await;
        assert_eq!(blockers, ["bad-epoch"], "epoch {epoch}");
    }
    let world = World::new();
    let identity = world.workload(0);
    assert!(world.offer_in(&identity, 2).await.is_empty());
}
