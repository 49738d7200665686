//! Process trees move between two daemons with real CRIU, and do not notice.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::process::{
    self, Counter, PYTHON, can_move, exec, left, lines, moved, moves, python, start, type_line,
    wait_for_line, wait_for_state,
};

#[test]
fn a_tree_moves_there_and_back_six_times_and_leaves_nothing_behind() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    let mut last = 0;
    for time in 0..6 {
        let (from, to) = if time % 2 == 0 { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
        let report = moves(from, to, counter.name, &[])?;
        ensure!(report["epoch"] == time + 2, "move {time}: {report}");
        ensure!(report["verified"].is_null(), "{report}");
        leaks::expect_nothing_left(from)?;
        let list = to.workloads()?;
        ensure!(list.len() == 1 && list[0]["kind"] == "process", "{list:?}");
        ensure!(list[0]["epoch"] == time + 2, "{list:?}");
        let now = counter.counts(to, 5)?;
        ensure!(now > last, "{now} after {last}");
        last = now;
    }
    pair.finish(counter.name)
}

#[test]
fn what_arrives_is_verified_when_asked_for() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    let report = moves(&pair.a, &pair.b, counter.name, &["--verify"])?;
    ensure!(report["verified"] == true && report["mode"] == "stop", "{report}");
    counter.counts(&pair.b, 5)?;
    pair.finish(counter.name)
}

#[test]
fn a_paused_tree_arrives_paused_and_goes_on_when_resumed() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    pair.a.migctl(&["pause", counter.name])?.ok()?;
    let paused_at = counter.last(&pair.a)?;
    moves(&pair.a, &pair.b, counter.name, &[])?;
    ensure!(pair.b.state_of(counter.name)?.as_deref() == Some("paused"));
    ensure!(counter.last(&pair.b)? == paused_at, "it ran while paused");
    pair.b.migctl(&["resume", counter.name])?.ok()?;
    counter.counts(&pair.b, 5)?;
    pair.finish(counter.name)
}

#[test]
fn twenty_processes_with_sixty_threads_move() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter { memory: 2, depth: 19, threads: 3, ..Counter::small() };
    counter.run(&pair.a)?;
    moves(&pair.a, &pair.b, counter.name, &[])?;
    counter.counts(&pair.b, 5)?;
    let keepers = left::keepers(pair.b.state_dir());
    let keeper = keepers.first().context("no keeper at the destination")?;
    ensure!(keeper.processes()?.len() == 20, "{:?}", keeper.processes());
    // Each has the one that it was started with, and three more.
    ensure!(keeper.threads()?.len() == 80, "{:?}", keeper.threads());
    moves(&pair.b, &pair.a, counter.name, &["--verify"])?;
    counter.counts(&pair.a, 5)?;
    pair.finish(counter.name)
}

/// Holds what `opened` makes until it reads a line, and repeats what it reads.
fn holds(opened: &str) -> String {
    format!(
        "import ctypes, os, socket, sys\n\
         held = {opened}\n\
         print('ready', flush=True)\n\
         for line in sys.stdin:\n\
         \x20   if held is not None: os.close(held) if isinstance(held, int) else held.close()\n\
         \x20   held = None\n\
         \x20   print(line.strip(), flush=True)\n"
    )
}

/// A dry run and a move are refused because of what `opened` is; when it is closed,
/// it moves.
fn blocked_by(pair: &HostPair, opened: &str, code: &str, words: &[&str]) -> Result<()> {
    let name = "holder";
    python(&pair.a, name, &holds(opened))?;
    let before = left::keepers(pair.a.state_dir());
    for options in [&["--dry-run"][..], &[]] {
        let ran = moved(&pair.a, &pair.b, name, options)?;
        ran.expect(3, &[&[code][..], words].concat())?;
        ensure!(pair.a.state_of(name)?.as_deref() == Some("running"));
        ensure!(left::keepers(pair.a.state_dir()) == before, "another keeper has it");
        leaks::expect_nothing_left(&pair.b)?;
    }
    type_line(&pair.a, name, "close")?;
    wait_for_line(&pair.a, name, "close")?;
    let plan = moved(&pair.a, &pair.b, name, &["--dry-run"])?.ok()?.json()?;
    ensure!(plan["possible"] == true, "{plan}");
    moves(&pair.a, &pair.b, name, &[])?;
    type_line(&pair.b, name, "more")?;
    wait_for_line(&pair.b, name, "more")?;
    ensure!(lines(&pair.b, name)? == ["ready", "close", "more"], "{:?}", lines(&pair.b, name)?);
    pair.finish(name)
}

#[test]
fn a_connection_of_the_hosts_network_is_named_and_does_not_move() -> Result<()> {
    let pair = process::hosts()?;
    let outside = TcpListener::bind("127.0.0.1:0")?;
    let address = outside.local_addr()?;
    let opened = format!("socket.create_connection(('127.0.0.1', {}))", address.port());
    blocked_by(&pair, &opened, "established-tcp", &[&address.to_string(), "--drop-connections"])
}

#[test]
fn an_io_uring_is_named_and_does_not_move() -> Result<()> {
    let pair = process::hosts()?;
    let opened = "ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120))";
    blocked_by(&pair, opened, "io-uring", &["io_uring", "fd "])
}

#[test]
fn an_eventfd_that_is_a_semaphore_is_named_and_does_not_move() -> Result<()> {
    let pair = process::hosts()?;
    let opened = "__import__('os').eventfd(1, __import__('os').EFD_SEMAPHORE)";
    blocked_by(&pair, opened, "eventfd-semaphore", &["counter", "fd "])
}

/// Puts a copy of the shell at `program`.
fn shell_at(program: &Path) -> Result<()> {
    fs::copy("/bin/sh", program)?;
    Ok(fs::set_permissions(program, fs::Permissions::from_mode(0o755))?)
}

const LOOP: &str = "echo ready; while :; do sleep 0.05; done";

/// The destination has something else where the workload's files are.
fn another_world(hide: &str, words: &[&str], cwd: bool) -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let place = pair.directory().join("tools");
    let (program, work) = (place.join("tool"), place.join("work"));
    fs::create_dir_all(&work)?;
    shell_at(&program)?;
    let other = pair.directory().join("other");
    let mut bytes = fs::read(&program)?;
    *bytes.last_mut().context("an empty program")? ^= 1;
    fs::write(&other, bytes)?;
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755))?;
    let work = work.display().to_string();
    let (place, program) = (place.display().to_string(), program.display().to_string());
    let hide = hide.replace("PLACE", &place).replace("PROGRAM", &program);
    pair.b.before(&hide.replace("OTHER", &other.display().to_string()));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.b)?;
    let (name, run) = ("shell", if cwd { "/bin/sh" } else { &program });
    let options: &[&str] = if cwd { &["--cwd", &work] } else { &[] };
    exec(&pair.a, name, options, &[run, "-c", LOOP])?.ok()?;
    wait_for_line(&pair.a, name, "ready")?;
    for dry in [&["--dry-run"][..], &[]] {
        let named = if cwd { &work } else { &program };
        let to = pair.b.to();
        moved(&pair.a, &pair.b, name, dry)?.expect(3, &[words, &[named, &to]].concat())?;
        ensure!(pair.a.state_of(name)?.as_deref() == Some("running"));
        leaks::expect_nothing_left(&pair.b)?;
    }
    pair.finish(name)
}

#[test]
fn a_program_that_the_destination_has_not_is_named() -> Result<()> {
    another_world("mount -t tmpfs none PLACE", &["destination-file-missing"], false)
}

#[test]
fn a_program_that_is_another_at_the_destination_is_named() -> Result<()> {
    another_world("mount --bind OTHER PROGRAM", &["destination-file-differs"], false)
}

#[test]
fn a_working_directory_that_the_destination_has_not_is_named() -> Result<()> {
    another_world("mount -t tmpfs none PLACE", &["destination-file-missing"], true)
}

#[test]
fn a_destination_without_criu_refuses_and_says_what_it_lacks() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let nothing = pair.directory().join("no-criu");
    pair.b.criu(&nothing);
    pair.a.start()?;
    pair.b.start()?;
    let hosts = pair.b.ask(&["hosts"])?;
    ensure!(hosts["hosts"][0]["criu"].is_null(), "{hosts}");
    let path = nothing.display().to_string();
    let problem = hosts["hosts"][0]["criu_problem"].as_str().context("no criu_problem")?;
    ensure!(problem.contains(&path), "{problem}");
    exec(&pair.b, "job", &[], &["/bin/sleep", "1"])?.expect(1, &["criu", &path])?;
    leaks::expect_nothing_left(&pair.b)?;

    let counter = Counter::small();
    counter.run(&pair.a)?;
    for options in [&["--dry-run"][..], &[]] {
        let ran = moved(&pair.a, &pair.b, counter.name, options)?;
        ran.expect(3, &["criu", &path, &pair.b.to()])?;
        counter.counts(&pair.a, 5)?;
        leaks::expect_nothing_left(&pair.b)?;
    }
    pair.finish(counter.name)
}

#[test]
fn how_it_ended_is_told_where_it_ended() -> Result<()> {
    let pair = process::hosts()?;
    let program = "import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nsys.exit(3)";
    for moving in [false, true] {
        python(&pair.a, "job", program)?;
        let host = if moving { &pair.b } else { &pair.a };
        if moving {
            moves(&pair.a, &pair.b, "job", &[])?;
        }
        type_line(host, "job", "end")?;
        wait_for_state(host, "job", "stopped")?;
        host.migctl(&["inspect", "job"])?.expect(0, &["it exited with status 3"])?;
        ensure!(lines(host, "job")? == ["ready"], "its log is lost");
        pair.finish("job")?;
    }
    Ok(())
}

#[test]
fn input_that_was_not_read_before_a_move_is_read_after_it() -> Result<()> {
    let pair = process::hosts()?;
    let gate = pair.directory().join("gate");
    let program = process::gated_reader(&gate);
    python(&pair.a, "reader", &program)?;
    type_line(&pair.a, "reader", "one")?;
    type_line(&pair.a, "reader", "two")?;
    moves(&pair.a, &pair.b, "reader", &[])?;
    moves(&pair.b, &pair.a, "reader", &[])?;
    type_line(&pair.a, "reader", "three")?;
    ensure!(lines(&pair.a, "reader")? == ["ready"], "it has read already");
    fs::write(&gate, "")?;
    wait_for_line(&pair.a, "reader", "read three")?;
    let all = lines(&pair.a, "reader")?;
    ensure!(all == ["ready", "read one", "read two", "read three"], "{all:?}");
    pair.finish("reader")
}

/// CRIU 4.2 sets a periodic timer that has expired to expire never again.
#[test]
fn a_periodic_timer_that_expires_while_nothing_runs_ticks_on() -> Result<()> {
    let pair = process::hosts()?;
    let program = "import ctypes, os, struct\n\
                   libc = ctypes.CDLL(None)\n\
                   fd = libc.timerfd_create(1, 0)\n\
                   times = struct.pack('<qqqq', 0, 20000000, 0, 20000000)\n\
                   libc.timerfd_settime(fd, 0, times, None)\n\
                   print('ready', flush=True)\n\
                   count = 0\n\
                   while os.read(fd, 8):\n\
                   \x20   count += 1\n\
                   \x20   print(count, flush=True)";
    python(&pair.a, "ticks", program)?;
    pair.a.migctl(&["pause", "ticks"])?.ok()?;
    moves(&pair.a, &pair.b, "ticks", &[])?;
    let before = lines(&pair.b, "ticks")?.len();
    pair.b.migctl(&["resume", "ticks"])?.ok()?;
    wait_for_line(&pair.b, "ticks", &(before + 10).to_string())?;
    pair.finish("ticks")
}

#[test]
fn a_command_that_does_not_handle_sigterm_is_not_stopped_without_force() -> Result<()> {
    let pair = process::hosts()?;
    start(&pair.a, "job", &["/bin/sleep", "1000"])?;
    pair.a.migctl(&["stop", "job"])?.expect(1, &["SIGTERM", "migctl stop --force"])?;
    ensure!(pair.a.state_of("job")?.as_deref() == Some("running"));
    pair.a.migctl(&["stop", "job", "--force"])?.ok()?;
    ensure!(pair.a.state_of("job")?.as_deref() == Some("stopped"));
    pair.a.migctl(&["inspect", "job"])?.expect(0, &["stopped by an operator"])?;
    pair.finish("job")
}

#[test]
fn a_command_that_handles_sigterm_ends_when_asked_also_after_a_move() -> Result<()> {
    let pair = process::hosts()?;
    let program = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n\
                   print('ready', flush=True)\nwhile True: signal.pause()";
    for moving in [false, true] {
        python(&pair.a, "job", program)?;
        let host = if moving { &pair.b } else { &pair.a };
        if moving {
            moves(&pair.a, &pair.b, "job", &[])?;
        }
        host.migctl(&["stop", "job"])?.ok()?;
        wait_for_state(host, "job", "stopped")?;
        host.migctl(&["inspect", "job"])?.expect(0, &["it exited with status 7"])?;
        pair.finish("job")?;
    }
    Ok(())
}

#[test]
fn a_command_that_can_not_start_says_why_and_leaves_nothing() -> Result<()> {
    let pair = process::hosts()?;
    let cases: [(&[&str], &[&str], &[&str]); 5] = [
        (&[], &["/nowhere/tool"], &["cannot run /nowhere/tool", "No such file"]),
        (&[], &["no-such-command"], &["no command no-such-command", "/usr/bin"]),
        (&[], &["/etc/passwd"], &["cannot run /etc/passwd", "Permission denied"]),
        (&["--env", "PATH=/nowhere"], &["sleep", "1"], &["no command sleep", "/nowhere"]),
        (&["--cwd", "/nowhere/at-all"], &[PYTHON], &["/nowhere/at-all", "No such file"]),
    ];
    for (options, command, words) in cases {
        exec(&pair.a, "job", options, command)?.expect(1, words)?;
        leaks::expect_nothing_left(&pair.a)?;
    }
    // The name is free again.
    start(&pair.a, "job", &["/bin/sleep", "1000"])?;
    exec(&pair.a, "job", &[], &["/bin/sleep", "1"])?.expect(1, &["job"])?;
    pair.finish("job")
}
