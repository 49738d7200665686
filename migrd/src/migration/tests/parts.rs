//! A workload whose rest comes part by part, each written while it stands still.

use std::time::Duration;

use super::failures::{FAULTS, story};
use super::world::{Call, Fault, PAGES, World, request};
use crate::migration::phase::{Mode, Outcome};
use crate::workload::fake::{Guest, Op};

/// What was asked of the guest since it was last frozen.
fn calls_since_the_freeze(guest: &Guest) -> Vec<Op> {
    let calls = guest.calls();
    let frozen = calls.iter().rposition(|op| *op == Op::Freeze).expect("it was frozen");
    calls[frozen + 1..].to_vec()
}

fn count(world: &World, call: Call) -> usize {
    world.calls.lock().expect("no test has panicked").iter().filter(|c| **c == call).count()
}

#[tokio::test]
async fn a_rest_in_three_parts_arrives_whole_and_the_state_is_saved_after_the_last() {
    for (mode, dirties) in [(Mode::Precopy, 20), (Mode::Stop, 20)] {
        let world = World::new();
        let identity = world.workload(dirties);
        let guest = world.guest("a", identity.id);
        guest.in_parts(3);
        let report = world.migrate(&identity, "a", "b", request(mode)).await.expect("a report");
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.failure);
        assert_eq!(report.tally.verified, Some(true));
        assert_eq!(guest.checksum(), world.guest("b", identity.id).checksum());
        let calls = calls_since_the_freeze(&guest);
        let rests = [Op::Rest, Op::Dirty, Op::Rest, Op::Rest, Op::Rest];
        assert_eq!(calls, [&rests[..], &[Op::Save, Op::Hash, Op::LetGo]].concat(), "{mode:?}");
        if mode == Mode::Stop {
            assert_eq!(count(&world, Call::Flush), 1, "all parts are waited for together");
            assert_eq!(report.tally.skipped, PAGES / 2, "what no part has was skipped");
        }
        world.assert_exactly_one_runs("in three parts").await;
    }
}

#[tokio::test]
async fn a_workload_of_which_nothing_is_left_to_send_arrives() {
    let world = World::new();
    let identity = world.workload(0);
    let guest = world.guest("a", identity.id);
    guest.in_parts(3);
    for page in 0..PAGES {
        guest.write_page(page, 0);
    }
    let report = world.migrate(&identity, "a", "b", request(Mode::Stop)).await.expect("a report");
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.failure);
    assert_eq!((count(&world, Call::Send), count(&world, Call::Flush)), (0, 1));
    world.assert_exactly_one_runs("nothing left").await;
}

/// Starts a move in which the flush is never answered, looks at the guest then, and
/// cancels.
async fn stuck_at_flush(parts: u64, look: impl FnOnce(&Guest)) {
    let world = World::new();
    let identity = world.workload(0);
    let guest = world.guest("a", identity.id);
    guest.in_parts(parts);
    world.plan(Call::Flush, 1, Fault::Silence);
    let going = world.migrate(&identity, "a", "b", request(Mode::Stop));
    let looking = async {
        while !world.all_happened() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Whatever the source would do without the answer, it has time for it.
        tokio::time::sleep(Duration::from_millis(20)).await;
        look(&guest);
        world.cancel.cancel();
    };
    let (report, ()) = tokio::join!(going, looking);
    assert_eq!(report.expect("a report").outcome, Outcome::Cancelled);
    assert!(guest.runs(), "an abort leaves it running");
    world.assert_exactly_one_runs("cancelled between the parts").await;
}

#[tokio::test]
async fn parts_are_sent_one_after_the_other_and_the_state_only_when_all_are_in_place() {
    stuck_at_flush(3, |guest| {
        let calls = calls_since_the_freeze(guest);
        assert_eq!(calls, [Op::Rest, Op::Dirty, Op::Rest, Op::Rest, Op::Rest]);
    })
    .await;
}

#[tokio::test]
async fn a_state_that_may_be_saved_early_is_saved_beside_the_first_part() {
    stuck_at_flush(0, |guest| {
        assert_eq!(calls_since_the_freeze(guest), [Op::Rest, Op::Dirty, Op::Save]);
    })
    .await;
}

#[tokio::test]
async fn a_part_that_never_comes_leaves_it_running_at_the_source() {
    for spared in 0..4 {
        for mode in [Mode::Precopy, Mode::Stop] {
            let world = World::new();
            let identity = world.workload(10);
            let guest = world.guest("a", identity.id);
            guest.in_parts(3);
            guest.failing_after(Op::Rest, spared, 1);
            let report = world.migrate(&identity, "a", "b", request(mode)).await.expect("a report");
            assert_eq!(report.outcome, Outcome::Failed);
            let failure = report.failure.expect("a reason");
            assert!(failure.message.contains("fails at Rest"), "{failure:?}");
            assert!(guest.runs(), "after {spared} parts in {mode:?}");
            world.assert_exactly_one_runs("a part that never came").await;
            let again = world.migrate(&identity, "a", "b", request(mode)).await.expect("a report");
            assert_eq!(again.outcome, Outcome::Completed, "{:?}", again.failure);
        }
    }
}

#[tokio::test]
async fn a_workload_that_hangs_over_a_part_can_be_cancelled() {
    let world = World::new();
    let identity = world.workload(10);
    let guest = world.guest("a", identity.id);
    guest.in_parts(3);
    guest.hangs_after(1);
    let going = world.migrate(&identity, "a", "b", request(Mode::Stop));
    let cancelling = async {
        while guest.calls().iter().filter(|op| **op == Op::Rest).count() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.cancel.cancel();
    };
    let (report, ()) = tokio::join!(going, cancelling);
    assert_eq!(report.expect("a report").outcome, Outcome::Cancelled);
    world.assert_exactly_one_runs("cancelled while it was written").await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_goes_deaf_while_a_part_is_written_does_not_hold_it() {
    let world = World::new();
    let identity = world.workload(10);
    let guest = world.guest("a", identity.id);
    guest.in_parts(3);
    guest.hangs_after(1);
    // Right after the part before, so that it is the wait that must end.
    world.plan(Call::Identify, 1, Fault::Deaf);
    let began = tokio::time::Instant::now();
    let report = world.migrate(&identity, "a", "b", request(Mode::Stop)).await.expect("a report");
    let failure = report.failure.expect("a reason");
    assert!(failure.message.contains("no answer within 3s"), "{failure:?}");
    assert!(guest.runs() && began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    world.heal();
    world.assert_exactly_one_runs("deaf while it was written").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_single_fault_at_any_part_leaves_exactly_one_running() {
    let mut happened = 0;
    for (call, nth) in [(Call::Send, 1), (Call::Send, 2), (Call::Send, 3), (Call::Flush, 1)] {
        for fault in FAULTS {
            happened += u32::from(story(call, nth, fault, Mode::Stop, 3).await);
        }
    }
    assert_eq!(happened, 4 * 9, "every planned fault must have happened");
}
