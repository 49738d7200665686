//! The way between two daemons breaks, hangs or lies: the guest goes on at the
//! source, and the destination drops what it had.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration::faulty_link::{Fault, FaultyLink};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::scenario::{Pulse, expect_alive};
use integration::wait;

/// In the middle of the pages.
const MIDDLE: u64 = 12 << 20;

fn fails(fault: Fault, options: &[&str], status: i32, words: &[&str]) -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let link = FaultyLink::to(pair.b.address(), fault)?;
    let to = link.address().to_string();
    let args = [&["-o", "json", "migrate", pulse.name, "--to", &to], options].concat();
    let ran = pair.a.migctl(&args)?;
    ensure!(link.hit(), "only {} bytes passed: {}{}", link.passed(), ran.stdout, ran.stderr);
    ran.expect(status, words)?;
    link.cut();
    drop(link);
    expect_alive(&pair.a, pulse.name, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    // Nothing stands in the way of a second try.
    pair.there(pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_connection_cut_during_precopy_leaves_the_guest_at_the_source() -> Result<()> {
    fails(Fault::CutAfter(MIDDLE), &[], 4, &["precopy", "failed"])
}

#[test]
fn a_connection_cut_while_the_guest_stands_still_lets_it_go_on() -> Result<()> {
    fails(Fault::CutAfter(MIDDLE), &["--mode", "stop"], 4, &["stopped", "failed"])
}

#[test]
fn a_connection_cut_at_its_very_beginning_refuses_the_move() -> Result<()> {
    fails(Fault::CutAfter(0), &[], 3, &["migrate"])
}

#[test]
fn a_corrupted_byte_is_noticed() -> Result<()> {
    fails(Fault::CorruptAt(MIDDLE), &[], 4, &["precopy", "failed"])
}

#[test]
fn a_corrupted_byte_is_noticed_while_the_guest_stands_still() -> Result<()> {
    fails(Fault::CorruptAt(MIDDLE), &["--mode", "stop"], 4, &["stopped", "failed"])
}

#[test]
fn bytes_that_are_missing_are_noticed() -> Result<()> {
    fails(Fault::Drop { at: MIDDLE, count: 4096 }, &["--timeout", "20s"], 4, &["failed"])
}

#[test]
fn a_link_that_hangs_is_given_up_when_the_timeout_is_over() -> Result<()> {
    // Not before the link hangs.
    let limit = format!("{}s", 2 * wait::patience()?);
    let words = ["timeout", &limit, "precopy"];
    fails(Fault::StallAfter(MIDDLE), &["--timeout", &limit], 4, &words)
}

#[test]
fn a_slow_link_only_takes_longer() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse { filled: 8, ..Pulse::small() };
    pulse.run(&pair, &pair.a)?;
    let link = FaultyLink::to(pair.b.address(), Fault::Delay(Duration::from_millis(2)))?;
    let to = link.address().to_string();
    let moved = pair.a.ask(&["migrate", pulse.name, "--to", &to, "--max-downtime", "5s"])?;
    ensure!(moved["outcome"] == "completed", "{moved}");
    expect_alive(&pair.b, pulse.name, 5)?;
    drop(link);
    pair.finish(pulse.name)
}
