//! Processes that run already become workloads, by CRIU: they count on with the
//! numbers that they had, and move. What can't be taken over is named and untouched.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::leaks;
use integration::migctl::Ran;
use integration::process::{self, PYTHON, can_move, left, moves, wait_for_state};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const NAME: &str = "taken";
/// Two processes, each of which writes to its own file only what follows from all it
/// has in memory. The first ends with status 7 at SIGTERM.
const PROGRAM: &str = "\
import os, signal, sys, threading, time
place = sys.argv[1]
child = os.fork()
who = 'parent' if child else 'child'
memory = list(range(100000))
def end(*_):
    if child: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
beat = threading.Event()
threading.Thread(target=lambda: [beat.set() or time.sleep(0.005) for _ in iter(int, 1)], daemon=True).start()
out = open(f'{place}/{who}', 'a', buffering=1)
count = 0
while True:
    beat.wait(); beat.clear()
    memory[count % 100000] += 1
    count += 1
    if sum(memory) != 4999950000 + count: print('WRONG', file=out)
    print(os.getpid(), count, file=out)
    time.sleep(0.01)
    if child and os.path.exists(f'{place}/leave'): os._exit(7)
    if not child and os.path.exists(f'{place}/end'): os._exit(0)
    if not os.path.isdir(place): os._exit(9)
";

/// A program that nobody but the test has started. Killed when dropped.
struct Program {
    child: Child,
    place: TempDir,
}

impl Program {
    /// Starts it in a session of its own.
    fn start(pair: &HostPair, script: &str, stdout: Stdio) -> Result<Self> {
        let place = tempfile::tempdir_in(pair.directory())?;
        // Pipes of whoever runs the tests would be in the way.
        let script = format!("import os\nos.closerange(3, 65536)\n{script}");
        let mut command = Command::new("setsid");
        command.args([PYTHON, "-c", &script]).arg(place.path()).current_dir("/");
        command.stdin(Stdio::null()).stdout(stdout);
        command.stderr(File::create(place.path().join("stderr"))?);
        Ok(Self { child: command.spawn().context("install util-linux")?, place })
    }

    fn counting(pair: &HostPair) -> Result<Self> {
        let program = Self::start(pair, PROGRAM, Stdio::null())?;
        program.counts_on(0)?;
        Ok(program)
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// The last number of each process: the sequence must be complete, and the process
    /// must have kept its own number.
    fn counts(&self) -> Result<[u64; 2]> {
        let mut lasts = [0; 2];
        for (who, last) in ["parent", "child"].into_iter().zip(&mut lasts) {
            let text = fs::read_to_string(self.place.path().join(who)).unwrap_or_default();
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            let mut pid = None;
            for line in whole.lines() {
                let (number, count) = line.split_once(' ').with_context(|| line.to_owned())?;
                ensure!(*pid.get_or_insert(number) == number, "{who} became {number}: {line}");
                let count: u64 = count.parse()?;
                ensure!(count == *last + 1, "{who}: {count} follows {last}");
                *last = count;
            }
            if who == "parent" && *last > 0 {
                ensure!(pid == Some(self.pid().as_str()), "it has another number: {pid:?}");
            }
        }
        Ok(lasts)
    }

    /// Waits until both have counted on beyond `before`.
    fn counts_on(&self, before: u64) -> Result<u64> {
        wait::until("both processes to count on", || {
            let [parent, child] = self.counts()?;
            Ok((parent.min(child) >= before + 10).then_some(parent.max(child)))
        })
        .with_context(|| fs::read_to_string(self.place.path().join("stderr")).unwrap_or_default())
    }

    /// Waits for the end of what was started; whether it was killed.
    fn was_replaced(&mut self) -> Result<bool> {
        use std::os::unix::process::ExitStatusExt;
        let ended = wait::until("the original to end", || Ok(self.child.try_wait()?))?;
        Ok(ended.signal() == Some(Signal::SIGKILL as i32))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn adopt(host: &Daemon, pid: &str, options: &[&str]) -> Result<Ran> {
    host.migctl(&[&["adopt", pid, "--name", NAME], options].concat())
}

fn adopted(host: &Daemon, pid: &str) -> Result<()> {
    adopt(host, pid, &[])?.ok()?;
    Ok(())
}

fn untouched(host: &Daemon) -> Result<()> {
    ensure!(host.workloads()?.is_empty(), "{:?}", host.workloads()?);
    leaks::expect_nothing_left(host)
}

#[test]
fn an_adopted_tree_counts_on_with_its_numbers_and_moves_there_and_back() -> Result<()> {
    let pair = process::hosts()?;
    let mut program = Program::counting(&pair)?;
    let pid = program.pid();
    adopt(&pair.a, &pid, &["--dry-run"])?.expect(0, &["can be adopted"])?;
    untouched(&pair.a)?;
    adopted(&pair.a, &pid)?;
    ensure!(program.was_replaced()?, "the original ended by itself");
    let mut before = program.counts_on(program.counts()?[0])?;
    let inspected = pair.a.ask(&["inspect", NAME])?;
    ensure!(inspected["process"]["argv"][0] == PYTHON, "{inspected}");
    ensure!(inspected["process"]["processes"] == 3, "with the one above them: {inspected}");
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        moves(from, to, NAME, &["--verify"])?;
        before = program.counts_on(before)?;
    }
    // It does what any workload does.
    pair.a.migctl(&["pause", NAME])?.ok()?;
    let paused_at = program.counts()?;
    let directory = pair.directory().join("snapshot").display().to_string();
    pair.a.migctl(&["checkpoint", NAME, "--to", &directory])?.ok()?;
    ensure!(program.counts()? == paused_at, "it ran while paused");
    pair.a.migctl(&["resume", NAME])?.ok()?;
    program.counts_on(before)?;
    pair.finish(NAME)
}

#[test]
fn an_adopted_tree_ends_as_it_would_have_also_after_a_move() -> Result<()> {
    let pair = process::hosts()?;
    for moving in [false, true] {
        let program = Program::counting(&pair)?;
        adopted(&pair.a, &program.pid())?;
        let before = program.counts()?[0];
        program.counts_on(before)?;
        let host = if moving { &pair.b } else { &pair.a };
        if moving {
            moves(&pair.a, &pair.b, NAME, &[])?;
        }
        host.migctl(&["stop", NAME])?.ok()?;
        wait_for_state(host, NAME, "stopped")?;
        host.migctl(&["inspect", NAME])?.expect(0, &["it exited with status 7"])?;
        pair.finish(NAME)?;
    }
    Ok(())
}

#[test]
fn an_adopted_tree_ends_with_the_last_of_its_processes() -> Result<()> {
    let pair = process::hosts()?;
    let program = Program::counting(&pair)?;
    adopted(&pair.a, &program.pid())?;
    fs::write(program.place.path().join("leave"), "")?;
    // Nobody but the process above it takes the status of the first.
    wait::until("the first process to be gone", || {
        let inspected = pair.a.ask(&["inspect", NAME])?;
        Ok((inspected["process"]["processes"] == 2).then_some(()))
    })?;
    let [parent, child] = program.counts()?;
    wait::until("its child to count on", || Ok((program.counts()?[1] > child + 10).then_some(())))?;
    ensure!(program.counts()?[0] == parent, "the first process goes on");
    ensure!(pair.a.state_of(NAME)?.as_deref() == Some("running"));
    fs::write(program.place.path().join("end"), "")?;
    wait_for_state(&pair.a, NAME, "stopped")?;
    pair.a.migctl(&["inspect", NAME])?.expect(0, &["it exited with status 7"])?;
    pair.finish(NAME)
}

/// A program of which `opened` keeps it from being taken over, until it gets SIGUSR1.
fn refused_for(opened: &str, code: &str, words: &[&str]) -> Result<()> {
    let pair = process::hosts()?;
    let holder = format!(
        "import fcntl, os, signal, socket, subprocess, sys, time\n\
         place = sys.argv[1]\n\
         held = {opened}\n\
         signal.signal(signal.SIGUSR1, lambda *_: (held.close(), open(place + '/closed', 'w')))\n\
         open(place + '/ready', 'w')\n\
         while True: time.sleep(0.01)\n"
    );
    let mut program = Program::start(&pair, &holder, Stdio::null())?;
    let pid = program.pid();
    let exists = |name: &str| {
        let path = program.place.path().join(name);
        wait::until(name, || Ok(path.exists().then_some(())))
    };
    exists("ready")?;
    for options in [&["--dry-run"][..], &[]] {
        adopt(&pair.a, &pid, options)?.expect(3, &[&[code, &pid][..], words].concat())?;
        untouched(&pair.a)?;
    }
    kill(Pid::from_raw(program.child.id().try_into()?), Signal::SIGUSR1)?;
    exists("closed")?;
    adopted(&pair.a, &pid)?;
    ensure!(program.was_replaced()?, "the original ended by itself");
    moves(&pair.a, &pair.b, NAME, &[])?;
    pair.finish(NAME)
}

#[test]
fn a_listening_socket_is_named_and_not_taken_over() -> Result<()> {
    refused_for("socket.create_server(('127.0.0.1', 0))", "socket-bound", &["tcp port"])
}

#[test]
fn a_unix_socket_with_a_name_is_named_and_not_taken_over() -> Result<()> {
    let opened = "socket.create_server(place + '/name', family=socket.AF_UNIX)";
    refused_for(opened, "socket-bound", &["/name"])
}

#[test]
fn a_pipe_to_somebody_else_is_named_and_not_taken_over() -> Result<()> {
    let pair = process::hosts()?;
    let program = Program::start(&pair, PROGRAM, Stdio::piped())?;
    let before = program.counts_on(0)?;
    adopt(&pair.a, &program.pid(), &[])?.expect(3, &["pipe-outside", &program.pid()])?;
    untouched(&pair.a)?;
    program.counts_on(before)?;
    pair.finish(NAME)
}

#[test]
fn what_is_no_tree_of_its_own_is_named_and_not_taken_over() -> Result<()> {
    let pair = process::hosts()?;
    let mut child = Command::new("/bin/sleep").arg("1000").stdin(Stdio::null()).spawn()?;
    let refused = adopt(&pair.a, &child.id().to_string(), &[])?;
    let daemon = adopt(&pair.a, &pair.a.pid()?.to_string(), &[])?;
    let first = adopt(&pair.a, "1", &[])?;
    child.kill()?;
    child.wait()?;
    refused.expect(3, &["session-outside", "setsid"])?;
    daemon.expect(3, &["not-adoptable", "this daemon"])?;
    first.expect(3, &["not-adoptable"])?;
    adopt(&pair.a, &child.id().to_string(), &[])?.expect(1, &["there is no process"])?;
    adopt(&pair.a, "0", &[])?.expect(2, &[])?;
    // A workload is not taken over once more.
    process::start(&pair.a, "job", &["/bin/sleep", "1000"])?;
    let init = pair.a.ask(&["inspect", "job"])?["process"]["pid"].to_string();
    adopt(&pair.a, &init, &[])?.expect(3, &["not-adoptable", "migr"])?;
    pair.finish("job")
}

#[test]
fn a_name_that_is_taken_leaves_the_original_alone() -> Result<()> {
    let pair = process::hosts()?;
    process::start(&pair.a, NAME, &["/bin/sleep", "1000"])?;
    let program = Program::counting(&pair)?;
    let before = program.counts()?[0];
    adopt(&pair.a, &program.pid(), &[])?.expect(1, &[NAME])?;
    program.counts_on(before)?;
    pair.finish(NAME)
}

/// A CRIU that does what it is to do until it has to do that one thing.
fn failing_criu(place: &Path, fails_at: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let real = std::env::var("MIGR_CRIU").context("MIGR_CRIU names no CRIU")?;
    let script = place.join("criu");
    fs::write(&script, format!("#!/bin/sh\n{fails_at}\nexec {real} \"$@\"\n"))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

/// CRIU can't make the copy: its second run for this tree fails.
#[test]
fn an_original_goes_on_when_its_copy_can_not_be_made() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    // The one that makes the copy is in a PID namespace with few processes.
    let fails = "if [ \"$2\" = swrk ] && [ \"$$\" -lt 20 ]; then exit 3; fi";
    pair.a.criu(&failing_criu(pair.directory(), fails)?);
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    let program = Program::counting(&pair)?;
    let before = program.counts()?[0];
    adopt(&pair.a, &program.pid(), &[])?.expect(1, &["criu", "exited with status 3"])?;
    untouched(&pair.a)?;
    program.counts_on(before)?;
    pair.finish(NAME)
}

/// The daemon is lost while both are held: nothing was journaled, so the original is
/// what goes on.
#[test]
fn an_original_goes_on_when_its_keeper_is_killed_before_the_end() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    // The copy's CRIU does not begin.
    let waits = "if [ \"$2\" = swrk ] && [ \"$$\" -lt 20 ]; then exec sleep 1000; fi";
    pair.a.criu(&failing_criu(pair.directory(), waits)?);
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    let program = Program::counting(&pair)?;
    let adopting = pair.a.start_migctl(&["adopt", &program.pid(), "--name", NAME])?;
    let keeper = wait::until("a copy to be begun", || {
        let keeper = left::keepers(pair.a.state_dir()).pop();
        // Its first process, and the CRIU that makes the rest.
        Ok(keeper.filter(|keeper| keeper.processes().is_ok_and(|all| all.len() == 2)))
    })?;
    let held = program.counts()?;
    ensure!(program.counts()? == held, "it runs while it is copied");
    kill(Pid::from_raw(keeper.pid.try_into()?), Signal::SIGKILL)?;
    adopting.wait()?.expect(1, &[])?;
    program.counts_on(held[0])?;
    untouched(&pair.a)?;
    pair.finish(NAME)
}
