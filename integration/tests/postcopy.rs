//! Memory of process trees and containers follows when they run at their destination
//! already, also when daemons, the link and hosts are lost on the way.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::host_pair::{HostPair, migrate};
use integration::leaks;
use integration::migctl::Running;
use integration::process::container::{self, Bundle};
use integration::process::left::Keeper;
use integration::process::served::{self, Beside, Kind};
use integration::process::{
    PYTHON, can_move, exec, hosts, left, type_line, wait_for_line, wait_for_state,
};
use integration::two_nets::{Side, TwoNets, on_two_hosts};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const KINDS: &str = include_str!("../src/process/kinds.py");
const FREES: &str = include_str!("../src/process/frees.py");
const NAME: &str = "kinds";
const MODE: [&str; 2] = ["--mode", "postcopy"];
/// So much memory (MiB) that most of it is not there when the tree runs.
const MUCH: u32 = 192;

fn run(host: &Daemon, mib: u32, children: u32) -> Result<()> {
    let (mib, children) = (mib.to_string(), children.to_string());
    exec(host, NAME, &[], &[PYTHON, "-c", KINDS, &mib, &children])?.ok()?;
    wait_for_line(host, NAME, "ready")
}

/// All its memory is as it was, that of `processes`.
fn is_right(host: &Daemon, question: &str, processes: usize) -> Result<()> {
    type_line(host, NAME, question)?;
    let right = vec!["right"; processes].join(" ");
    wait_for_line(host, NAME, &format!("{question} {right}"))
}

/// Moves it; the report.
fn follows(from: &Daemon, to: &Daemon, name: &str) -> Result<Value> {
    let report = migrate(from, to, name, &MODE)?.ok()?.json()?;
    ensure!(report["outcome"] == "completed" && report["mode"] == "postcopy", "{report}");
    Ok(report)
}

fn figure(report: &Value, name: &str) -> Result<u64> {
    report[name].as_u64().with_context(|| format!("no {name} in {report}"))
}

fn there_and_back(mib: u32, children: u32) -> Result<()> {
    let pair = hosts()?;
    run(&pair.a, mib, children)?;
    let processes = usize::try_from(children)? + 1;
    for (number, (from, to)) in [(&pair.a, &pair.b), (&pair.b, &pair.a)].iter().enumerate() {
        let report = follows(from, to, NAME)?;
        // Two of three pages of it were ever touched.
        let least = u64::from(mib) * 256 / 2;
        ensure!(figure(&report, "pages_after_switch")? > least, "{report}");
        ensure!(figure(&report, "pages_sent")? < least, "it went before: {report}");
        let why = report["mode_reason"].as_str().unwrap_or_default();
        ensure!(why.contains("lost if either host is"), "{report}");
        is_right(to, &format!("question-{number}"), processes)?;
        leaks::expect_nothing_left(from)?;
    }
    pair.finish(NAME)
}

#[test]
fn memory_of_every_kind_that_stayed_behind_arrives_as_it_was() -> Result<()> {
    there_and_back(512, 0)
}

#[test]
fn memory_of_several_processes_that_stayed_behind_arrives_as_it_was() -> Result<()> {
    there_and_back(64, 3)
}

/// A connection, and so many blocks of memory, of which each message has some checked.
fn served(kind: Kind, blocks: u64) -> Result<()> {
    on_two_hosts(move |nets| {
        nets.start()?;
        can_move(&nets.a)?;
        kind.serve_blocks(nets, blocks)?;
        let mut client = Beside::client(nets, Side::A)?;
        let all = served::WHOLE_MEMORY - 128 + blocks;
        client.gets(1)?;
        for from in [Side::A, Side::B] {
            let report = follows(nets.daemon(from), nets.daemon(from.other()), served::NAME)?;
            let least = blocks * (64 << 10) / 4096;
            ensure!(figure(&report, "pages_after_switch")? >= least, "{report}");
            client.gets(all)?;
        }
        served::finish(nets, Side::A, [client])?;
        Ok(())
    })
}

#[test]
fn a_server_of_512_mib_keeps_its_connection_when_its_memory_follows() -> Result<()> {
    served(Kind::Process, 8192)
}

#[test]
fn a_container_that_serves_keeps_its_connection_when_its_memory_follows() -> Result<()> {
    served(Kind::Container, 256)
}

#[test]
fn a_container_that_has_little_to_follow_moves_and_can_move_on() -> Result<()> {
    let pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    bundle.run(&pair.a, &[])?;
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        follows(from, to, container::NAME)?;
        container::counter().counts(to, 5)?;
        container::is_whole(to)?;
    }
    pair.finish(container::NAME)
}

#[test]
fn a_plan_says_what_is_at_stake_and_what_can_t_be_is_refused_by_name() -> Result<()> {
    let mut pair = hosts()?;
    run(&pair.a, 4, 0)?;
    let plan = migrate(&pair.a, &pair.b, NAME, &[&MODE[..], &["--dry-run"]].concat())?;
    let plan = plan.ok()?.json()?;
    ensure!(plan["possible"] == true && plan["mode"] == "postcopy", "{plan}");
    let why = plan["mode_reason"].as_str().unwrap_or_default();
    ensure!(why.contains("both hosts are needed"), "{plan}");
    let verify = migrate(&pair.a, &pair.b, NAME, &[&MODE[..], &["--verify"]].concat())?;
    verify.expect(3, &["mode postcopy", "--verify compares"])?;
    pair.b.kill()?;
    let none = pair.directory().join("none");
    pair.b.criu(&none);
    pair.b.start()?;
    let ran = migrate(&pair.a, &pair.b, NAME, &MODE)?;
    ran.expect(3, &["criu"])?;
    is_right(&pair.a, "question", 1)?;
    pair.finish(NAME)
}

/// Two hosts and a tree that runs at `b`, which `a` gives no memory as long as there is the
/// file.
struct Unfilled {
    pair: HostPair,
    moving: Running,
    file: PathBuf,
}

fn unfilled() -> Result<Unfilled> {
    unfilled_of(|host| run(host, MUCH, 0))
}

/// The same of what `run` starts.
fn unfilled_of(run: impl Fn(&Daemon) -> Result<()>) -> Result<Unfilled> {
    let mut pair = HostPair::without_kvm()?;
    let file = pair.a.wait_at("source-pull")?;
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    run(&pair.a)?;
    let moving = start(&pair.a, &pair.b)?;
    wait_for_state(&pair.b, NAME, "running")?;
    Ok(Unfilled { pair, moving, file })
}

fn start(from: &Daemon, to: &Daemon) -> Result<Running> {
    let to = to.to();
    from.start_migctl(&[&["-o", "json", "migrate", NAME, "--to", &to], &MODE[..]].concat())
}

/// Waits until the source needs it no more, and checks that all of it is there.
fn filled(pair: &HostPair) -> Result<()> {
    wait::until("the source to be done with it", || {
        Ok(pair.a.state_of(NAME)?.is_none().then_some(()))
    })?;
    is_right(&pair.b, "question", 1)?;
    leaks::expect_nothing_left(&pair.a)?;
    // It is whole, and can go on.
    let report = migrate(&pair.b, &pair.a, NAME, &["--mode", "stop"])?.ok()?.json()?;
    ensure!(report["outcome"] == "completed", "{report}");
    is_right(&pair.a, "back", 1)?;
    pair.finish(NAME)
}

fn give(file: &Path) -> Result<()> {
    Ok(fs::remove_file(file)?)
}

#[test]
fn memory_that_stayed_behind_of_a_tree_that_unmaps_moves_and_forks_arrives_as_it_was() -> Result<()>
{
    let Unfilled { pair, moving, file } = unfilled_of(|host| {
        exec(host, NAME, &[], &[PYTHON, "-c", FREES, "150"])?.ok()?;
        wait_for_line(host, NAME, "ready")
    })?;
    type_line(&pair.b, NAME, "change")?;
    give(&file)?;
    type_line(&pair.b, NAME, "question")?;
    wait_for_line(&pair.b, NAME, "question right")?;
    moving.wait()?.ok()?;
    pair.finish(NAME)
}

#[test]
fn a_tree_that_lacks_memory_is_neither_moved_nor_saved() -> Result<()> {
    let Unfilled { pair, moving, file } = unfilled()?;
    let words = ["memory of it still comes"];
    migrate(&pair.b, &pair.a, NAME, &["--mode", "stop"])?.expect(3, &words)?;
    let directory = pair.directory().join("snapshot").display().to_string();
    pair.b.migctl(&["checkpoint", NAME, "--to", &directory])?.expect(1, &words)?;
    let seen = pair.a.state_of(NAME)?;
    ensure!(seen.as_deref() == Some("migrating"), "{seen:?}");
    pair.a.migctl(&["cancel", NAME])?.expect(1, &["past the point of no return"])?;
    give(&file)?;
    let ran = moving.wait()?.ok()?;
    let report = ran.json()?;
    ensure!(figure(&report, "pages_after_switch")? > u64::from(MUCH) * 128, "{report}");
    let told = ran.stderr.lines().filter(|line| line.contains(r#""phase":"running""#)).count();
    ensure!(told > 1, "no progress while memory followed: {}", ran.stderr);
    filled(&pair)
}

#[test]
fn a_source_daemon_that_is_killed_while_memory_follows_serves_the_rest_when_it_is_back()
-> Result<()> {
    let Unfilled { mut pair, moving, file } = unfilled()?;
    pair.a.kill()?;
    // Restarted it waits nowhere.
    pair.a.restart()?;
    moving.wait()?;
    ensure!(file.exists());
    filled(&pair)
}

#[test]
fn a_source_says_that_it_is_needed_and_is_not_let_go_of() -> Result<()> {
    let Unfilled { mut pair, moving, file } = unfilled()?;
    pair.a.kill()?;
    pair.a.start()?;
    let needed = wait::until("the source to say that it is needed", || {
        let seen = pair.a.workloads()?;
        let seen = seen.into_iter().find(|workload| workload["name"] == NAME);
        Ok(seen.filter(|workload| workload["state"] == "migrating"))
    })?;
    let why = needed["reason"].as_str().unwrap_or_default();
    ensure!(why.contains("memory of it is still here"), "{needed}");
    pair.a.migctl(&["rm", NAME])?.expect(1, &["still needed", "takes the rest of its memory"])?;
    let ran = moving.wait()?;
    ensure!(ran.status == 6 || ran.status == 0, "{}: {}", ran.status, ran.stderr);
    give(&file)?;
    filled(&pair)
}

#[test]
fn a_destination_daemon_that_is_killed_while_memory_follows_goes_on_when_it_is_back() -> Result<()>
{
    let Unfilled { mut pair, moving, file } = unfilled()?;
    pair.b.kill()?;
    pair.b.restart()?;
    give(&file)?;
    moving.wait()?.ok()?;
    filled(&pair)
}

#[test]
fn a_tree_whose_source_is_lost_while_memory_follows_is_ended_and_says_why() -> Result<()> {
    let Unfilled { pair, moving, file } = unfilled()?;
    left::kill_trees(pair.a.state_dir())?;
    give(&file)?;
    moving.wait()?.expect(6, &["the rest of its memory can't be given"])?;
    wait_for_state(&pair.b, NAME, "stopped")?;
    let said = pair.b.migctl(&["inspect", NAME])?.ok()?.stdout;
    ensure!(said.contains("can't give it the rest of its memory"), "{said}");
    pair.b.migctl(&["rm", NAME])?.ok()?;
    leaks::expect_nothing_left(&pair.a)?;
    leaks::expect_nothing_left(&pair.b)
}

/// The loss of a process at the destination, while memory follows, ends the tree there:
/// it says why, also when the daemon was restarted, and the source is done with it.
fn lost_there(of: impl Fn(&Keeper) -> Option<u32>, why: &str) -> Result<()> {
    let Unfilled { mut pair, moving, file } = unfilled()?;
    let keeper = left::keepers(pair.b.state_dir()).pop().context("no keeper")?;
    let lost = of(&keeper).context("nothing to lose")?;
    kill(Pid::from_raw(i32::try_from(lost)?), Signal::SIGKILL)?;
    wait_for_state(&pair.b, NAME, "stopped")?;
    give(&file)?;
    // It was taken over and has run there, so the move itself is completed.
    moving.wait()?.ok()?;
    wait::until("the source to be done with it", || {
        Ok(pair.a.state_of(NAME)?.is_none().then_some(()))
    })?;
    for restarted in [false, true] {
        if restarted {
            pair.b.restart()?;
        }
        let said = pair.b.migctl(&["inspect", NAME])?.ok()?.stdout;
        ensure!(said.contains(why), "restarted: {restarted}: {said}");
    }
    leaks::expect_nothing_left(&pair.a)?;
    pair.b.migctl(&["rm", NAME])?.ok()?;
    leaks::expect_nothing_left(&pair.b)
}

#[test]
fn a_tree_whose_pager_is_killed_while_memory_follows_is_ended_and_says_why() -> Result<()> {
    lost_there(Keeper::lazy_pages, "what put its memory in place after it had moved")
}

#[test]
fn a_tree_whose_keeper_is_killed_while_memory_follows_is_ended_and_says_why() -> Result<()> {
    lost_there(|keeper| Some(keeper.pid), "its keeper, process")
}

#[test]
fn a_source_daemon_that_is_asked_to_end_while_memory_follows_serves_the_rest_when_it_is_back()
-> Result<()> {
    let Unfilled { mut pair, moving, file } = unfilled()?;
    pair.a.terminate()?;
    moving.wait()?.expect(6, &["runs at"])?;
    ensure!(file.exists());
    pair.a.restart()?;
    filled(&pair)
}

#[test]
fn a_tree_that_is_set_running_again_at_its_source_ends_at_the_destination() -> Result<()> {
    let Unfilled { mut pair, moving, file } = unfilled()?;
    pair.a.kill()?;
    pair.a.start()?;
    moving.wait()?;
    wait_for_state(&pair.a, NAME, "migrating")?;
    pair.a.migctl(&["force", NAME, "--run-here", "--yes"])?.ok()?;
    give(&file)?;
    wait_for_state(&pair.b, NAME, "stopped")?;
    pair.b.migctl(&["rm", NAME])?.ok()?;
    is_right(&pair.a, "question", 1)?;
    pair.finish(NAME)
}

/// A daemon stands still at `point`, is killed there with everything else it knows, and
/// comes back: exactly one host has the tree, with all its memory.
fn crash(point: &str) -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let at_source = point.starts_with("source");
    let halted = if at_source { &mut pair.a } else { &mut pair.b };
    halted.halt_at(Some(point));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    run(&pair.a, 80, 0)?;
    let moving = start(&pair.a, &pair.b)?;
    let halted = if at_source { &mut pair.a } else { &mut pair.b };
    halted.wait_halted()?;
    halted.restart()?;
    moving.wait()?;
    let at_source = pair.runs_at_a(NAME)?;
    let (here, elsewhere) = if at_source { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    is_right(here, "question", 1)?;
    leaks::expect_nothing_left(elsewhere)?;
    pair.finish(NAME)
}

integration::tests_of! {
    crash:
    source_killed_when_all_but_memory_was_sent_keeps_the_tree("source-written");
    destination_killed_before_it_said_sealed_leaves_the_tree_whole("destination-sealed");
    source_killed_after_released_gives_its_memory_when_it_is_back("source-released");
    destination_killed_before_the_first_instruction_still_gets_all_memory("destination-owned");
    destination_killed_at_the_first_instruction_still_gets_all_memory("destination-running");
}

#[test]
fn a_link_that_is_cut_while_memory_follows_heals_by_itself() -> Result<()> {
    on_two_hosts(|nets: &mut TwoNets| {
        let file = nets.a.wait_at("source-pull")?;
        nets.start()?;
        can_move(&nets.a)?;
        run(&nets.a, MUCH, 0)?;
        let moving = start(&nets.a, &nets.b)?;
        wait_for_state(&nets.b, NAME, "running")?;
        nets.connect(false)?;
        give(&file)?;
        // What was under way does not arrive, and is asked for again.
        wait::until("the destination to miss memory", || {
            Ok(nets.b.log().contains("memory does not come").then_some(()))
        })?;
        ensure!(nets.a.state_of(NAME)?.is_some(), "the source let go of it");
        nets.connect(true)?;
        moving.wait()?;
        wait::until("the source to be done with it", || {
            Ok(nets.a.state_of(NAME)?.is_none().then_some(()))
        })?;
        is_right(&nets.b, "question", 1)?;
        nets.remove(Side::B, NAME)
    })
}
