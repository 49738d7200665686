//! Every run of the hand-over between two hosts, explored exhaustively with the
//! real rules: `WorkloadRecord::after`, `duty` and the two standings.
//!
//! The network is a set that only grows: any message ever sent may arrive at
//! any later time, any number of times, in any order, or never. Daemons crash
//! between any two steps and find their way back by the journal. Exploring is
//! breadth first, so the trace of a violation is a shortest one.

mod host;
mod search;

use host::{Host, Message};
use search::{Limits, explore};

/// What two hosts and the network may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The owner starts the next migration, to the other host.
    Start(usize),
    /// The source gives up before the release.
    Abort(usize),
    /// The source journals that it is the other's.
    Release(usize),
    /// A host that has released asks and tells again.
    Settle(usize),
    /// The destination loads what came, or can't.
    Seal(usize, Message, bool),
    /// The destination's first instruction runs, or can't.
    Begin(usize, bool),
    /// The destination has waited long enough: drops or asks.
    Tick(usize),
    /// All memory that followed is there.
    Fill(usize),
    /// A message arrives.
    Deliver(usize, Message),
    /// The daemon dies.
    Crash(usize),
    /// The daemon starts; with `false` a sealed copy did not survive.
    Restart(usize, bool),
    /// An operator gives up what was released, knowing that the peer has it.
    GiveUp(usize),
    /// An operator removes the memory of what is gone.
    Forget(usize),
}

const LIMITS: Limits = Limits { migrations: 0, crashes: 0, operator: false, follows: false };

fn all_is_well(limits: Limits) -> usize {
    let found = explore(limits);
    assert!(found.releases > 0, "{found:?}");
    // With an operator the destination never fails, so nothing comes back.
    assert_eq!(found.taken_back > 0, !limits.operator, "{found:?}");
    found.states
}

#[test]
fn one_migration_with_crashes_of_both_daemons_never_makes_two_or_none() {
    let states = all_is_well(Limits { migrations: 1, crashes: 6, ..LIMITS });
    assert!(states > 900, "only {states} states");
}

#[test]
fn there_and_back_and_again_with_late_messages_never_makes_two_or_none() {
    let states = all_is_well(Limits { migrations: 3, crashes: 2, ..LIMITS });
    assert!(states > 6_000, "only {states} states");
}

#[test]
fn an_operator_who_lets_go_of_what_the_peer_has_never_makes_two_or_none() {
    let states = all_is_well(Limits { migrations: 2, crashes: 2, operator: true, ..LIMITS });
    assert!(states > 6_000, "only {states} states");
}

#[test]
fn memory_that_follows_is_kept_at_the_source_until_it_has_all_come() {
    let states = all_is_well(Limits { migrations: 2, crashes: 3, follows: true, ..LIMITS });
    assert!(states > 6_000, "only {states} states");
}
