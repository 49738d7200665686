//! runc at work for a keeper.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::{BUNDLE, Container, RUNC, runc_root};
use crate::keeper::cgroup::Cgroup;
use crate::keeper::criu::session::poll_until;
use crate::keeper::hold::News;
use crate::keeper::init::DEFAULT_PATH;
use crate::sys::process::{PidFd, isolate};

/// How long runc may take: it runs the container's hooks.
const LIMIT: Duration = Duration::from_secs(60);
/// How long the end of a container may take to get here once its parent was runc.
const HANDED_OVER: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

/// What a container is started with.
#[derive(Debug)]
pub struct Start {
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its standard input.
    pub stdin: OwnedFd,
    /// Its standard output and error.
    pub stdout: OwnedFd,
    /// The number of its network namespace here, if it has one of its own.
    pub network: Option<i32>,
}

/// Has runc start a container, and tells what came of it. Dropping what this returns ends
/// that.
///
/// # Errors
/// When there is no room for a thread.
pub fn start(
    container: Container,
    start: Start,
    tell: impl FnOnce(News) + Send + 'static,
) -> io::Result<CallOff> {
    let (wanted, call_off) = io::pipe()?;
    std::thread::Builder::new().name("start".into()).spawn(move || {
        let started = container.start(&start, &wanted);
        drop(start);
        tell(News::Started(started));
    })?;
    Ok(CallOff { _wanted: call_off })
}

/// Ends the start of a container when it is dropped.
#[derive(Debug)]
pub struct CallOff {
    _wanted: PipeWriter,
}

impl Container {
    /// Starts it, unless nobody has the other end of `wanted` any more; the process id of
    /// its init. It is a child of this process when runc has ended, which must be a
    /// subreaper for that (prctl(2)).
    ///
    /// # Errors
    /// What runc says. Nothing is left of it then.
    fn start(&self, start: &Start, wanted: &PipeReader) -> io::Result<u32> {
        let Start { cgroup, stdin, stdout, network } = start;
        self.write_spec(cgroup, *network)?;
        let pid_file = self.bundle().join("pid");
        let mut command = self.runc(None);
        command.arg("run").arg("--detach").arg("--pid-file").arg(&pid_file);
        command.arg("--bundle").arg(self.bundle()).arg(&self.id);
        let mut running = Running::start(command, stdin.as_fd(), stdout.as_fd())?;
        let ended = running.end_while(wanted, LIMIT)?;
        if !ended.success() {
            return Err(io::Error::other(self.what_runc_said(ended)));
        }
        let pid = fs::read_to_string(pid_file)?;
        pid.trim().parse().map_err(io::Error::other)
    }

    /// runc, without a verb. `path` is where it looks for programs first.
    pub(super) fn runc(&self, path: Option<&std::path::Path>) -> Command {
        // What it said before does not matter any more.
        let _ = fs::remove_file(self.log());
        let mut command = Command::new(self.directory.join(RUNC));
        command.arg("--root").arg(runc_root(&self.directory));
        command.arg("--log").arg(self.log()).args(["--log-format", "json"]);
        let before = path.map_or_else(String::new, |path| format!("{}:", path.display()));
        command.env_clear().env("PATH", format!("{before}{DEFAULT_PATH}"));
        command
    }

    fn log(&self) -> PathBuf {
        self.directory.join(BUNDLE).join("runc.log")
    }

    /// Its last error.
    pub(super) fn what_runc_said(&self, ended: ExitStatus) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut errors = lines.filter(|line| line["level"] == "error");
        match errors.next_back().as_ref().and_then(|line| line["msg"].as_str()) {
            Some(said) => format!("runc: {said}"),
            None => format!("runc failed without saying why ({ended})"),
        }
    }

    /// Takes away what a runc that was killed in the middle of a restore has mounted
    /// in this mount namespace: the root file system, in the directory that whoever
    /// clears up deletes.
    pub(super) fn unmount_root(&self) {
        let at = runc_root(&self.directory).join(&self.id).join("criu-root");
        match umount2(&at, MntFlags::MNT_DETACH) {
            // It did it itself.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => eprintln!("{} stays mounted here: {error}", at.display()),
        }
    }
}

/// A runc that is at work, in a session of its own. It is killed if it is dropped
/// before its end.
pub(super) struct Running {
    child: Child,
    pub(super) process: PidFd,
    over: bool,
}

impl Running {
    /// Starts it with that input and output.
    pub(super) fn start(
        mut command: Command,
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let pass = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from).map(Stdio::from);
        command.stdin(pass(stdin)?).stdout(pass(stdout)?).stderr(pass(stdout)?).current_dir("/");
        isolate(&mut command, Vec::<(OwnedFd, _)>::new());
        let mut child = command.spawn()?;
        match PidFd::open(child.id()) {
            Ok(process) => {
                at_work().insert(child.id());
                Ok(Self { child, process, over: false })
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Waits for its end.
    pub(super) fn end(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        let mut wait = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        let over = poll_until(&mut wait, Some(Instant::now() + limit))?;
        self.status(over, limit)
    }

    /// The same, as long as somebody has the other end of `wanted`.
    fn end_while(&mut self, wanted: &PipeReader, limit: Duration) -> io::Result<ExitStatus> {
        let mut wait = [
            PollFd::new(self.process.as_fd(), PollFlags::POLLIN),
            PollFd::new(wanted.as_fd(), PollFlags::empty()),
        ];
        let over = poll_until(&mut wait, Some(Instant::now() + limit))?;
        let [process, _] = wait;
        if over && !process.any().unwrap_or_default() {
            return Err(io::Error::other("its start was called off"));
        }
        self.status(over, limit)
    }

    fn status(&mut self, over: bool, limit: Duration) -> io::Result<ExitStatus> {
        if !over {
            return Err(io::Error::other(format!(
                "runc, or a hook that it runs, takes longer than {limit:?}"
            )));
        }
        // It has ended, and has its number until it is reaped: nobody may signal its group
        // after that.
        let mut at_work = at_work();
        let failed = self.process.failed();
        if failed {
            // What it has started, as a hook, is of no use without it.
            end_group(self.child.id());
        }
        let status = self.child.wait()?;
        at_work.remove(&self.child.id());
        self.over = true;
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut at_work = at_work();
        end_group(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        at_work.remove(&self.child.id());
    }
}

/// The runcs that are at work, by number: each is the leader of a group, with its hooks.
fn at_work() -> MutexGuard<'static, BTreeSet<u32>> {
    static AT_WORK: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    AT_WORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends every runc that is at work, with the hooks that it runs.
pub fn end_all() {
    at_work().iter().for_each(|leader| end_group(*leader));
}

fn end_group(leader: u32) {
    if let Ok(group) = i32::try_from(leader) {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
}

/// Waits for the end of a container's init. As long as runc lives it is runc's child,
/// and then this process's.
#[must_use]
pub fn wait(init: u32) -> Option<ExitStatus> {
    let process = PidFd::open(init).ok()?;
    let mut wait = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll_until(&mut wait, None).ok()?;
    let ended = Instant::now();
    loop {
        match process.reap() {
            None if ended.elapsed() < HANDED_OVER => std::thread::sleep(PAUSE),
            status => return status,
        }
    }
}
