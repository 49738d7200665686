//! Ends everything of a scenario when the user presses Ctrl-C.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::daemon::Daemon;
use crate::host_pair::HostPair;
use crate::leaks;
use crate::process::left;

/// Keeps signals that end programs from ending this one in the middle of
/// something. Must come before any thread is started.
///
/// # Errors
/// Those of the system call.
pub fn hold_signals() -> Result<()> {
    Ok(deadly().thread_block()?)
}

fn deadly() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// From now on such a signal ends the daemons of `pair`, their VMs and this
/// program, and deletes their files.
///
/// # Errors
/// When a daemon is down.
pub fn end_on_signal(pair: &HostPair) -> Result<()> {
    end_daemons_on_signal([&pair.a, &pair.b], pair.directory())
}

/// The same for daemons with process trees, whose files are below `everything`.
///
/// # Errors
/// When a daemon is down.
pub fn end_daemons_on_signal(daemons: [&Daemon; 2], everything: &Path) -> Result<()> {
    let pids = [daemons[0].pid()?, daemons[1].pid()?];
    let directories = daemons.map(|daemon| daemon.state_dir().to_path_buf());
    let everything = everything.to_path_buf();
    on_signal(move |_| {
        end(&pids);
        for directory in &directories {
            end(&leaks::vm_processes(directory));
            if let Err(error) = left::kill_trees(directory) {
                eprintln!("processes stay behind: {error:#}");
            }
        }
        remove(&everything);
    });
    Ok(())
}

/// What a signal is to make happen.
type Cleanup = Box<dyn FnOnce(Signal) + Send>;
static CLEANUP: Mutex<Option<Cleanup>> = Mutex::new(None);

/// From now on such a signal makes `cleanup` happen, instead of what it would have made
/// happen before, and then ends this program.
pub fn on_signal(cleanup: impl FnOnce(Signal) + Send + 'static) {
    let set = |new: Option<Cleanup>| {
        std::mem::replace(&mut *CLEANUP.lock().unwrap_or_else(PoisonError::into_inner), new)
    };
    if set(Some(Box::new(cleanup))).is_some() {
        return;
    }
    std::thread::spawn(move || {
        let Ok(signal) = deadly().wait() else { return };
        eprintln!("{signal}: cleaning up");
        if let Some(cleanup) = set(None) {
            cleanup(signal);
        }
        // As a shell reports a program that the signal ended.
        std::process::exit(match signal {
            Signal::SIGHUP => 129,
            Signal::SIGINT => 130,
            _ => 143,
        });
    });
}

/// Kills processes that were started here, by their numbers.
fn end(pids: &[u32]) {
    for pid in pids {
        if let Ok(pid) = i32::try_from(*pid) {
            // One that has ended already is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn remove(directory: &PathBuf) {
    if let Err(error) = std::fs::remove_dir_all(directory) {
        eprintln!("cannot remove {}: {error}", directory.display());
    }
}
