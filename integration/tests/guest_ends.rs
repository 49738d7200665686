//! The guest itself ends: by its own wish, by a crash, in the middle of a move.

use anyhow::{Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::migctl::Running;
use integration::scenario::Pulse;
use integration::wait;

fn ends(line: &str, words: &[&str]) -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let args = ["console", pulse.name, "--detach-after", "1s"];
    let typed = format!("{line}\n");
    Running::start(pair.a.address(), &args, Some(&typed))?.wait()?;
    wait::until("the guest to end", || {
        Ok((pair.a.state_of(pulse.name)?.as_deref() == Some("stopped")).then_some(()))
    })?;
    pair.a.migctl(&["inspect", pulse.name])?.expect(0, words)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_that_resets_itself_is_stopped_and_says_so() -> Result<()> {
    ends("shutdown", &["stopped", "reset"])
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
    let link = integration::faulty_link::FaultyLink::to(
        pair.b.address(),
        integration::faulty_link::Fault::StallAfter(8 << 20),
    )?;
    let to = link.address().to_string();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    wait::until("the link to stall", || Ok(link.hit().then_some(())))?;
    let args = ["console", pulse.name, "--detach-after", "1s"];
    Running::start(pair.a.address(), &args, Some(&format!("{line}\n")))?.wait()?;
    let ran = moving.wait()?;
    ran.expect(4, &["ended while it was being moved", word, "failed"])?;
    link.cut();
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("stopped"));
    wait::until("the destination to drop it", || Ok(pair.b.workloads()?.is_empty().then_some(())))?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_that_resets_in_the_middle_of_a_move_stays_stopped_at_the_source() -> Result<()> {
    ends_in_the_middle("shutdown", "reset")
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
