//! What takes too long, and what is missing at a destination: it is named, and the
//! processes run on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::process::left::{self, Keeper};
use integration::process::{Counter, PYTHON, can_move, exec, moved, start_moving, wait_for_line};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A CRIU that does nothing at all once there is a file beside it.
fn criu_that_hangs(directory: &Path) -> Result<(PathBuf, PathBuf)> {
    let real = match std::env::var_os("MIGR_CRIU") {
        Some(path) => PathBuf::from(path),
        None => "criu".into(),
    };
    let (program, hang) = (directory.join("slow-criu"), directory.join("hang"));
    let text = format!(
        "#!/bin/sh\n[ ! -e '{}' ] || exec sleep 100000\nexec '{}' \"$@\"\n",
        hang.display(),
        real.display()
    );
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok((program, hang))
}

fn keeper_of(state_dir: &Path) -> Result<Keeper> {
    wait::until("a keeper", || Ok(left::keepers(state_dir).pop()))
}

/// Two hosts of which the second has such a CRIU, and processes at the first.
fn hosts_with_a_criu_that_hangs(counter: Counter) -> Result<HostPair> {
    let mut pair = HostPair::without_kvm()?;
    let (program, hang) = criu_that_hangs(pair.directory())?;
    pair.b.criu(&program);
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.b)?;
    counter.run(&pair.a)?;
    fs::write(hang, "")?;
    Ok(pair)
}

#[test]
fn a_move_to_a_criu_that_hangs_is_cancelled_and_leaves_nothing_there() -> Result<()> {
    let counter = Counter::small();
    let pair = hosts_with_a_criu_that_hangs(counter)?;
    let moving = start_moving(&pair.a, &pair.b.to(), counter.name)?;
    let keeper = keeper_of(pair.b.state_dir())?;
    // It is in the cgroup of the tree that it is to make.
    wait::until("CRIU to hang", || {
        Ok((!keeper.processes().unwrap_or_default().is_empty()).then_some(()))
    })?;
    pair.a.migctl(&["cancel", counter.name])?.ok()?;
    moving.wait()?.expect(5, &["cancelled"])?;
    counter.counts(&pair.a, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(counter.name)
}

#[test]
fn a_destination_whose_criu_hangs_gives_up_and_says_so() -> Result<()> {
    let counter = Counter::small();
    let pair = hosts_with_a_criu_that_hangs(counter)?;
    let ran = moved(&pair.a, &pair.b, counter.name, &[])?;
    ran.expect(4, &["CRIU does not come to an end", &pair.b.to()])?;
    counter.counts(&pair.a, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(counter.name)
}

#[test]
fn a_move_that_is_cancelled_while_criu_writes_does_not_wait_for_all_of_it() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    let counter = Counter { memory: 256, ..Counter::small() };
    counter.run(&pair.a)?;
    let keeper = keeper_of(pair.a.state_dir())?;
    let moving = start_moving(&pair.a, &pair.b.to(), counter.name)?;
    let criu = wait::until("CRIU to begin", || Ok(keeper.criu_at_work()))?;
    let criu = Pid::from_raw(i32::try_from(criu)?);
    kill(criu, Signal::SIGSTOP)?;
    pair.a.migctl(&["cancel", counter.name])?.ok()?;
    let keeper_log = log_of(pair.a.state_dir())?;
    wait::until("the move to be given up", || {
        Ok(pair.a.log().contains("migration aborted").then_some(()))
    })?;
    kill(criu, Signal::SIGCONT)?;
    moving.wait()?.expect(5, &["cancelled"])?;
    let said = fs::read_to_string(keeper_log)?;
    ensure!(said.contains("were not written"), "CRIU was to fail: {said}");
    counter.counts(&pair.a, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(counter.name)
}

/// What the keeper at a host has to say.
fn log_of(state_dir: &Path) -> Result<PathBuf> {
    let trees = fs::read_dir(state_dir.join("processes"))?;
    let tree = trees.flatten().next().context("no tree there")?;
    Ok(tree.path().join("keeper.log"))
}

/// A tree at a host of which the other lacks something: that is named.
fn lacking(pair: &HostPair, program: &str, words: &[&str]) -> Result<()> {
    exec(&pair.a, "job", &[], &[PYTHON, "-c", program])?.ok()?;
    wait_for_line(&pair.a, "job", "ready")?;
    let to = pair.b.to();
    for dry in [&["--dry-run"][..], &[]] {
        moved(&pair.a, &pair.b, "job", dry)?.expect(3, &[words, &[&to]].concat())?;
        ensure!(pair.a.state_of("job")?.as_deref() == Some("running"));
        leaks::expect_nothing_left(&pair.b)?;
    }
    pair.finish("job")
}

#[test]
fn a_named_pipe_and_the_place_of_a_socket_that_the_destination_has_not_are_named() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let (pipes, sockets) = (pair.directory().join("pipes"), pair.directory().join("sockets"));
    fs::create_dir_all(sockets.join("run"))?;
    fs::create_dir_all(&pipes)?;
    let hidden = [&pipes, &sockets].map(|path| format!("mount -t tmpfs none '{}'", path.display()));
    pair.b.before(&hidden.join(" && "));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.b)?;
    let (pipe, socket) = (pipes.join("pipe"), sockets.join("run/socket"));
    let program = format!(
        "import os, socket, time\nos.mkfifo('{0}')\nfd = os.open('{0}', os.O_RDWR)\n\
         s = socket.socket(socket.AF_UNIX)\ns.bind('{1}')\ns.listen()\n\
         print('ready', flush=True)\ntime.sleep(100000)",
        pipe.display(),
        socket.display()
    );
    let (pipe, socket) = (pipe.display().to_string(), socket.display().to_string());
    lacking(&pair, &program, &["destination-file-missing", &pipe, &socket])
}

#[test]
fn a_mount_point_that_the_destination_has_not_is_named() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let place = pair.directory().join("place");
    let point = place.join("data");
    fs::create_dir_all(&point)?;
    pair.a.before(&format!("mount -t ramfs none '{}'", point.display()));
    pair.b.before(&format!("mount -t tmpfs none '{}'", place.display()));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.b)?;
    let program = "import time\nprint('ready', flush=True)\ntime.sleep(100000)";
    let point = point.display().to_string();
    lacking(&pair, program, &["destination-mount-missing", &point])
}

#[test]
fn what_criu_a_peer_has_can_be_asked() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.b)?;
    let own = pair.b.ask(&["hosts"])?["hosts"][0]["criu"].clone();
    let told = pair.a.ask(&["hosts", &pair.b.to()])?;
    let of_b = told["hosts"].as_array().and_then(|hosts| hosts.last()).context("no peer")?;
    ensure!(own.is_string() && of_b["criu"] == own, "{own} and {told}");
    pair.a.done();
    pair.b.done();
    Ok(())
}
