//! Options of TCP sockets that CRIU does not carry are there after a move of every mode, and
//! after a restore, of process trees and containers.

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::host_pair::migrate;
use integration::process::served::{ADDRESS, Kind, own_network};
use integration::process::things::{THINGS, answer};
use integration::process::{PYTHON, can_move, wait_for_line};
use integration::two_nets::{Side, TwoNets, on_two_hosts};

const NAME: &str = "options";
const THING: &str = "options of TCP sockets";

/// The program finds its sockets as they were.
fn is_right(host: &Daemon, name: &str, word: &str) -> Result<()> {
    let things = answer(host, name, word)?;
    ensure!(things.get(THING).is_some_and(|state| state == "right"), "{word}: {things:?}");
    ensure!(things.len() == 1, "{things:?}");
    Ok(())
}

/// Moves it, unless this kernel or this CRIU can't do it so, which the plan says; where it is.
fn moves(nets: &TwoNets, at: Side, mode: &str) -> Result<Side> {
    let (from, to) = (nets.daemon(at), nets.daemon(at.other()));
    let plan = migrate(from, to, NAME, &["--mode", mode, "--dry-run"])?;
    if plan.status == 3 && mode != "stop" {
        println!("{mode} is not shown here: {}", plan.stderr);
        return Ok(at);
    }
    let report = migrate(from, to, NAME, &["--mode", mode])?.ok()?.json()?;
    ensure!(report["mode"] == mode, "{report}");
    is_right(to, NAME, mode)?;
    Ok(at.other())
}

fn are_there_after_everything(kind: Kind) -> Result<()> {
    on_two_hosts(move |nets: &mut TwoNets| {
        nets.start()?;
        can_move(&nets.a)?;
        kind.start(nets, NAME, &own_network(ADDRESS), &[PYTHON, "-c", THINGS, "/tmp", THING])?;
        wait_for_line(&nets.a, NAME, "ready")?;
        is_right(&nets.a, NAME, "before")?;
        let mut at = Side::A;
        for mode in ["stop", "precopy", "postcopy"] {
            at = moves(nets, at, mode)?;
        }
        let snapshot = nets.directory().join("snapshot");
        let snapshot = snapshot.to_str().context("not text")?;
        let (here, there) = (nets.daemon(at), nets.daemon(at.other()));
        here.migctl(&["checkpoint", NAME, "--to", snapshot, "--leave-running"])?.ok()?;
        is_right(here, NAME, "left-running")?;
        here.migctl(&["stop", NAME, "--force"])?.ok()?;
        here.migctl(&["rm", NAME])?.ok()?;
        there.migctl(&["restore", "--from", snapshot, "--name", "copy"])?.ok()?;
        is_right(there, "copy", "restored")?;
        nets.remove(at.other(), "copy")
    })
}

#[test]
fn options_of_a_tree_are_there_after_every_move_and_a_restore() -> Result<()> {
    are_there_after_everything(Kind::Process)
}

#[test]
fn options_of_a_container_are_there_after_every_move_and_a_restore() -> Result<()> {
    are_there_after_everything(Kind::Container)
}
