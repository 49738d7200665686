//! What may be asked while a VM is being moved, and what may not.

use anyhow::{Context, Result, ensure};
use integration::faulty_link::{Fault, FaultyLink};
use integration::host_pair::{HostPair, migrate};
use integration::leaks;
use integration::migctl::Running;
use integration::scenario::{Pulse, expect_alive};
use integration::wait;

/// A move that hangs in precopy for as long as the test needs.
struct Hanging {
    pair: HostPair,
    pulse: Pulse,
    link: FaultyLink,
    moving: Running,
}

impl Hanging {
    fn start(options: &[&str]) -> Result<Self> {
        let pair = HostPair::start()?;
        let pulse = Pulse::small();
        pulse.run(&pair, &pair.a)?;
        let link = FaultyLink::to(pair.b.address(), Fault::StallAfter(8 << 20))?;
        let to = link.address().to_string();
        let args = [&["-o", "json", "migrate", pulse.name, "--to", &to], options].concat();
        let moving = pair.a.start_migctl(&args)?;
        wait::until("the link to stall", || Ok(link.hit().then_some(())))?;
        Ok(Self { pair, pulse, link, moving })
    }

    /// Lets the link work again; the move must complete.
    fn complete(self) -> Result<()> {
        self.link.set(Fault::None);
        let moved = self.moving.wait()?.ok()?.json()?;
        ensure!(moved["outcome"] == "completed", "{moved}");
        expect_alive(&self.pair.b, self.pulse.name, 5)?;
        self.pair.finish(self.pulse.name)
    }
}

#[test]
fn a_second_move_of_the_same_vm_is_refused() -> Result<()> {
    let hanging = Hanging::start(&[])?;
    let to = hanging.pair.b.to();
    let second = hanging.pair.a.migctl(&["migrate", hanging.pulse.name, "--to", &to])?;
    second.expect(3, &["being migrated", "cancel"])?;
    hanging.complete()
}

#[test]
fn stop_rm_and_pause_are_refused_during_a_move() -> Result<()> {
    let hanging = Hanging::start(&[])?;
    let name = hanging.pulse.name;
    let snapshot = hanging.pair.directory().join("snapshot").display().to_string();
    for args in [
        &["stop", name, "--force"][..],
        &["stop", name],
        &["rm", name],
        &["pause", name],
        &["resume", name],
        &["checkpoint", name, "--to", &snapshot],
    ] {
        hanging.pair.a.migctl(args)?.expect(1, &["being migrated", "migctl cancel"])?;
    }
    ensure!(hanging.pair.a.state_of(name)?.as_deref() == Some("migrating"));
    hanging.complete()
}

#[test]
fn the_destination_lets_nobody_touch_what_is_still_arriving() -> Result<()> {
    let hanging = Hanging::start(&[])?;
    let name = hanging.pulse.name;
    for args in [&["stop", name, "--force"][..], &["rm", name], &["pause", name], &["resume", name]]
    {
        let ran = hanging.pair.b.migctl(args)?;
        ensure!(ran.status != 0, "{} did something", ran.command);
    }
    let kernel = hanging.pair.kernel().display().to_string();
    let args = ["run", name, "--kernel", &kernel, "--memory", "64M"];
    hanging.pair.b.migctl(&args)?.expect(1, &[name, "already"])?;
    hanging.complete()
}

#[test]
fn a_move_can_be_watched_from_elsewhere() -> Result<()> {
    let hanging = Hanging::start(&[])?;
    let watcher = hanging.pair.a.start_migctl(&["-o", "json", "watch", hanging.pulse.name])?;
    let list = hanging.pair.a.workloads()?;
    ensure!(list[0]["migration_id"].is_string(), "{list:?}");
    hanging.link.set(Fault::None);
    let watched = watcher.wait()?.ok()?.json()?;
    ensure!(watched["outcome"] == "completed", "{watched}");
    hanging.complete()
}

#[test]
fn cancel_leaves_the_guest_at_the_source_and_nothing_at_the_destination() -> Result<()> {
    let hanging = Hanging::start(&[])?;
    let Hanging { pair, pulse, link, moving } = hanging;
    let cancelled = pair.a.ask(&["cancel", pulse.name])?;
    ensure!(cancelled["cancelling"] == true, "{cancelled}");
    let ran = moving.wait()?;
    ran.expect(5, &["cancelled"])?;
    let result = ran.json()?;
    ensure!(result["outcome"] == "cancelled" && result["epoch"] == 1, "{result}");
    link.cut();
    expect_alive(&pair.a, pulse.name, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    let last = pair.a.ask(&["inspect", pulse.name])?;
    ensure!(last["last_migration"]["outcome"] == "cancelled", "{last}");
    pair.a.migctl(&["cancel", pulse.name])?.expect(1, &["no migration"])?;
    pair.finish(pulse.name)
}

#[test]
fn two_vms_pass_each_other_on_their_way() -> Result<()> {
    let pair = HostPair::start()?;
    let (left, right) =
        (Pulse { name: "left", ..Pulse::small() }, Pulse { name: "right", ..Pulse::small() });
    left.run(&pair, &pair.a)?;
    right.run(&pair, &pair.b)?;
    let (a, b) = (pair.a.to(), pair.b.to());
    let there = pair.a.start_migctl(&["-o", "json", "migrate", left.name, "--to", &b])?;
    let back = pair.b.start_migctl(&["-o", "json", "migrate", right.name, "--to", &a])?;
    there.wait()?.ok().context("a to b")?;
    back.wait()?.ok().context("b to a")?;
    expect_alive(&pair.b, left.name, 5)?;
    expect_alive(&pair.a, right.name, 5)?;
    pair.b.migctl(&["stop", left.name, "--force"])?.ok()?;
    pair.b.migctl(&["rm", left.name])?.ok()?;
    pair.finish(right.name)
}

/// The destination was still making room when the source gave up: what it made
/// was left for ever, and stood in the way of every later move.
#[test]
fn a_migration_given_up_while_the_destination_prepares_leaves_nothing_there() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    migrate(&pair.a, &pair.b, pulse.name, &["--timeout", "1us"])?.expect(4, &["timeout"])?;
    wait::until("the destination has dropped it", || {
        Ok(leaks::expect_nothing_left(&pair.b).is_ok().then_some(()))
    })?;
    pair.there(pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}
