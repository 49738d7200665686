//! Daemons, CRIU and whole hosts are killed in every phase of a move of a process
//! tree. Afterwards exactly one host runs it, it has lost no number and repeated
//! none, and nothing is left anywhere.

use std::fs;

use anyhow::{Context, Result, ensure};
use integration::faulty_link::{Fault, FaultyLink};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::migctl::Running;
use integration::process::left::{self, Keeper};
use integration::process::{Counter, can_move, hosts, moves, start_moving, wait_for_state};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Which daemons are killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    Source,
    Destination,
    Both,
}

/// Where the processes must be in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Source,
    Destination,
    /// The order of events decides; what counts is that it is one of them.
    Either,
}

/// Two daemons, of which the one that `point` is about stands still there, in the
/// middle of a move of `counter`.
fn halted(point: &str, counter: Counter) -> Result<(HostPair, Running)> {
    let mut pair = HostPair::without_kvm()?;
    let at_source = point.starts_with("source");
    if at_source {
        pair.a.halt_at(Some(point));
    } else {
        pair.b.halt_at(Some(point));
    }
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    counter.run(&pair.a)?;
    let moving = start_moving(&pair.a, &pair.b.to(), counter.name)?;
    if at_source {
        pair.a.wait_halted()?;
    } else {
        pair.b.wait_halted()?;
    }
    Ok((pair, moving))
}

/// One daemon stands still at `point`; then some are killed, the rest goes on,
/// and the killed come back.
fn crash(point: &str, killed: Killed, home: Home) -> Result<()> {
    let counter = Counter::small();
    let (mut pair, moving) = halted(point, counter)?;
    if killed != Killed::Destination {
        pair.a.kill()?;
    }
    if killed != Killed::Source {
        pair.b.kill()?;
    }
    match (point.starts_with("source"), killed) {
        (true, Killed::Destination) => pair.a.go_on()?,
        (false, Killed::Source) => pair.b.go_on()?,
        _ => {}
    }
    if killed != Killed::Destination {
        pair.a.restart()?;
    }
    if killed != Killed::Source {
        pair.b.restart()?;
    }
    drop(moving);
    settled(&pair, counter, home)?;
    pair.finish(counter.name)
}

/// Waits until exactly one host has it, running, and checks that it counts on.
fn settled(pair: &HostPair, counter: Counter, home: Home) -> Result<()> {
    let name = counter.name;
    let at_source = pair.runs_at_a(name)?;
    let (here, elsewhere) = if at_source { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    let at = if at_source { Home::Source } else { Home::Destination };
    ensure!(home == Home::Either || home == at, "it is at the {at:?}, not at the {home:?}");
    counter.counts(here, 5)?;
    leaks::expect_nothing_left(elsewhere)?;
    let keepers = left::keepers(here.state_dir());
    ensure!(keepers.len() == 1, "keepers at its host: {keepers:?}");
    // It is not only there, it can go on moving.
    moves(here, elsewhere, name, &["--verify"])?;
    counter.counts(elsewhere, 5)?;
    Ok(())
}

integration::tests_of! {
    crash:
    source_killed_before_the_stop_keeps_the_processes(
        "source-stopped", Killed::Source, Home::Source
    );
    destination_killed_before_the_stop_leaves_the_processes_at_the_source(
        "source-stopped", Killed::Destination, Home::Source
    );
    both_killed_before_the_stop_leave_the_processes_at_the_source(
        "source-stopped", Killed::Both, Home::Source
    );

    source_killed_while_criu_writes_lets_the_processes_go_on(
        "source-frozen", Killed::Source, Home::Source
    );
    destination_killed_while_criu_writes_lets_the_processes_go_on(
        "source-frozen", Killed::Destination, Home::Source
    );
    both_killed_while_criu_writes_let_the_processes_go_on(
        "source-frozen", Killed::Both, Home::Source
    );
    destination_killed_before_criu_reads_lets_the_processes_go_on(
        "destination-loading", Killed::Destination, Home::Source
    );

    source_killed_after_sealed_takes_the_processes_back(
        "source-sealed", Killed::Source, Home::Source
    );
    destination_killed_after_sealed_ends_with_one_tree(
        "source-sealed", Killed::Destination, Home::Either
    );
    both_killed_after_sealed_leave_the_processes_at_the_source(
        "source-sealed", Killed::Both, Home::Source
    );
    destination_killed_before_it_said_sealed_leaves_the_processes_at_the_source(
        "destination-sealed", Killed::Destination, Home::Source
    );
    source_killed_before_it_heard_of_sealed_keeps_the_processes(
        "destination-sealed", Killed::Source, Home::Source
    );
    both_killed_before_sealed_was_heard_of_leave_the_processes_at_the_source(
        "destination-sealed", Killed::Both, Home::Source
    );

    source_killed_after_released_has_given_the_processes_away(
        "source-released", Killed::Source, Home::Destination
    );
    destination_killed_after_released_still_gets_the_processes(
        "source-released", Killed::Destination, Home::Destination
    );
    both_killed_after_released_end_with_the_processes_at_the_destination(
        "source-released", Killed::Both, Home::Destination
    );

    destination_killed_before_the_first_instruction_still_runs_the_processes(
        "destination-owned", Killed::Destination, Home::Destination
    );
    source_killed_before_the_first_instruction_has_given_the_processes_away(
        "destination-owned", Killed::Source, Home::Destination
    );
    both_killed_before_the_first_instruction_end_at_the_destination(
        "destination-owned", Killed::Both, Home::Destination
    );
    destination_killed_once_the_processes_run_keeps_them(
        "destination-running", Killed::Destination, Home::Destination
    );
    source_killed_before_it_noted_the_confirmation_does_not_run_them_again(
        "source-activated", Killed::Source, Home::Destination
    );
}

#[test]
fn a_destination_that_loses_the_restored_processes_gives_them_back() -> Result<()> {
    let counter = Counter::small();
    let (mut pair, moving) = halted("source-released", counter)?;
    // The whole destination goes: daemon, keeper and processes.
    pair.b.kill()?;
    left::kill_trees(pair.b.state_dir())?;
    pair.b.restart()?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["could not run it", "failed"])?;
    settled(&pair, counter, Home::Source)?;
    pair.finish(counter.name)
}

#[test]
fn a_keeper_that_is_killed_in_the_middle_of_a_move_is_reported_dead() -> Result<()> {
    let counter = Counter::small();
    let (pair, moving) = halted("source-stopped", counter)?;
    left::kill_trees(pair.a.state_dir())?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["failed"])?;
    wait_for_state(&pair.a, counter.name, "stopped")?;
    wait::until("the destination to drop it", || Ok(pair.b.workloads()?.is_empty().then_some(())))?;
    pair.finish(counter.name)
}

fn keeper_of(pair: &HostPair) -> Result<Keeper> {
    left::keepers(pair.a.state_dir()).pop().context("no keeper at the source")
}

/// Where CRIU is when it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Criu {
    /// It has just been started.
    Begins,
    /// It has written everything and waits for the word.
    Waits,
}

impl Criu {
    /// Where the source's daemon stands still then: without it CRIU comes to no end,
    /// since it sends it memory.
    fn failpoint(self) -> &'static str {
        match self {
            Self::Begins => "source-frozen",
            Self::Waits => "source-written",
        }
    }
}

/// A move during which CRIU is killed there, while the source's daemon stands still.
fn criu_killed(place: Criu) -> Result<(Counter, HostPair, Running)> {
    let counter = Counter { memory: 64, depth: 4, ..Counter::small() };
    let (pair, moving) = halted(place.failpoint(), counter)?;
    let keeper = keeper_of(&pair)?;
    let mut waits = 0;
    let criu = wait::until("CRIU to be at the right place", || {
        let Some(criu) = keeper.criu() else { return Ok(None) };
        let (held, all) = keeper.held_by(criu)?;
        let frozen = fs::read_to_string(keeper.cgroup.join("cgroup.freeze"))?.trim() == "1";
        // The tree is thawed once CRIU has every process, and frozen again when all is
        // written. That CRIU has all and the tree is not thawed yet is so for a moment.
        waits = if held == all && frozen { waits + 1 } else { 0 };
        let due = match place {
            Criu::Begins => true,
            Criu::Waits => waits == 5,
        };
        Ok(due.then_some(criu))
    })?;
    kill(Pid::from_raw(i32::try_from(criu)?), Signal::SIGKILL)?;
    Ok((counter, pair, moving))
}

#[test]
fn processes_count_on_when_criu_is_killed_as_it_begins() -> Result<()> {
    let (counter, pair, moving) = criu_killed(Criu::Begins)?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["failed", "criu"])?;
    settled(&pair, counter, Home::Source)?;
    pair.finish(counter.name)
}

/// The images are complete, and the tree stands still without CRIU, too.
#[test]
fn a_move_completes_when_criu_is_killed_after_it_has_written_everything() -> Result<()> {
    let (counter, pair, moving) = criu_killed(Criu::Waits)?;
    pair.a.go_on()?;
    moving.wait()?.ok()?;
    settled(&pair, counter, Home::Destination)?;
    pair.finish(counter.name)
}

#[test]
fn a_tree_that_stands_still_without_its_criu_goes_on_when_the_move_fails() -> Result<()> {
    let (counter, mut pair, moving) = criu_killed(Criu::Waits)?;
    pair.b.kill()?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["failed"])?;
    pair.b.restart()?;
    settled(&pair, counter, Home::Source)?;
    pair.finish(counter.name)
}

#[test]
fn a_move_that_is_cancelled_while_they_stand_still_lets_them_go_on() -> Result<()> {
    let pair = hosts()?;
    let counter = Counter { memory: 32, ..Counter::small() };
    counter.run(&pair.a)?;
    let link = FaultyLink::to(pair.b.address(), Fault::StallAfter(4 << 20))?;
    let moving = start_moving(&pair.a, &link.address().to_string(), counter.name)?;
    wait::until("the link to stall", || Ok(link.hit().then_some(())))?;
    let cancelled = pair.a.ask(&["cancel", counter.name])?;
    ensure!(cancelled["cancelling"] == true, "{cancelled}");
    let ran = moving.wait()?;
    ran.expect(5, &["cancelled"])?;
    let report = ran.json()?;
    ensure!(report["outcome"] == "cancelled" && report["epoch"] == 1, "{report}");
    link.cut();
    settled(&pair, counter, Home::Source)?;
    pair.finish(counter.name)
}
