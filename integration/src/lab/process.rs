//! Starts the processes of a lab and ends them, by the files that name them.

use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::layout::Layout;
use crate::binaries::Program;
use crate::wait;

/// How long a process of the lab lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Until the thread that starts it ends, however it ends.
    WithItsOwner,
    /// Until it is ended by its file.
    UntilEnded,
}

/// Held while a process is started and its file is written.
static STARTING: Mutex<()> = Mutex::new(());

/// From now on this program starts nothing, so that what is ended stays ended.
pub fn start_no_more() {
    std::mem::forget(STARTING.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Starts `command` in a session of its own, so that Ctrl-C is for the program
/// that runs the lab; its output goes to `log`, its number to `pid_file`.
///
/// # Errors
/// When it can't be started, or runs already.
pub fn start(command: &[String], life: Life, log: &Path, pid_file: &Path) -> Result<()> {
    let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(running(pid_file)?.is_none(), "{} names a process that runs", pid_file.display());
    let mut words = Vec::new();
    if life == Life::WithItsOwner {
        words.extend(["setpriv", "--pdeathsig", "KILL", "--"]);
    }
    words.push("setsid");
    words.extend(command.iter().map(String::as_str));
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let mut child = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", command[0]))?;
    let started = started_at(child.id()).context("it ended at once")?;
    fs::write(pid_file, format!("{} {started}\n", child.id()))?;
    let pid = child.id();
    // Waited for, so that it is gone when it has ended. Its end is seen by the
    // file.
    std::thread::spawn(move || child.wait());
    if life == Life::WithItsOwner {
        wait::until("the process to be bound to its owner", || Ok(is_bound(pid)))?;
    }
    Ok(())
}

/// Whether `setpriv` has done its work, which comes too late for an owner that
/// has ended before.
fn is_bound(pid: u32) -> Option<()> {
    if started_at(pid).is_none() {
        return Some(());
    }
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let first = arguments.split(|byte| *byte == 0).next()?;
    // In the middle of becoming setpriv it has no arguments yet.
    (!first.is_empty() && first != b"setpriv").then_some(())
}

/// The process that a file names, if it still runs.
///
/// # Errors
/// When the file is damaged.
pub fn running(pid_file: &Path) -> Result<Option<Pid>> {
    let Ok(text) = fs::read_to_string(pid_file) else { return Ok(None) };
    let damaged = || format!("{} is damaged", pid_file.display());
    let (pid, started) = text.trim().split_once(' ').with_context(damaged)?;
    let (pid, started): (u32, u64) =
        (pid.parse().with_context(damaged)?, started.parse().with_context(damaged)?);
    // Another process may have the number by now, but did not start then.
    if started_at(pid) != Some(started) {
        return Ok(None);
    }
    Ok(Some(Pid::from_raw(i32::try_from(pid)?)))
}

/// When a process was started, in clock ticks since boot (`proc_pid_stat(5)`,
/// field 22); none when it is gone or a zombie.
fn started_at(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Fields are counted after the name, which may have anything in it.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    (fields.next()? != "Z").then_some(())?;
    fields.nth(18)?.parse().ok()
}

/// Kills the process that a file names and removes the file.
///
/// # Errors
/// When it does not go.
pub fn end(pid_file: &Path) -> Result<()> {
    if let Some(pid) = running(pid_file)? {
        match kill(pid, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("kill process {pid}")),
        }
        wait::until(&format!("process {pid} to go"), || {
            Ok(running(pid_file)?.is_none().then_some(()))
        })?;
    }
    match fs::remove_file(pid_file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Starts the switch and waits until hosts can be plugged in.
///
/// # Errors
/// When it does not come up.
pub fn start_switch(layout: &Layout, life: Life) -> Result<()> {
    let socket = layout.switch();
    let command = [
        Program::Lab.path()?.display().to_string(),
        "switch".to_owned(),
        socket.display().to_string(),
    ];
    let pid_file = layout.switch_pid();
    start(&command, life, &layout.switch_log(), &pid_file)?;
    wait::until("the switch", || {
        ensure!(
            running(&pid_file)?.is_some(),
            "the switch ended: {}",
            fs::read_to_string(layout.switch_log()).unwrap_or_default()
        );
        Ok(UnixStream::connect(&socket).ok())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(directory: &Path, life: Life) -> std::path::PathBuf {
        let pid_file = directory.join("it.pid");
        let command = ["sleep".to_owned(), "1000".to_owned()];
        start(&command, life, &directory.join("log"), &pid_file).expect("started");
        pid_file
    }

    #[test]
    fn a_process_is_ended_by_its_file_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let pid_file = sleeper(directory.path(), Life::UntilEnded);
        assert!(running(&pid_file).expect("readable").is_some());
        end(&pid_file).expect("ended");
        assert!(!pid_file.exists());
        end(&pid_file).expect("once more does no harm");
    }

    #[test]
    fn a_process_goes_with_the_thread_that_owns_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_owned();
        let owner = std::thread::spawn(move || sleeper(&path, Life::WithItsOwner));
        let pid_file = owner.join().expect("it has started one");
        wait::until("the process to go with its owner", || {
            Ok(running(&pid_file)?.is_none().then_some(()))
        })
        .expect("gone");
    }

    #[test]
    fn another_process_with_the_same_number_is_left_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let pid_file = directory.path().join("it.pid");
        fs::write(&pid_file, format!("{} 1\n", std::process::id())).expect("written");
        assert!(running(&pid_file).expect("readable").is_none());
        end(&pid_file).expect("nothing to end");
    }
}
