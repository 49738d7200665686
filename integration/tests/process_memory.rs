//! Memory of every kind arrives as it was, also where CRIU does not copy it into images
//! and where it follows a tree that runs already.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::process::left::{self, Keeper};
use integration::process::{
    PYTHON, can_move, exec, hosts, moved, moves, start_moving, type_line, wait_for_line,
    wait_for_state,
};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const KINDS: &str = include_str!("../src/process/kinds.py");
const FREES: &str = include_str!("../src/process/frees.py");
const NAME: &str = "kinds";
/// So much memory (MiB) that it is not all there at once.
const MUCH: u32 = 400;

fn run(pair: &HostPair, mib: u32, children: u32) -> Result<()> {
    let (mib, children) = (mib.to_string(), children.to_string());
    exec(&pair.a, NAME, &[], &[PYTHON, "-c", KINDS, &mib, &children])?.ok()?;
    wait_for_line(&pair.a, NAME, "ready")
}

/// Moves it there and back, and asks it after each move; what it says of `processes`.
fn there_and_back(pair: &HostPair, processes: usize, options: &[&str]) -> Result<()> {
    let right = vec!["right"; processes].join(" ");
    for (number, (from, to)) in [(&pair.a, &pair.b), (&pair.b, &pair.a)].iter().enumerate() {
        moves(from, to, NAME, options)?;
        type_line(to, NAME, &format!("question-{number}"))?;
        wait_for_line(to, NAME, &format!("question-{number} {right}"))?;
    }
    leaks::expect_nothing_left(&pair.b)
}

#[test]
fn memory_of_every_kind_arrives_as_it_was() -> Result<()> {
    let pair = hosts()?;
    run(&pair, 4, 0)?;
    there_and_back(&pair, 1, &[])?;
    there_and_back(&pair, 1, &["--verify"])?;
    pair.finish(NAME)
}

#[test]
fn memory_that_children_have_in_common_arrives_as_it_was() -> Result<()> {
    let pair = hosts()?;
    run(&pair, 80, 2)?;
    there_and_back(&pair, 3, &[])?;
    pair.finish(NAME)
}

#[test]
fn memory_that_follows_a_tree_arrives_as_it_was() -> Result<()> {
    let pair = hosts()?;
    run(&pair, 160, 0)?;
    there_and_back(&pair, 1, &[])?;
    there_and_back(&pair, 1, &["--verify"])?;
    pair.finish(NAME)
}

fn keeper_at(state_dir: &std::path::Path) -> Result<Keeper> {
    wait::until("a keeper", || Ok(left::keepers(state_dir).pop()))
}

fn tell(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

/// Moves it, and has what brings memory at the destination stand still as soon as it
/// runs there; its number.
fn moved_without_its_memory(pair: &HostPair) -> Result<u32> {
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    let keeper = keeper_at(pair.b.state_dir())?;
    let pager = wait::until("criu lazy-pages to begin", || Ok(keeper.lazy_pages()))?;
    wait_for_state(&pair.b, NAME, "running")?;
    tell(pager, Signal::SIGSTOP)?;
    moving.wait()?.ok()?;
    ensure!(keeper.lazy_pages() == Some(pager), "it was done too soon for this test");
    Ok(pager)
}

#[test]
fn a_tree_moves_on_only_when_all_its_memory_is_there() -> Result<()> {
    let pair = hosts()?;
    run(&pair, MUCH, 0)?;
    let pager = moved_without_its_memory(&pair)?;
    let back = start_moving(&pair.b, &pair.a.to(), NAME)?;
    ensure!(pair.b.state_of(NAME)?.as_deref() != Some("gone"));
    tell(pager, Signal::SIGCONT)?;
    back.wait()?.ok()?;
    type_line(&pair.a, NAME, "question")?;
    wait_for_line(&pair.a, NAME, "question right")?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(NAME)
}

/// Runs one that gives memory back, moves some and forks as soon as it is told.
fn run_one_that_changes(pair: &HostPair) -> Result<()> {
    exec(&pair.a, NAME, &[], &[PYTHON, "-c", FREES, "300"])?.ok()?;
    wait_for_line(&pair.a, NAME, "ready")
}

#[test]
fn memory_that_follows_a_tree_that_unmaps_moves_and_forks_arrives_as_it_was() -> Result<()> {
    let pair = hosts()?;
    run_one_that_changes(&pair)?;
    let pager = moved_without_its_memory(&pair)?;
    type_line(&pair.b, NAME, "change")?;
    tell(pager, Signal::SIGCONT)?;
    type_line(&pair.b, NAME, "question")?;
    wait_for_line(&pair.b, NAME, "question right")?;
    pair.finish(NAME)
}

#[test]
fn a_tree_whose_memory_can_not_follow_is_ended_and_says_why() -> Result<()> {
    let pair = hosts()?;
    run(&pair, MUCH, 0)?;
    let pager = moved_without_its_memory(&pair)?;
    type_line(&pair.b, NAME, "question")?;
    tell(pager, Signal::SIGKILL)?;
    wait_for_state(&pair.b, NAME, "stopped")?;
    let said = pair.b.migctl(&["inspect", NAME])?.ok()?.stdout;
    ensure!(said.contains("criu lazy-pages"), "{said}");
    let log = pair.b.migctl(&["logs", NAME])?.ok()?.stdout;
    ensure!(!log.contains("question"), "it went on without its memory: {log}");
    ensure!(moved(&pair.b, &pair.a, NAME, &[])?.status != 0);
    pair.b.migctl(&["rm", NAME])?.ok()?;
    leaks::expect_nothing_left(&pair.b)
}

/// A CRIU below `directory` that does all but bring memory.
fn without_lazy_pages(pair: &HostPair) -> Result<std::path::PathBuf> {
    let host = pair.a.ask(&["hosts"])?;
    ensure!(host["hosts"][0]["criu"].is_string(), "{host}");
    let criu = std::env::var("MIGR_CRIU").unwrap_or_else(|_| "criu".into());
    let path = pair.directory().join("criu");
    let program = format!(
        "#!/bin/sh\nfor word; do [ \"$word\" != lazy-pages ] || exit 3; done\nexec {criu} \"$@\"\n"
    );
    fs::write(&path, program)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// CRIU would wait for ever for memory that nobody brings.
#[test]
fn a_tree_is_not_made_without_what_brings_its_memory_and_goes_on_at_the_source() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    pair.a.start()?;
    pair.b.criu(&without_lazy_pages(&pair)?);
    pair.b.start()?;
    can_move(&pair.b)?;
    run(&pair, MUCH, 0)?;
    let refused = moved(&pair.a, &pair.b, NAME, &[])?;
    refused.expect(4, &["criu lazy-pages", "exit status: 3"])?;
    type_line(&pair.a, NAME, "question")?;
    wait_for_line(&pair.a, NAME, "question right")?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(NAME)
}

#[test]
fn a_tree_that_lost_what_brings_its_memory_before_it_ran_is_given_back() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    pair.b.halt_at(Some("destination-sealed"));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    run(&pair, MUCH, 0)?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    pair.b.wait_halted()?;
    let keeper = keeper_at(pair.b.state_dir())?;
    let pager = wait::until("criu lazy-pages to wait", || Ok(keeper.lazy_pages()))?;
    tell(pager, Signal::SIGKILL)?;
    pair.b.go_on()?;
    moving.wait()?.expect(4, &["could not run it"])?;
    ensure!(pair.runs_at_a(NAME)?);
    type_line(&pair.a, NAME, "question")?;
    wait_for_line(&pair.a, NAME, "question right")?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(NAME)
}
