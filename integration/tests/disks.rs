//! Disks of VMs that move: whose they are at every moment, where they must not
//! be used, and how they travel. pulse itself has no driver for them; what is
//! in them is put there from outside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use integration::daemon::Daemon;
use integration::host_pair::{HostPair, migrate};
use integration::leaks;
use integration::scenario::{Pulse, expect_alive};
use integration::wait;
use serde_json::Value;

/// Size of the tests' disks in bytes: not a whole number of pages.
const BYTES: u64 = (4 << 20) + 512;

/// An image with something in it, here and there.
fn image(path: &Path, seed: u8) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(BYTES)?;
    for index in [0, 3, 700] {
        file.write_all_at(&[seed; 4096], index * 4096)?;
    }
    Ok(file.write_all_at(&[seed + 1; 512], BYTES - 512)?)
}

/// The note beside an image, if there is one.
fn note(image: &Path) -> Result<Option<Value>> {
    let mut path = image.as_os_str().to_owned();
    path.push(".migr");
    match fs::read(PathBuf::from(path)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Checks that `host` and nobody else holds the image for `name`.
fn expect_held(image: &Path, host: &Daemon, name: &str) -> Result<()> {
    let note = note(image)?.context("nothing says who holds it")?;
    let says = (note["state"].as_str(), note["name"].as_str(), note["address"].as_str());
    ensure!(says == (Some("held"), Some(name), Some(host.to().as_str())), "{note}");
    ensure!(!is_free(image)?, "it is not locked");
    Ok(())
}

fn is_free(image: &Path) -> Result<bool> {
    match File::open(image)?.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(fs::TryLockError::WouldBlock) => Ok(false),
        Err(fs::TryLockError::Error(e)) => Err(e.into()),
    }
}

/// Runs a VM with these options, which must be refused with these words.
fn refused(pair: &HostPair, host: &Daemon, options: &[&str], words: &[&str]) -> Result<()> {
    let kernel = pair.kernel().display().to_string();
    let args = ["run", "other", "--kernel", &kernel, "--memory", "128M"];
    let before = leaks::vm_processes(host.state_dir());
    host.migctl(&[&args[..], options].concat())?.expect(1, words)?;
    ensure!(host.state_of("other")?.is_none());
    wait::until("the refused VM to go", || {
        Ok((leaks::vm_processes(host.state_dir()) == before).then_some(()))
    })
}

/// Two hosts that share no storage: the same path leads to another directory on
/// each, which is given back.
fn apart(pair: &mut HostPair) -> Result<(PathBuf, PathBuf, PathBuf)> {
    let base = pair.directory().to_owned();
    let inside = |name: &str| base.join(name);
    let (seen, a, b) = (inside("disks"), inside("disks-a"), inside("disks-b"));
    for directory in [&seen, &a, &b] {
        fs::create_dir(directory)?;
    }
    let mount = |there: &Path| format!("mount --bind {} {}", there.display(), seen.display());
    let (at_a, at_b) = (mount(&a), mount(&b));
    pair.a.before(&at_a);
    pair.b.before(&at_b);
    Ok((seen, a, b))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

#[test]
fn a_disk_is_one_vms_at_a_time_wherever_that_moves() -> Result<()> {
    let pair = HostPair::start()?;
    let disk = pair.directory().join("disk.img");
    image(&disk, 1)?;
    let before = fs::read(&disk)?;
    let path = text(&disk)?;
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", path])?;
    expect_held(&disk, &pair.a, pulse.name)?;
    let shown = pair.a.ask(&["inspect", pulse.name])?;
    ensure!(shown["disks"] == serde_json::json!([{"path": path, "read_only": false}]), "{shown}");
    let holder = format!("pulse on the host at {}", pair.a.to());
    refused(&pair, &pair.a, &["--disk", path], &["in use", &holder])?;
    refused(&pair, &pair.a, &["--disk", &format!("{path},ro")], &["in use", &holder])?;

    pair.there(pulse.name, &["--verify"])?;
    expect_held(&disk, &pair.b, pulse.name)?;
    let holder = format!("pulse on the host at {}", pair.b.to());
    refused(&pair, &pair.a, &["--disk", path], &["in use", &holder])?;
    pair.back(pulse.name, &["--mode", "stop"])?;
    expect_held(&disk, &pair.a, pulse.name)?;
    expect_alive(&pair.a, pulse.name, 5)?;

    pair.a.migctl(&["stop", pulse.name, "--force"])?.ok()?;
    ensure!(note(&disk)?.is_none() && is_free(&disk)?, "a VM that has ended holds nothing");
    ensure!(fs::read(&disk)? == before, "nobody has written to it");
    pair.finish(pulse.name)
}

#[test]
fn a_path_that_leads_to_another_image_by_now_keeps_the_vm_where_it_is() -> Result<()> {
    let mut pair = HostPair::start()?;
    let (disk, aside) = (pair.directory().join("disk.img"), pair.directory().join("aside.img"));
    image(&disk, 1)?;
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&disk)?])?;
    fs::rename(&disk, &aside)?;
    image(&disk, 7)?;
    let snapshot = pair.directory().join("snapshot");
    let to = pair.b.to();
    let tries: [&[&str]; 4] = [
        &["migrate", pulse.name, "--to", &to, "--dry-run"],
        &["migrate", pulse.name, "--to", &to],
        &["migrate", pulse.name, "--to", &to, "--copy-disks"],
        &["checkpoint", pulse.name, "--to", text(&snapshot)?],
    ];
    // The daemon has the image open itself, and after a restart only its child does.
    for restarted in [false, true] {
        for (index, arguments) in tries.iter().enumerate() {
            let ran = pair.a.migctl(arguments)?;
            let said = format!("{}{}", ran.stdout, ran.stderr);
            ensure!(ran.status != 0 && said.contains("does not lead to"), "{index}: {said}");
            ensure!(said.contains("bring that file back"), "{said}");
        }
        if !restarted {
            pair.a.restart()?;
        }
    }
    ensure!(!snapshot.exists());
    expect_alive(&pair.a, pulse.name, 5)?;
    fs::rename(&aside, &disk)?;
    pair.there(pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_read_only_disk_is_shared() -> Result<()> {
    let pair = HostPair::start()?;
    let disk = pair.directory().join("tools.img");
    image(&disk, 1)?;
    let shared = format!("{},ro", text(&disk)?);
    let (pulse, second) = (Pulse::small(), Pulse { name: "second", ..Pulse::small() });
    pulse.run_with(&pair, &pair.a, &["--disk", &shared])?;
    second.run_with(&pair, &pair.b, &["--disk", &shared])?;
    pair.there(pulse.name, &[])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    ensure!(note(&disk)?.is_none());
    pair.b.migctl(&["stop", second.name, "--force"])?.ok()?;
    pair.b.migctl(&["rm", second.name])?.ok()?;
    pair.finish(pulse.name)
}

#[test]
fn what_can_be_no_disk_is_refused_by_name() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let there = |name: &str| pair.directory().join(name);
    File::create(there("odd"))?.set_len(1000)?;
    File::create(there("empty"))?;
    fs::create_dir(there("directory"))?;
    image(&there("good"), 1)?;
    let cases = [("none", "not there"), ("odd", "multiple of 512"), ("empty", "multiple of 512")];
    for (name, word) in cases {
        let path = there(name);
        refused(&pair, &pair.a, &["--disk", text(&path)?], &[word, text(&path)?])?;
    }
    refused(&pair, &pair.a, &["--disk", text(&there("directory"))?], &["neither a file"])?;
    let good = text(&there("good"))?.to_owned();
    refused(&pair, &pair.a, &["--disk", &good, "--disk", &good], &["twice"])?;
    let nine = ["--disk", &good].repeat(9);
    refused(&pair, &pair.a, &nine, &["at most 8"])?;
    ensure!(note(&there("good"))?.is_none() && is_free(&there("good"))?);
    pair.finish(pulse.name)
}

/// The codes of what stands in the way of a move from `a` to `b`.
fn blockers(pair: &HostPair, name: &str, options: &[&str]) -> Result<Vec<String>> {
    let planned = migrate(&pair.a, &pair.b, name, &[options, &["--dry-run"]].concat())?;
    let plan: Value = planned.json()?;
    let moved = migrate(&pair.a, &pair.b, name, options);
    let found = plan["blockers"].as_array().context("no blockers")?;
    let code = |b: &Value| b["code"].as_str().unwrap_or_default().to_owned();
    let found: Vec<_> = found.iter().map(code).collect();
    if !found.is_empty() {
        // What a plan says is what a migration does.
        let words: Vec<_> = found.iter().map(String::as_str).collect();
        moved?.expect(3, &words)?;
    }
    Ok(found)
}

#[test]
fn a_plan_says_what_keeps_the_destination_from_having_the_disks() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    let (seen, a, b) = apart(&mut pair)?;
    pair.a.start()?;
    pair.b.start()?;
    image(&a.join("one"), 1)?;
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&seen.join("one"))?])?;
    let there = b.join("one");
    let expect = |options: &[&str], codes: &[&str]| -> Result<()> {
        let found = blockers(&pair, pulse.name, options)?;
        ensure!(found == codes, "{found:?} instead of {codes:?}");
        expect_held(&a.join("one"), &pair.a, pulse.name)
    };
    expect(&[], &["destination-disk-missing"])?;
    File::create(&there)?.set_len(8192)?;
    expect(&[], &["destination-disk-size"])?;
    expect(&["--copy-disks"], &["destination-disk-exists"])?;
    File::create(&there)?.set_len(BYTES)?;
    let other = Pulse { name: "other", ..Pulse::small() };
    other.run_with(&pair, &pair.b, &["--disk", text(&seen.join("one"))?])?;
    expect(&[], &["destination-disk-locked"])?;
    expect(&["--copy-disks"], &["destination-disk-exists"])?;
    pair.b.migctl(&["stop", other.name, "--force"])?.ok()?;
    pair.b.migctl(&["rm", other.name])?.ok()?;
    fs::remove_file(&there)?;
    ensure!(fs::read_dir(&b)?.next().is_none(), "a plan has left something");
    expect_alive(&pair.a, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn disks_travel_between_hosts_that_share_no_storage() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    let (seen, a, b) = apart(&mut pair)?;
    pair.a.start()?;
    pair.b.start()?;
    image(&a.join("data"), 1)?;
    image(&a.join("tools"), 5)?;
    let (data, tools) = (seen.join("data"), format!("{},ro", text(&seen.join("tools"))?));
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&data)?, "--disk", &tools])?;
    pair.there(pulse.name, &["--copy-disks", "--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    expect_held(&b.join("data"), &pair.b, pulse.name)?;
    for name in ["data", "tools"] {
        ensure!(fs::read(a.join(name))? == fs::read(b.join(name))?, "{name} differs");
        let meta = fs::metadata(b.join(name))?;
        ensure!(meta.blocks() * 512 < 1 << 20, "{name} is not sparse: {meta:?}");
    }

    // What stayed behind is old, and nobody is to take it for the disk.
    let old = note(&a.join("data"))?.context("nothing says that it is old")?;
    ensure!(old["state"] == "moved" && is_free(&a.join("data"))?, "{old}");
    refused(&pair, &pair.a, &["--disk", text(&data)?], &["left behind", "data.migr"])?;
    pair.b
        .migctl(&["migrate", pulse.name, "--to", &pair.a.to()])?
        .expect(3, &["destination-disk-stale", "--copy-disks"])?;

    // It comes back, changed: over the old copy, of which nothing is left.
    let changed = File::options().write(true).open(b.join("data"))?;
    changed.write_all_at(&[0; 4096], 3 * 4096)?;
    changed.write_all_at(&[9; 4096], 5 * 4096)?;
    pair.back(pulse.name, &["--copy-disks", "--verify", "--mode", "stop"])?;
    expect_held(&a.join("data"), &pair.a, pulse.name)?;
    ensure!(fs::read(a.join("data"))? == fs::read(b.join("data"))?, "it came back otherwise");
    pair.there(pulse.name, &["--copy-disks"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_copy_that_never_came_whole_is_cleared_away() -> Result<()> {
    for killed in [false, true] {
        let mut pair = HostPair::prepare()?;
        let (seen, a, b) = apart(&mut pair)?;
        pair.a.halt_at(Some("source-precopy-round"));
        pair.a.start()?;
        pair.b.start()?;
        image(&a.join("data"), 1)?;
        let pulse = Pulse::small();
        pulse.run_with(&pair, &pair.a, &["--disk", text(&seen.join("data"))?])?;
        let to = pair.b.to();
        let args = ["-o", "json", "migrate", pulse.name, "--to", &to, "--copy-disks"];
        let moving = pair.a.start_migctl(&args)?;
        pair.a.wait_halted()?;
        ensure!(note(&b.join("data"))?.is_some_and(|n| n["state"] == "arriving"));
        if killed {
            pair.b.restart()?;
        }
        pair.a.restart()?;
        drop(moving);
        wait::until("the copy to go", || Ok(fs::read_dir(&b)?.next().is_none().then_some(())))?;
        expect_alive(&pair.a, pulse.name, 5)?;
        expect_held(&a.join("data"), &pair.a, pulse.name)?;
        pair.there(pulse.name, &["--copy-disks", "--verify"])?;
        pair.finish(pulse.name)?;
    }
    Ok(())
}

#[test]
fn a_destination_that_cannot_open_the_disk_gives_the_vm_back() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    let (seen, a, b) = apart(&mut pair)?;
    pair.a.halt_at(Some("source-let-go"));
    pair.a.start()?;
    pair.b.start()?;
    for directory in [&a, &b] {
        image(&directory.join("data"), 1)?;
    }
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&seen.join("data"))?])?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    pair.a.wait_halted()?;
    ensure!(is_free(&a.join("data"))?, "the source has let go");
    fs::remove_file(b.join("data"))?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["could not run it", "failed"])?;
    expect_alive(&pair.a, pulse.name, 5)?;
    expect_held(&a.join("data"), &pair.a, pulse.name)?;
    ensure!(pair.b.log().contains("is not there"), "{}", pair.b.log());
    pair.finish(pulse.name)
}

#[test]
fn a_vm_that_cannot_have_its_disk_back_waits_for_it() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.halt_at(Some("source-let-go"));
    pair.a.start()?;
    pair.b.start()?;
    let disk = pair.directory().join("data");
    image(&disk, 1)?;
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&disk)?])?;
    let to = pair.b.to();
    let moving = pair.a.start_migctl(&["-o", "json", "migrate", pulse.name, "--to", &to])?;
    pair.a.wait_halted()?;
    // Somebody who keeps to no rule takes the image in this very moment.
    let theirs = File::open(&disk)?;
    theirs.lock()?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["could not run it"])?;
    ensure!(pair.a.state_of(pulse.name)?.as_deref() == Some("paused"));
    pair.a.migctl(&["resume", pulse.name])?.expect(1, &["in use"])?;
    drop(theirs);
    pair.a.migctl(&["resume", pulse.name])?.ok()?;
    expect_alive(&pair.a, pulse.name, 5)?;
    expect_held(&disk, &pair.a, pulse.name)?;
    pair.finish(pulse.name)
}

/// One daemon is killed at `point`; whoever has the VM then has its disk.
fn crash(point: &str, killed_source: bool, copied: bool) -> Result<()> {
    let mut pair = HostPair::prepare()?;
    let (seen, a, b) = apart(&mut pair)?;
    let at_source = point.starts_with("source");
    if at_source {
        pair.a.halt_at(Some(point));
    } else {
        pair.b.halt_at(Some(point));
    }
    let disk = if copied { seen.join("data") } else { pair.directory().join("data") };
    image(if copied { a.join("data") } else { disk.clone() }.as_path(), 1)?;
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&disk)?])?;
    let to = pair.b.to();
    let options: &[&str] = if copied { &["--copy-disks"] } else { &[] };
    let args = [&["-o", "json", "migrate", pulse.name, "--to", &to], options].concat();
    let moving = pair.a.start_migctl(&args)?;
    if at_source {
        pair.a.wait_halted()?
    } else {
        pair.b.wait_halted()?
    }
    match (at_source, killed_source) {
        (true, true) => pair.a.restart()?,
        (false, false) => pair.b.restart()?,
        (true, false) => {
            pair.b.kill()?;
            pair.a.go_on()?;
            pair.b.restart()?;
        }
        (false, true) => {
            pair.a.kill()?;
            pair.b.go_on()?;
            pair.a.restart()?;
        }
    }
    drop(moving);
    let at_source = one_runs(&pair, pulse.name)?;
    let (here, elsewhere) = if at_source { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    let images = |at_source| match (copied, at_source) {
        (false, _) => disk.clone(),
        (true, true) => a.join("data"),
        (true, false) => b.join("data"),
    };
    expect_alive(here, pulse.name, 5)?;
    expect_held(&images(at_source), here, pulse.name)?;
    leaks::expect_nothing_left(elsewhere)?;
    if copied && at_source {
        ensure!(!b.join("data").exists(), "half a copy is left");
    }
    // It has its disk and can go on moving with it.
    migrate(here, elsewhere, pulse.name, options)?.ok()?;
    expect_held(&images(!at_source), elsewhere, pulse.name)?;
    pair.finish(pulse.name)
}

/// Waits until one host runs it; whether that is the source.
fn one_runs(pair: &HostPair, name: &str) -> Result<bool> {
    wait::until("one host to run it", || {
        let states = (pair.a.state_of(name)?, pair.b.state_of(name)?);
        Ok(match (states.0.as_deref(), states.1.as_deref()) {
            (Some("running"), Some("running")) => bail!("both hosts run it"),
            (Some("running"), None) => Some(true),
            (None, Some("running")) => Some(false),
            _ => None,
        })
    })
}

// Where it halts, whether the source is killed, whether the disk is copied.
integration::tests_of! {
    crash:
    source_killed_once_it_has_let_go_takes_the_disk_again("source-let-go", true, false);
    source_killed_once_released_has_given_the_disk_away("source-released", true, false);
    destination_killed_after_released_still_gets_the_disk("source-released", false, false);
    destination_killed_once_owned_opens_the_disk_then("destination-owned", false, false);
    destination_killed_once_running_keeps_the_disk("destination-running", false, false);
    source_killed_once_it_has_let_go_of_a_copied_disk_keeps_its_own("source-let-go", true, true);
    source_killed_once_released_leaves_the_copy_to_the_destination("source-released", true, true);
    destination_killed_before_it_said_sealed_drops_its_copy("destination-sealed", false, true);
    destination_killed_once_owned_runs_with_its_copy("destination-owned", false, true);
}

#[test]
fn a_snapshot_restores_with_the_image_that_its_vm_had() -> Result<()> {
    let pair = HostPair::start()?;
    let disk = pair.directory().join("data");
    image(&disk, 1)?;
    let pulse = Pulse::small();
    pulse.run_with(&pair, &pair.a, &["--disk", text(&disk)?])?;
    let snapshot = pair.directory().join("snapshot");
    pair.a.migctl(&["checkpoint", pulse.name, "--to", text(&snapshot)?])?.ok()?;
    let from = ["restore", "--from", text(&snapshot)?, "--name", "again"];
    pair.a.migctl(&from)?.expect(1, &["in use", pulse.name])?;
    pair.a.migctl(&["stop", pulse.name, "--force"])?.ok()?;
    pair.a.migctl(&["rm", pulse.name])?.ok()?;
    pair.a.migctl(&from)?.ok()?;
    expect_held(&disk, &pair.a, "again")?;
    pair.finish("again")
}
