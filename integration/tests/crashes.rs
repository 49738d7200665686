//! Daemons are killed in every phase of a move. When they are back, exactly one
//! host runs the guest, its heartbeats go on where they were, and nothing is
//! left anywhere.

use anyhow::{Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::scenario::{Pulse, expect_alive};

/// Which daemons are killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    Source,
    Destination,
    Both,
}

/// Where the guest must be in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Source,
    Destination,
    /// The order of events decides; what counts is that it is one of them.
    Either,
}

/// One daemon stands still at `point`; then some are killed, the rest goes on,
/// and the killed come back.
fn crash(point: &str, killed: Killed, home: Home) -> Result<()> {
    let mut pair = HostPair::prepare()?;
    let at_source = point.starts_with("source");
    if at_source {
        pair.a.halt_at(Some(point));
    } else {
        pair.b.halt_at(Some(point));
    }
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    if at_source {
        pair.a.wait_halted()?
    } else {
        pair.b.wait_halted()?
    }

    if killed != Killed::Destination {
        pair.a.kill()?;
    }
    if killed != Killed::Source {
        pair.b.kill()?;
    }
    match (at_source, killed) {
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
    settled(&pair, pulse.name, home)?;
    pair.finish(pulse.name)
}

/// Waits until exactly one host has it, running, and checks its heartbeats.
fn settled(pair: &HostPair, name: &str, home: Home) -> Result<()> {
    let at_source = pair.runs_at_a(name)?;
    let (here, elsewhere) = if at_source { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    let at = if at_source { Home::Source } else { Home::Destination };
    ensure!(home == Home::Either || home == at, "it is at the {at:?}, not at the {home:?}");
    expect_alive(here, name, 5)?;
    leaks::expect_nothing_left(elsewhere)?;
    let vms = leaks::vm_processes(here.state_dir());
    ensure!(vms.len() == 1, "VM processes at its host: {vms:?}");
    // It is not only there, it can go on moving.
    let to = elsewhere.to();
    let moved = here.ask(&["migrate", name, "--to", &to, "--verify"])?;
    ensure!(moved["outcome"] == "completed", "{moved}");
    expect_alive(elsewhere, name, 5)?;
    Ok(())
}

integration::tests_of! {
    crash:
    source_killed_after_the_offer_keeps_the_guest("source-offered", Killed::Source, Home::Source);
    destination_killed_after_the_offer_leaves_the_guest_at_the_source(
        "source-offered", Killed::Destination, Home::Source
    );
    destination_killed_while_accepting_leaves_the_guest_at_the_source(
        "destination-accepted", Killed::Destination, Home::Source
    );

    source_killed_during_precopy_keeps_the_guest(
        "source-precopy-round", Killed::Source, Home::Source
    );
    destination_killed_during_precopy_leaves_the_guest_at_the_source(
        "source-precopy-round", Killed::Destination, Home::Source
    );
    both_killed_during_precopy_leave_the_guest_at_the_source(
        "source-precopy-round", Killed::Both, Home::Source
    );

    source_killed_after_the_stop_lets_the_guest_go_on(
        "source-frozen", Killed::Source, Home::Source
    );
    destination_killed_after_the_stop_lets_the_guest_go_on_at_the_source(
        "source-frozen", Killed::Destination, Home::Source
    );
    both_killed_after_the_stop_let_the_guest_go_on_at_the_source(
        "source-frozen", Killed::Both, Home::Source
    );
    destination_killed_while_loading_lets_the_guest_go_on_at_the_source(
        "destination-loading", Killed::Destination, Home::Source
    );

    source_killed_after_sealed_takes_the_guest_back("source-sealed", Killed::Source, Home::Source);
    destination_killed_after_sealed_ends_with_one_guest(
        "source-sealed", Killed::Destination, Home::Either
    );
    both_killed_after_sealed_leave_the_guest_at_the_source(
        "source-sealed", Killed::Both, Home::Source
    );
    destination_killed_before_it_said_sealed_leaves_the_guest_at_the_source(
        "destination-sealed", Killed::Destination, Home::Source
    );
    source_killed_before_it_heard_of_sealed_keeps_the_guest(
        "destination-sealed", Killed::Source, Home::Source
    );
    both_killed_before_sealed_was_heard_of_leave_the_guest_at_the_source(
        "destination-sealed", Killed::Both, Home::Source
    );

    source_killed_after_released_has_given_the_guest_away(
        "source-released", Killed::Source, Home::Destination
    );
    destination_killed_after_released_still_gets_the_guest(
        "source-released", Killed::Destination, Home::Destination
    );
    both_killed_after_released_end_with_the_guest_at_the_destination(
        "source-released", Killed::Both, Home::Destination
    );

    destination_killed_before_the_first_instruction_still_runs_the_guest(
        "destination-owned", Killed::Destination, Home::Destination
    );
    source_killed_before_the_first_instruction_has_given_the_guest_away(
        "destination-owned", Killed::Source, Home::Destination
    );
    both_killed_before_the_first_instruction_end_at_the_destination(
        "destination-owned", Killed::Both, Home::Destination
    );
    destination_killed_once_the_guest_runs_keeps_it(
        "destination-running", Killed::Destination, Home::Destination
    );
    source_killed_before_it_noted_the_confirmation_does_not_run_it_again(
        "source-activated", Killed::Source, Home::Destination
    );
}

#[test]
fn a_destination_that_loses_the_sealed_copy_gives_the_guest_back() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.halt_at(Some("source-released"));
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    pair.a.wait_halted()?;
    // The whole destination goes: daemon and VM process.
    pair.b.kill()?;
    leaks::kill_vms(pair.b.state_dir())?;
    pair.b.restart()?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["could not run it", "failed"])?;
    settled(&pair, pulse.name, Home::Source)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_whose_destination_is_lost_is_in_doubt_until_an_operator_decides() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.halt_at(Some("source-released"));
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    pair.a.wait_halted()?;
    pair.b.kill()?;
    leaks::kill_vms(pair.b.state_dir())?;
    pair.a.go_on()?;
    moving.wait()?.expect(6, &["in_doubt", "has not confirmed", &to, "--run-here"])?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("in_doubt"));
    pair.a.migctl(&["rm", pulse.name])?.expect(1, &["doubt"])?;
    pair.a.migctl(&["resume", pulse.name])?.expect(1, &["doubt"])?;

    // It stays so over a restart of the source.
    pair.a.restart()?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("in_doubt"));
    pair.a.migctl(&["force", pulse.name, "--run-here"])?.expect(2, &["--yes"])?;
    pair.a.migctl(&["force", pulse.name, "--run-here", "--yes"])?.ok()?;
    expect_alive(&pair.a, pulse.name, 5)?;

    // The lost host comes back and does not run its copy.
    pair.b.restart()?;
    settled(&pair, pulse.name, Home::Source)?;
    pair.finish(pulse.name)
}
