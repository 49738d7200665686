//! Hosts on which a daemon can't work, or not all of it. Each is made with a
//! mount namespace of the daemon's own; the machine is not touched.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration::binaries::Program;
use integration::host_pair::{HostPair, migrate};
use integration::leaks;
use integration::scenario::{Pulse, expect_alive};
use integration::wait;

/// What `migrd serve` says with these arguments, which it must refuse.
fn serve_refused(args: &[&str]) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let mut command = Command::new(Program::Migrd.path()?);
    command.arg("serve").args(args).arg("--state-dir").arg(directory.path().join("state"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let ended = wait::until("migrd to refuse", || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!ended?.success(), "migrd {args:?} ended well: {said}");
    Ok(said)
}

fn says(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.to_lowercase().contains(&word.to_lowercase()), "no {word:?} in: {said}");
    }
    Ok(())
}

#[test]
fn serve_without_tls_must_be_asked_for() -> Result<()> {
    let said = serve_refused(&["--listen", "127.0.0.1:0"])?;
    says(&said, &["--insecure", "loopback"])
}

#[test]
fn serve_without_tls_is_refused_on_addresses_that_others_can_reach() -> Result<()> {
    for address in ["0.0.0.0:7070", "[::]:7070", "192.0.2.1:7070"] {
        let said = serve_refused(&["--listen", address, "--insecure"])?;
        says(&said, &["loopback", address])?;
    }
    Ok(())
}

#[test]
fn an_address_that_is_in_use_is_named() -> Result<()> {
    let pair = HostPair::start()?;
    let said = serve_refused(&["--listen", &pair.a.to(), "--insecure"])?;
    says(&said, &["in use", &pair.a.to()])
}

#[test]
fn a_state_directory_that_is_a_file_is_refused() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    std::fs::write(pair.a.state_dir(), "a file")?;
    let path = pair.a.state_dir().display().to_string();
    says(&pair.a.start_refused()?, &["state directory", &path])
}

#[test]
fn a_state_directory_that_can_not_be_written_is_refused() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.before("mount -t tmpfs -o ro,size=1m none \"$STATE\"");
    let path = pair.a.state_dir().display().to_string();
    says(&pair.a.start_refused()?, &["state directory", &path, "read-only"])
}

#[test]
fn a_state_directory_that_is_full_refuses_new_vms_and_says_so() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    // Room for the journal, and then none.
    pair.a.before("mount -t tmpfs -o size=8m none \"$STATE\"");
    pair.a.start()?;
    fill(&pair.a)?;
    let kernel = pair.kernel().display().to_string();
    let ran = pair.a.migctl(&["run", "vm", "--kernel", &kernel, "--memory", "64M"])?;
    ran.expect(1, &["space"])?;
    leaks::expect_nothing_left(&pair.a)
}

#[test]
fn a_destination_whose_state_directory_is_full_refuses_and_the_guest_stays() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.b.before("mount -t tmpfs -o size=8m none \"$STATE\"");
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    fill(&pair.b)?;
    let ran = migrate(&pair.a, &pair.b, pulse.name, &[])?;
    ensure!(ran.status == 3 || ran.status == 4, "status {}: {}", ran.status, ran.stderr);
    ran.expect(ran.status, &["space", &pair.b.to()])?;
    expect_alive(&pair.a, pulse.name, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(pulse.name)
}

#[test]
fn a_source_whose_state_directory_is_full_keeps_its_guest() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.before("mount -t tmpfs -o size=8m none \"$STATE\"");
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse { rate: 20, ..Pulse::small() };
    pulse.run(&pair, &pair.a)?;
    fill(&pair.a)?;
    let ran = migrate(&pair.a, &pair.b, pulse.name, &[])?;
    // The journal may have had room left in its own file: then it moves.
    let host = match ran.status {
        0 => &pair.b,
        _ => {
            ran.expect(4, &["space", "state directory"])?;
            leaks::expect_nothing_left(&pair.b)?;
            &pair.a
        }
    };
    ensure!(host.state_of(pulse.name)?.as_deref() == Some("running"));
    Ok(())
}

/// One failed write used to end the journal until the daemon was started again,
/// however much room there was by then.
#[test]
fn a_journal_that_had_no_room_works_again_when_there_is_room() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    pair.a.before("mount -t tmpfs -o size=1800k none \"$STATE\"");
    pair.a.start()?;
    pair.b.start()?;
    let pulse = Pulse { rate: 20, ..Pulse::small() };
    pulse.run(&pair, &pair.a)?;
    fill(&pair.a)?;
    let toggle = |daemon: &integration::daemon::Daemon| -> Result<i32> {
        let paused = daemon.state_of(pulse.name)?.as_deref() == Some("paused");
        let verb = if paused { "resume" } else { "pause" };
        Ok(daemon.migctl(&[verb, pulse.name])?.status)
    };
    let mut failed = false;
    for _ in 0..200 {
        failed = toggle(&pair.a)? != 0;
        if failed {
            break;
        }
    }
    ensure!(failed, "the journal never ran out of room, so this shows nothing");
    std::fs::remove_file(ballast(&pair.a)?)?;
    for _ in 0..4 {
        ensure!(toggle(&pair.a)? == 0, "the journal does not recover");
    }
    Ok(())
}

/// A file in the daemon's own view of its state directory.
fn ballast(daemon: &integration::daemon::Daemon) -> Result<std::path::PathBuf> {
    let root = format!("/proc/{}/root", daemon.pid()?);
    let path = daemon.state_dir().strip_prefix("/").context("a relative state directory")?;
    Ok(std::path::Path::new(&root).join(path).join("ballast"))
}

/// Fills the daemon's own view of its state directory to the last byte.
fn fill(daemon: &integration::daemon::Daemon) -> Result<()> {
    let mut file = std::fs::File::create(ballast(daemon)?)?;
    let mut piece = &[0x55; 65536][..];
    loop {
        match std::io::Write::write(&mut file, piece) {
            Ok(1..) => {}
            Ok(0) | Err(_) if piece.len() == 1 => return Ok(()),
            Ok(0) | Err(_) => piece = &piece[..piece.len() / 2],
        }
    }
}

#[test]
fn a_host_without_kvm_serves_and_says_what_to_load() -> Result<()> {
    let mut pair = HostPair::prepare()?;
    // An empty /dev but for what every program needs.
    pair.b.before(
        "mount -t tmpfs none /mnt; for d in null zero urandom random; do : > /mnt/$d; \
         mount --bind /dev/$d /mnt/$d; done; mount --move /mnt /dev",
    );
    pair.a.start()?;
    pair.b.start()?;
    let hosts = pair.b.ask(&["hosts"])?;
    let host = &hosts["hosts"][0];
    ensure!(host["kvm"] == false, "{host}");
    let problem = host["kvm_problem"].as_str().context("no kvm_problem")?;
    says(problem, &["/dev/kvm", "kvm_intel", "kvm_amd"])?;

    let kernel = pair.kernel().display().to_string();
    let ran = pair.b.migctl(&["run", "vm", "--kernel", &kernel, "--memory", "64M"])?;
    ran.expect(1, &["/dev/kvm", "kvm_intel"])?;
    leaks::expect_nothing_left(&pair.b)?;

    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let ran = pair.a.migctl(&["migrate", pulse.name, "--to", &to])?;
    ran.expect(3, &["/dev/kvm", "kvm_intel", &to])?;
    expect_alive(&pair.a, pulse.name, 5)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(pulse.name)
}
