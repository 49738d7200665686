//! Containers that are a long time starting, or never do.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::leaks;
use integration::migctl::Running;
use integration::process::container::{Bundle, NAME, PORT, counter, spec};
use integration::process::{Counter, can_move, hosts, left, moves, served, start_moving};
use integration::two_nets::{Side, on_two_hosts};
use integration::wait;
use serde_json::json;

/// Makes the bundle's container wait, when it is made, until the file that this names is
/// there.
fn wait_in_a_hook(bundle: &Bundle) -> Result<PathBuf> {
    let word = bundle.path.join("go-on");
    let hook = format!("echo > {0}.waits; until [ -e {0} ]; do sleep 0.02; done", word.display());
    let mut spec = bundle.spec()?;
    spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", hook]}]});
    bundle.write(&spec)?;
    Ok(word)
}

fn start(host: &Daemon, bundle: &Bundle, options: &[&str]) -> Result<Running> {
    let path = bundle.path.to_str().context("a directory with an odd name")?;
    host.start_migctl(&[&["run-container", NAME, "--bundle", path], options].concat())
}

fn hook_waits(word: &Path) -> Result<()> {
    let waits = word.with_extension("waits");
    wait::until("the hook to wait", || Ok(waits.exists().then_some(())))
}

/// Stops it while it is started, which has it be no more.
fn stop(host: &Daemon, starting: Running, options: &[&str]) -> Result<()> {
    host.migctl(&[&["stop", NAME], options].concat())?.ok()?;
    starting.wait()?.expect(1, &["CALLED_OFF", "called off", NAME])?;
    ensure!(host.state_of(NAME)?.is_none(), "{:?}", host.workloads()?);
    leaks::expect_nothing_left(host)
}

#[test]
fn a_container_whose_hook_waits_is_listed_and_can_be_stopped() -> Result<()> {
    let pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    for options in [&[][..], &["--force"]] {
        let word = wait_in_a_hook(&bundle)?;
        let starting = start(&pair.a, &bundle, &[])?;
        hook_waits(&word)?;
        let listed = pair.a.workloads()?;
        let reason = listed[0]["reason"].as_str().context("no reason")?;
        ensure!(reason.contains("being started"), "{listed:?}");
        pair.a.migctl(&["pause", NAME])?.expect(1, &["not here yet", "being started"])?;
        stop(&pair.a, starting, options)?;
        fs::remove_file(word.with_extension("waits"))?;
    }
    let word = wait_in_a_hook(&bundle)?;
    fs::write(word, "")?;
    bundle.run(&pair.a, &[])?;
    pair.finish(NAME)
}

/// Whether some process of the host's containers has lost its first thread.
fn killed(host: &Daemon) -> bool {
    let all = left::keepers(host.state_dir());
    let mut processes = all.iter().flat_map(|keeper| keeper.processes().unwrap_or_default());
    processes.any(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|status| status.contains("State:\tZ"))
    })
}

/// The kernel kills the thread of runc's that becomes the container, and runc waits for it.
#[test]
fn a_container_whose_filter_kills_runc_can_be_stopped_and_leaves_nothing() -> Result<()> {
    let pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    let mut spec = bundle.spec()?;
    spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_KILL"});
    bundle.write(&spec)?;
    let starting = start(&pair.a, &bundle, &[])?;
    wait::until("the kernel to have killed that thread", || Ok(killed(&pair.a).then_some(())))?;
    stop(&pair.a, starting, &["--force"])?;
    pair.finish(NAME)
}

#[test]
fn a_daemon_that_is_killed_while_a_container_starts_has_it_when_it_is_back() -> Result<()> {
    on_two_hosts(|nets| {
        nets.start()?;
        can_move(&nets.a)?;
        let bundle = Bundle::make(nets.directory())?;
        let word = wait_in_a_hook(&bundle)?;
        let [option, net] = served::own_network(served::ADDRESS);
        let starting = start(&nets.a, &bundle, &[&option, &net])?;
        hook_waits(&word)?;
        nets.a.kill()?;
        fs::write(word, "")?;
        drop(starting);
        let keepers = left::keepers(nets.a.state_dir());
        let started = || {
            let init = &keepers.first().context("no keeper")?.processes()?;
            Ok(init.iter().any(|pid| is_of_the_container(*pid)).then_some(()))
        };
        wait::until("it to run without a daemon", started)?;
        nets.a.restart()?;
        counter().counts(&nets.a, 3)?;
        // It is in its network, and that moves with it.
        let address = (served::ADDRESS, PORT);
        let answers = || Ok(TcpStream::connect(address).is_ok().then_some(()));
        wait::until("it to answer from its network", answers)?;
        moves(&nets.a, &nets.b, NAME, &[])?;
        wait::until("it to answer from its network", answers)?;
        nets.remove(Side::B, NAME)
    })
}

fn is_of_the_container(pid: u32) -> bool {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.contains("count $i")
}

#[test]
fn a_daemon_that_is_killed_while_a_hook_waits_serves_at_once_when_it_is_back() -> Result<()> {
    let mut pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    let word = wait_in_a_hook(&bundle)?;
    let other = Counter { name: "other", ..Counter::small() };
    other.run(&pair.a)?;
    let starting = start(&pair.a, &bundle, &[])?;
    hook_waits(&word)?;
    pair.a.kill()?;
    drop(starting);
    pair.a.restart()?;
    other.counts(&pair.a, 2)?;
    // It has never run, and does not when the hook would let it.
    let listed = pair.a.workloads()?;
    let found = listed.iter().find(|w| w["name"] == NAME).context("it is not listed")?;
    let reason = found["reason"].as_str().unwrap_or_default();
    ensure!(found["state"] == "stopped" && reason.contains("being started"), "{listed:?}");
    nothing_runs(&word)?;
    pair.a.migctl(&["rm", NAME])?.ok()?;
    bundle.write(&spec("sleep 1000"))?;
    bundle.start(&pair.a, &[])?.ok()?;
    pair.a.migctl(&["stop", NAME, "--force"])?.ok()?;
    pair.a.migctl(&["rm", NAME])?.ok()?;
    pair.finish(other.name)
}

/// Waits until no process has that in its command.
fn nothing_runs(word: &Path) -> Result<()> {
    let word = word.display().to_string();
    let has = |pid: &str| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&word)
    };
    wait::until("a hook to be gone", || {
        let all = fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().into_string().ok());
        let pids = all.filter(|name| name.bytes().all(|c| c.is_ascii_digit()));
        Ok((!pids.into_iter().any(|pid| has(&pid))).then_some(()))
    })
}

#[test]
fn a_move_that_is_cancelled_ends_the_hook_at_the_destination() -> Result<()> {
    let pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    let word = bundle.path.join("go-on");
    // It waits where it runs for the second time.
    let hook = format!(
        "w={}; if [ -e $w.first ]; then echo > $w.waits; sleep 100; echo > $w.went-on; fi; \
         echo > $w.first",
        word.display()
    );
    let mut spec = bundle.spec()?;
    spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", hook]}]});
    bundle.write(&spec)?;
    bundle.run(&pair.a, &[])?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    hook_waits(&word)?;
    pair.a.migctl(&["cancel", NAME])?.ok()?;
    ensure!(moving.wait()?.status != 0, "it has moved");
    nothing_runs(&word)?;
    ensure!(!word.with_extension("went-on").exists(), "the hook went on");
    counter().counts(&pair.a, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    fs::remove_file(word.with_extension("first"))?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    pair.finish(NAME)
}

#[test]
fn a_container_that_has_not_started_in_time_leaves_nothing() -> Result<()> {
    let pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    let mut spec = bundle.spec()?;
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", "exec sleep 1000"], "timeout": 1}]);
    spec["hooks"] = json!({"createRuntime": hook});
    bundle.write(&spec)?;
    bundle.start(&pair.a, &[])?.expect(1, &["runc", "hook"])?;
    leaks::expect_nothing_left(&pair.a)?;
    pair.finish(NAME)
}
