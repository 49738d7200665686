//! A user's script, run with a lab that is up.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::host::Host;
use super::layout::Layout;
use crate::binaries::Program;

/// The processes of a script, while there are some.
#[derive(Clone, Debug, Default)]
pub struct Group(Arc<Mutex<Option<Pid>>>);

impl Group {
    fn set(&self, group: Option<Pid>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = group;
    }

    /// Asks them to end.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Ends them.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // They may have ended by themselves.
            let _ = killpg(group, signal);
        }
    }
}

/// Runs it to its end; its exit status, as a shell has it.
///
/// # Errors
/// When it can't be started.
pub fn run(layout: &Layout, hosts: &[Host], script: &[String], group: &Group) -> Result<u8> {
    let (program, arguments) = script.split_first().context("no script")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LAB", Program::Lab.path()?)
        .env("MIGCTL", Program::Migctl.path()?)
        .env("MIGR_LAB_DIR", layout.root())
        .env("SHARED", layout.shared())
        .process_group(0);
    for host in hosts {
        command.env(format!("HOST{}", host.number()), host.number().migrd().to_string());
    }
    let mut child = command.spawn().with_context(|| format!("start {program}"))?;
    group.set(Some(Pid::from_raw(i32::try_from(child.id())?)));
    let status = child.wait();
    group.set(None);
    let status = status?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}
