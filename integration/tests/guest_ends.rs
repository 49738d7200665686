//! The guest itself ends: by its own wish, by a crash, in the middle of a move.

use anyhow::{Result, ensure};
use integration::daemon::Daemon;
use integration::faulty_link::{Fault, FaultyLink};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::migctl::Running;
use integration::scenario::Pulse;
use integration::wait;

/// Types a line on the guest's console.
fn say(host: &Daemon, name: &str, line: &str) -> Result<()> {
    let args = ["console", name, "--detach-after", "1s"];
    Running::start(host.address(), &args, Some(&format!("{line}\n")))?.wait()?;
    Ok(())
}

/// Waits until the guest has counted again after so many resets.
fn counts_again(host: &Daemon, name: &str, resets: usize) -> Result<()> {
    wait::until("the guest to start anew", || {
        let log = host.migctl(&["logs", name])?.ok()?.stdout;
        let since = log.split("pulse again").nth(resets);
        Ok(since.is_some_and(|text| text.contains("pulse pass=3 ")).then_some(()))
    })
}

fn ends(line: &str, words: &[&str]) -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    say(&pair.a, pulse.name, line)?;
    wait::until("the guest to end", || {
        Ok((pair.a.state_of(pulse.name)?.as_deref() == Some("stopped")).then_some(()))
    })?;
    pair.a.migctl(&["inspect", pulse.name])?.expect(0, words)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_that_switches_itself_off_is_stopped_and_says_so() -> Result<()> {
    ends("shutdown", &["stopped", "shut down"])
}

#[test]
fn a_guest_that_resets_itself_starts_anew_on_every_host_it_moves_to() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    say(&pair.a, pulse.name, "reset")?;
    counts_again(&pair.a, pulse.name, 1)?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("running"));
    let moved = pair.there(pulse.name, &["--verify"])?;
    ensure!(moved["verified"] == true, "{moved}");
    say(&pair.b, pulse.name, "reset")?;
    counts_again(&pair.b, pulse.name, 2)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_whose_kernel_is_gone_ends_at_its_reset_and_says_why() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    std::fs::remove_file(pair.kernel())?;
    say(&pair.a, pulse.name, "reset")?;
    wait::until("the guest to end", || {
        Ok((pair.a.state_of(pulse.name)?.as_deref() == Some("stopped")).then_some(()))
    })?;
    let words = ["asked for a reset", "cannot open the kernel"];
    pair.a.migctl(&["inspect", pulse.name])?.expect(0, &words)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_that_cannot_hear_its_power_button_is_not_waited_for() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let deaf = ["does not listen for its power button", "--force"];
    pair.a.migctl(&["stop", pulse.name])?.expect(1, &deaf)?;
    pair.a.migctl(&["pause", pulse.name])?.ok()?;
    pair.a.migctl(&["stop", pulse.name])?.expect(1, &["it is paused", "migctl resume"])?;
    pair.a.migctl(&["resume", pulse.name])?.ok()?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("running"));
    pair.finish(pulse.name)
}

#[test]
fn a_triple_fault_is_reported_as_one() -> Result<()> {
    ends("triple", &["stopped", "triple fault"])
}

/// The source stands still after the first round, with the guest running; the
/// guest ends, and the migration goes on.
fn ends_in_the_middle(line: &str, word: &str) -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    // The line goes through a link that holds back the migration.
    let link = FaultyLink::to(pair.b.address(), Fault::StallAfter(8 << 20))?;
    let to = link.address().to_string();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    wait::until("the link to stall", || Ok(link.hit().then_some(())))?;
    say(&pair.a, pulse.name, line)?;
    let ran = moving.wait()?;
    ran.expect(4, &["ended while it was being moved", word, "failed"])?;
    link.cut();
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("stopped"));
    wait::until("the destination to drop it", || Ok(pair.b.workloads()?.is_empty().then_some(())))?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_that_shuts_down_in_the_middle_of_a_move_stays_stopped_at_the_source() -> Result<()> {
    ends_in_the_middle("shutdown", "shut down")
}

#[test]
fn a_guest_that_resets_in_the_middle_of_a_move_starts_anew_and_can_move_again() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let link = FaultyLink::to(pair.b.address(), Fault::StallAfter(8 << 20))?;
    let to = link.address().to_string();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    wait::until("the link to stall", || Ok(link.hit().then_some(())))?;
    say(&pair.a, pulse.name, "reset")?;
    counts_again(&pair.a, pulse.name, 1)?;
    link.cut();
    moving.wait()?.expect(4, &["failed"])?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("running"));
    wait::until("the destination to drop it", || Ok(pair.b.workloads()?.is_empty().then_some(())))?;
    let moved = pair.there(pulse.name, &["--verify"])?;
    ensure!(moved["verified"] == true, "{moved}");
    pair.finish(pulse.name)
}

#[test]
fn a_guest_that_triple_faults_in_the_middle_of_a_move_stays_stopped_at_the_source() -> Result<()> {
    ends_in_the_middle("triple", "triple fault")
}

#[test]
fn a_vmm_process_that_is_killed_in_the_middle_of_a_move_is_reported_dead() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.halt_at(Some("source-precopy-round"));
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    pair.a.wait_halted()?;
    leaks::kill_vms(pair.a.state_dir())?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["failed"])?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("stopped"));
    wait::until("the destination to drop it", || Ok(pair.b.workloads()?.is_empty().then_some(())))?;
    pair.finish(pulse.name)
}
