//! A daemon ends and comes back; its guests do not notice.

use anyhow::{Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::scenario::{Pulse, converse, expect_alive, heartbeats};

/// `down` ends daemon `a`; it is started again a while later.
fn survives(down: impl Fn(&mut HostPair) -> Result<()>) -> Result<()> {
    let mut pair = HostPair::start()?;
    let pulse = Pulse::small().cpus(2);
    pulse.run(&pair, &pair.a)?;
    let before = leaks::vm_processes(pair.a.state_dir());
    let inspected = pair.a.ask(&["inspect", pulse.name])?;
    down(&mut pair)?;
    ensure!(leaks::vm_processes(pair.a.state_dir()) == before, "its VM process is another");
    pair.a.start()?;
    expect_alive(&pair.a, pulse.name, 10)?;

    // It is as manageable as before.
    let again = pair.a.ask(&["inspect", pulse.name])?;
    for field in ["kernel", "cmdline", "vmm_pid"] {
        ensure!(again[field] == inspected[field], "{field}: {again}, before: {inspected}");
    }
    let said = ["echo: verify", "pulse verified all errors=0"];
    converse(&pair.a, pulse.name, "verify\n", &said)?;
    pair.a.migctl(&["pause", pulse.name])?.ok()?;
    let paused_at = heartbeats(&pair.a, pulse.name)?.last_pass();

    // A paused guest is still paused after a restart.
    down(&mut pair)?;
    pair.a.start()?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("paused"));
    ensure!(heartbeats(&pair.a, pulse.name)?.last_pass() == paused_at);
    pair.a.migctl(&["resume", pulse.name])?.ok()?;
    pair.there(pulse.name, &["--verify"])?;
    ensure!(expect_alive(&pair.b, pulse.name, 5)?.first == 1);
    pair.finish(pulse.name)
}

#[test]
fn a_daemon_that_is_killed_finds_its_guests_again() -> Result<()> {
    survives(|pair| pair.a.kill())
}

#[test]
fn a_daemon_that_is_asked_to_end_leaves_its_guests_running() -> Result<()> {
    survives(|pair| pair.a.terminate())
}

#[test]
fn a_daemon_that_is_asked_to_end_during_a_move_takes_the_guest_back_first() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.halt_at(Some("source-precopy-round"));
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    pair.a.wait_halted()?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pair.a.pid()?)?),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    pair.a.go_on()?;
    let status = pair.a.wait_ended()?;
    ensure!(status.success(), "{status}: {}", pair.a.log());
    drop(moving);
    pair.a.halt_at(None);
    pair.a.start()?;
    expect_alive(&pair.a, pulse.name, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_whose_process_died_with_the_daemon_is_reported_stopped() -> Result<()> {
    let mut pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    pair.a.kill()?;
    leaks::kill_vms(pair.a.state_dir())?;
    pair.a.start()?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("stopped"));
    pair.a.migctl(&["list"])?.expect(0, &["stopped", "gone"])?;
    let to = pair.b.to();
    pair.a.migctl(&["migrate", pulse.name, "--to", &to])?.expect(3, &["stopped"])?;
    pair.finish(pulse.name)
}

#[test]
fn a_second_daemon_with_the_same_state_directory_refuses_to_start() -> Result<()> {
    let pair = HostPair::start()?;
    let mut second = integration::daemon::Daemon::new("a", pair.directory())?;
    let said = second.start_refused()?;
    ensure!(said.contains("another migrd") || said.contains("in use"), "it says: {said}");
    Ok(())
}
