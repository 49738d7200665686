//! Ends everything of a scenario when the user presses Ctrl-C.

use std::path::PathBuf;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::host_pair::HostPair;
use crate::leaks;

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
    let daemons = [pair.a.pid()?, pair.b.pid()?];
    let directories = [pair.a.state_dir(), pair.b.state_dir()].map(|d| d.to_path_buf());
    let everything = pair.directory().to_path_buf();
    on_signal(move |_| {
        end(&daemons);
        for directory in &directories {
            end(&leaks::vm_processes(directory));
        }
        remove(&everything);
    });
    Ok(())
}

/// From now on such a signal makes `cleanup` happen and then ends this program.
pub fn on_signal(cleanup: impl FnOnce(Signal) + Send + 'static) {
    std::thread::spawn(move || {
        let Ok(signal) = deadly().wait() else { return };
        eprintln!("{signal}: cleaning up");
        cleanup(signal);
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
