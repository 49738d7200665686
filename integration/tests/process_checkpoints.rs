//! Snapshots of process trees: CRIU's own tool reads them, trees are made of them
//! anew, and what is damaged, missing or not the snapshot's own is refused by name.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::leaks;
use integration::process::container::{self, Bundle};
use integration::process::crit::crit;
use integration::process::snapshot::{self, image_names, images, largest};
use integration::process::{
    self, Counter, can_move, exec, left, lines, moves, python, type_line, wait_for_line,
};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use serde_json::Value;

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// Writes a snapshot of the counter; its directory.
fn saved(pair: &HostPair, counter: Counter, options: &[&str]) -> Result<PathBuf> {
    let directory = pair.directory().join("snapshot");
    let to = ["checkpoint", counter.name, "--to", text(&directory)?];
    pair.a.migctl(&[&to, options].concat())?.ok()?;
    Ok(directory)
}

fn restore(host: &Daemon, from: &Path, name: &str) -> Result<integration::migctl::Ran> {
    host.migctl(&["restore", "--from", text(from)?, "--name", name])
}

/// Whether nothing of a process tree is on a host that has none.
fn nothing_on(host: &Daemon) -> Result<()> {
    ensure!(host.workloads()?.is_empty(), "{:?}", host.workloads()?);
    leaks::expect_nothing_left(host)
}

#[test]
fn crit_reads_what_a_checkpoint_has_written() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter { depth: 3, ..Counter::small() };
    counter.run(&pair.a)?;
    let directory = saved(&pair, counter, &[])?;
    counter.counts(&pair.a, 5)?;
    ensure!(fs::metadata(&directory)?.permissions().mode() & 0o777 == 0o700);
    // Nothing but CRIU's own files, and one beside them.
    let names = image_names(&directory)?;
    let ours: Vec<_> = names.iter().filter(|name| name.starts_with("migr-")).collect();
    ensure!(ours == ["migr-tcp-options.img"], "{ours:?}");
    let images = images(&directory);
    let tree: Value = serde_json::from_str(&crit(&["show", text(&images.join("pstree.img"))?])?)?;
    ensure!(tree["entries"].as_array().is_some_and(|all| all.len() == 4), "{tree}");
    ensure!(tree["entries"][0]["threads"].as_array().is_some_and(|all| all.len() == 4), "{tree}");
    let processes = crit(&["x", text(&images)?, "ps"])?;
    let programs = processes.lines().filter(|line| line.contains("python3")).count();
    ensure!(programs == 4, "{processes}");
    let files = crit(&["x", text(&images)?, "fds"])?;
    ensure!(files.contains("TIMERFD") && files.contains("pipe"), "{files}");
    pair.finish(counter.name)
}

#[test]
fn a_tree_is_restored_twice_under_new_names_while_the_first_goes_on() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter { memory: 32, depth: 2, ..Counter::small() };
    counter.run(&pair.a)?;
    let directory = saved(&pair, counter, &[])?;
    let written = snapshot::content(&directory)?;
    let at_snapshot = counter.last(&pair.a)?;
    for (host, name) in [(&pair.b, "second"), (&pair.a, "third")] {
        restore(host, &directory, name)?.ok()?;
        let copy = Counter { name, ..counter };
        copy.counts(host, 5)?;
        counter.counts(&pair.a, 5)?;
    }
    ensure!(at_snapshot > 0 && snapshot::content(&directory)? == written, "it was changed");
    // What was restored is a workload as any other.
    moves(&pair.a, &pair.b, "third", &[])?;
    Counter { name: "third", ..counter }.counts(&pair.b, 5)?;
    for (host, name) in [(&pair.b, "second"), (&pair.b, "third")] {
        host.migctl(&["stop", name, "--force"])?.ok()?;
        host.migctl(&["rm", name])?.ok()?;
    }
    pair.a
        .migctl(&["checkpoint", counter.name, "--to", text(&directory)?])?
        .expect(1, &["not empty", text(&directory)?])?;
    ensure!(snapshot::content(&directory)? == written, "it was changed");
    pair.finish(counter.name)
}

#[test]
fn a_tree_that_is_stopped_by_its_checkpoint_goes_on_where_it_was() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    let directory = saved(&pair, counter, &["--stop"])?;
    ensure!(pair.a.state_of(counter.name)?.as_deref() == Some("stopped"));
    let last = counter.last(&pair.a)?;
    pair.a.migctl(&["rm", counter.name])?.ok()?;
    nothing_on(&pair.a)?;
    restore(&pair.b, &directory, counter.name)?.ok()?;
    let restored = counter.counts(&pair.b, 5)?;
    ensure!(restored >= last, "{restored} after {last}");
    pair.finish(counter.name)
}

#[test]
fn typed_input_is_part_of_a_snapshot() -> Result<()> {
    let pair = process::hosts()?;
    let gate = pair.directory().join("gate");
    let program = process::gated_reader(&gate);
    python(&pair.a, "reader", &program)?;
    type_line(&pair.a, "reader", "one")?;
    let directory = pair.directory().join("snapshot");
    let to = text(&directory)?;
    let written = pair.a.ask(&["checkpoint", "reader", "--to", to, "--leave-running"])?;
    ensure!(written["stopped"] == false && written["pages_written"].as_u64() > Some(100));
    restore(&pair.b, &directory, "copy")?.ok()?;
    fs::write(&gate, "")?;
    for (host, name) in [(&pair.a, "reader"), (&pair.b, "copy")] {
        wait_for_line(host, name, "read one")?;
        ensure!(lines(host, name)? == ["ready", "read one"], "{:?}", lines(host, name)?);
    }
    for (host, name) in [(&pair.a, "reader"), (&pair.b, "copy")] {
        host.migctl(&["stop", name, "--force"])?.ok()?;
        host.migctl(&["rm", name])?.ok()?;
    }
    pair.finish("reader")
}

#[test]
fn a_full_disk_is_named_and_leaves_the_tree_running_and_nothing_behind() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let small = pair.directory().join("small");
    fs::create_dir(&small)?;
    pair.a.before(&format!("mount -t tmpfs -o size=4m none {}", small.display()));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    let counter = Counter { memory: 16, ..Counter::small() };
    counter.run(&pair.a)?;
    let directory = small.join("snapshot");
    for options in [&[][..], &["--stop"]] {
        let to = ["checkpoint", counter.name, "--to", text(&directory)?];
        let ran = pair.a.migctl(&[&to, options].concat())?;
        ran.expect(1, &["no space left", "disk space"])?;
        counter.counts(&pair.a, 5)?;
        let seen = format!("/proc/{}/root{}", pair.a.pid()?, small.display());
        ensure!(fs::read_dir(&seen)?.next().is_none(), "something is left in {seen}");
    }
    // The next, elsewhere, is not spoiled by that.
    let directory = saved(&pair, counter, &[])?;
    restore(&pair.b, &directory, counter.name)?.ok()?;
    counter.counts(&pair.b, 5)?;
    pair.finish(counter.name)
}

#[test]
fn criu_killed_while_it_writes_leaves_the_tree_running_and_nothing_behind() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter { memory: 256, depth: 4, ..Counter::small() };
    // CRIU's code in a process may be past saving when CRIU is gone (docs/failure-model.md):
    // then the tree has ended, which is said, and it is tried again.
    for _ in 0..3 {
        if lives_on_when_criu_is_killed(&pair, counter)? {
            let directory = saved(&pair, counter, &[])?;
            restore(&pair.b, &directory, counter.name)?.ok()?;
            counter.counts(&pair.b, 5)?;
            return pair.finish(counter.name);
        }
    }
    bail!("each time that CRIU was killed the tree was lost")
}

/// Kills the CRIU that writes a tree. Whether the tree runs on; else it was lost, as may be,
/// and nothing is there.
fn lives_on_when_criu_is_killed(pair: &HostPair, counter: Counter) -> Result<bool> {
    counter.run(&pair.a)?;
    let directory = pair.directory().join("snapshot");
    let to = ["checkpoint", counter.name, "--to", text(&directory)?];
    let writing = pair.a.start_migctl(&to)?;
    let keeper = left::keepers(pair.a.state_dir()).pop().context("no keeper")?;
    let criu = wait::until("CRIU to begin", || Ok(keeper.criu_at_work()))?;
    kill(Pid::from_raw(i32::try_from(criu)?), Signal::SIGKILL)?;
    writing.wait()?.expect(1, &["criu", "killed"])?;
    ensure!(!directory.exists(), "it was written");
    let counts = counter.counts(&pair.a, 5);
    let told = pair.a.ask(&["inspect", counter.name])?;
    if told["workload"]["state"] == "running" {
        return counts.map(|_| true);
    }
    let reason = told["workload"]["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("SIGTRAP"), "{told}");
    pair.a.migctl(&["rm", counter.name])?.ok()?;
    leaks::expect_nothing_left(&pair.a)?;
    Ok(false)
}

/// Does something to a copy of a snapshot, which is then refused, with these words.
fn refused(pair: &HostPair, whole: &Path, damage: Damage, words: &[&str]) -> Result<()> {
    let place = tempfile::tempdir_in(pair.directory())?;
    let copy = place.path().join("copy");
    snapshot::copy(whole, &copy)?;
    damage(&copy)?;
    restore(&pair.b, &copy, "copy")?.expect(1, &[&[text(&copy)?][..], words].concat())?;
    nothing_on(&pair.b)
}

type Damage<'a> = &'a dyn Fn(&Path) -> Result<()>;

#[test]
fn what_is_not_the_snapshot_that_was_written_is_refused_by_name() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter { depth: 2, ..Counter::small() };
    counter.run(&pair.a)?;
    let whole = saved(&pair, counter, &[])?;
    let pages = largest(&whole, "pages-")?;
    let core = largest(&whole, "core-")?;
    for name in [pages.as_str(), &core, "pstree.img"] {
        let flip = |copy: &Path| {
            let path = images(copy).join(name);
            let mut bytes = fs::read(&path)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Ok(fs::write(path, bytes)?)
        };
        refused(&pair, &whole, &flip, &[name, "not what was written"])?;
        let cut = |copy: &Path| {
            let path = images(copy).join(name);
            let length = fs::metadata(&path)?.len();
            Ok(fs::File::options().write(true).open(path)?.set_len(length - 1)?)
        };
        refused(&pair, &whole, &cut, &[name, "bytes"])?;
        let lose = |copy: &Path| Ok(fs::remove_file(images(copy).join(name))?);
        refused(&pair, &whole, &lose, &[name, "is missing"])?;
        let link = |copy: &Path| {
            let path = images(copy).join(name);
            fs::rename(&path, copy.join("aside"))?;
            Ok(symlink(copy.join("aside"), path)?)
        };
        refused(&pair, &whole, &link, &[name, "symbolic link"])?;
        let pipe = |copy: &Path| {
            let path = images(copy).join(name);
            fs::remove_file(&path)?;
            Ok(nix::unistd::mkfifo(&path, Mode::S_IRWXU)?)
        };
        refused(&pair, &whole, &pipe, &[name, "is no file"])?;
    }
    let add = |copy: &Path| Ok(fs::write(images(copy).join("core-77.img"), "more")?);
    refused(&pair, &whole, &add, &["core-77.img", "does not belong"])?;
    let swap = |copy: &Path| {
        let place = images(copy);
        fs::rename(place.join(&core), place.join("aside"))?;
        fs::rename(place.join("pstree.img"), place.join(&core))?;
        Ok(fs::rename(place.join("aside"), place.join("pstree.img"))?)
    };
    refused(&pair, &whole, &swap, &["images/"])?;
    let elsewhere = |copy: &Path| {
        fs::rename(images(copy), copy.join("elsewhere"))?;
        Ok(symlink(copy.join("elsewhere"), images(copy))?)
    };
    refused(&pair, &whole, &elsewhere, &["images is not a directory"])?;
    let unfinished = |copy: &Path| Ok(fs::remove_file(copy.join("manifest.json"))?);
    refused(&pair, &whole, &unfinished, &["no manifest.json"])?;
    let newer = |copy: &Path| {
        let path = copy.join("manifest.json");
        let changed = fs::read_to_string(&path)?.replace("\"version\": 2", "\"version\": 3");
        Ok(fs::write(path, changed)?)
    };
    refused(&pair, &whole, &newer, &["manifest.json is damaged"])?;
    // All that was done to copies: the snapshot itself is as good as ever.
    restore(&pair.b, &whole, counter.name)?.ok()?;
    counter.counts(&pair.b, 5)?;
    pair.finish(counter.name)
}

const LOOP: &str = "echo ready; while :; do sleep 0.05; done";

/// The other host has something else where the tree's program was.
fn another_program(hide: &str, code: &str) -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let place = pair.directory().join("tools");
    fs::create_dir(&place)?;
    let program = place.join("tool");
    let other = pair.directory().join("other");
    for path in [&program, &other] {
        fs::copy("/bin/sh", path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    let mut bytes = fs::read(&other)?;
    *bytes.last_mut().context("an empty program")? ^= 1;
    fs::write(&other, bytes)?;
    let hide = hide.replace("PLACE", text(&place)?).replace("PROGRAM", text(&program)?);
    pair.b.before(&hide.replace("OTHER", text(&other)?));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.b)?;
    exec(&pair.a, "shell", &[], &[text(&program)?, "-c", LOOP])?.ok()?;
    wait_for_line(&pair.a, "shell", "ready")?;
    let directory = pair.directory().join("snapshot");
    pair.a.migctl(&["checkpoint", "shell", "--to", text(&directory)?])?.ok()?;
    restore(&pair.b, &directory, "copy")?.expect(1, &[code, text(&program)?])?;
    nothing_on(&pair.b)?;
    pair.finish("shell")
}

#[test]
fn a_program_that_is_missing_where_it_is_restored_is_named() -> Result<()> {
    another_program("mount -t tmpfs none PLACE", "destination-file-missing")
}

#[test]
fn a_program_that_is_another_where_it_is_restored_is_named() -> Result<()> {
    another_program("mount --bind OTHER PROGRAM", "destination-file-differs")
}

#[test]
fn a_daemon_killed_while_it_saves_a_tree_finds_it_running_again() -> Result<()> {
    let mut pair = process::hosts()?;
    let counter = Counter { memory: 256, ..Counter::small() };
    counter.run(&pair.a)?;
    let directory = pair.directory().join("snapshot");
    let to = ["checkpoint", counter.name, "--to", text(&directory)?];
    let writing = pair.a.start_migctl(&to)?;
    wait::until("CRIU to write", || {
        let begun = fs::read_dir(directory.join("images.part"));
        Ok(begun.is_ok_and(|mut entries| entries.next().is_some()).then_some(()))
    })?;
    pair.a.kill()?;
    drop(writing);
    pair.a.restart()?;
    counter.counts(&pair.a, 5)?;
    restore(&pair.b, &directory, "copy")?.expect(1, &["no manifest.json"])?;
    pair.finish(counter.name)
}

/// In the lab, whose kernels track memory, they do.
#[test]
fn a_snapshot_builds_on_another_only_where_the_kernel_tracks_memory() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    builds_on_another_or_says_why_not(&pair, &counter)?;
    pair.finish(counter.name)
}

#[test]
fn a_snapshot_of_a_container_builds_on_another_where_one_of_a_tree_does() -> Result<()> {
    let pair = process::hosts()?;
    Bundle::make(pair.directory())?.run(&pair.a, &[])?;
    builds_on_another_or_says_why_not(&pair, &container::counter())?;
    pair.finish(container::NAME)
}

fn builds_on_another_or_says_why_not(pair: &HostPair, counter: &Counter) -> Result<()> {
    let place = |name: &str| pair.directory().join(name);
    let (first, second) = (place("first"), place("second"));
    pair.a.migctl(&["checkpoint", counter.name, "--to", text(&first)?])?.ok()?;
    let next = ["checkpoint", counter.name, "--to", text(&second)?, "--parent", text(&first)?];
    let tracks = pair.a.migctl(&[&next[..], &["--dry-run"]].concat())?;
    if tracks.status == 0 {
        pair.a.migctl(&next)?.ok()?;
        ensure!(second.join("images/parent/inventory.img").is_file(), "CRIU finds no parent");
    } else {
        tracks.expect(3, &["chain-not-tracked", "CONFIG_MEM_SOFT_DIRTY", "--parent"])?;
        pair.a.migctl(&next)?.expect(1, &["CONFIG_MEM_SOFT_DIRTY"])?;
        ensure!(!second.exists(), "something of it is left");
    }
    let none = ["checkpoint", counter.name, "--to", text(&second)?, "--parent", text(&second)?];
    pair.a.migctl(&none)?.expect(1, &["no manifest.json"])?;
    counter.counts(&pair.a, 3)?;
    Ok(())
}
