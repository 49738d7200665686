//! The first process of a tree that was adopted. The tree's own first process was
//! process 1 of no PID namespace, and keeps its number: this one is what the kernel
//! wants beside it, takes in orphans, and ends with the tree.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What a shell adds to the number of a signal that ended a program.
const BY_SIGNAL: i32 = 128;

/// Waits until process `root`, and everything else here, has ended; the exit status
/// of `root`. SIGTERM is passed on to it.
///
/// # Errors
/// What sigprocmask(2) says.
pub fn run(root: u32) -> nix::Result<i32> {
    let root = Pid::from_raw(i32::try_from(root).unwrap_or(i32::MAX));
    let mut heard = SigSet::empty();
    heard.add(Signal::SIGCHLD);
    heard.add(Signal::SIGTERM);
    heard.thread_block()?;
    let mut ended = None;
    loop {
        let children = reap(root, &mut ended);
        // Before the tree is there this has no children, either.
        if let (Some(status), false) = (ended, children) {
            return Ok(status);
        }
        if heard.wait()? == Signal::SIGTERM {
            // It may have ended just now.
            let _ = kill(root, Signal::SIGTERM);
        }
    }
}

/// Reaps what has ended, and says whether anything is left.
fn reap(root: Pid, ended: &mut Option<i32>) -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid == root => *ended = Some(status),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == root => {
                *ended = Some(BY_SIGNAL + signal as i32);
            }
            Ok(WaitStatus::StillAlive) => return true,
            Err(Errno::ECHILD) => return false,
            Ok(_) | Err(_) => {}
        }
    }
}
