//! Process trees that CRIU moves, and what their output says about a life in
//! several places.

pub mod bench;
pub mod container;
pub mod crit;
pub mod left;
pub mod rootfs;
pub mod served;
pub mod show;
pub mod snapshot;
pub mod soak;
pub mod things;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::host_pair::{HostPair, migrate};
use crate::migctl::{Ran, Running};
use crate::wait;

/// Where Python is on every host that has its package.
pub const PYTHON: &str = "/usr/bin/python3";
const COUNTER: &str = include_str!("counter.py");

/// A program that prints the lines of its input once there is a file `gate`.
#[must_use]
pub fn gated_reader(gate: &Path) -> String {
    format!(
        "import os, sys, time\nprint('ready', flush=True)\n\
         while not os.path.exists('{}'): time.sleep(0.02)\n\
         for line in sys.stdin: print('read', line.strip(), flush=True)",
        gate.display()
    )
}

/// Two daemons that serve and can move process trees.
///
/// # Errors
/// When one has no CRIU that works, with what to do.
pub fn hosts() -> Result<HostPair> {
    let mut pair = HostPair::without_kvm()?;
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    can_move(&pair.b)?;
    Ok(pair)
}

/// Fails unless the daemon has a CRIU that works.
///
/// # Errors
/// Saying what is missing.
pub fn can_move(daemon: &Daemon) -> Result<()> {
    let hosts = daemon.ask(&["hosts"])?;
    let host = &hosts["hosts"][0];
    ensure!(
        host["criu"].is_string(),
        "these scenarios need a CRIU that works: put the path that integration/install-criu.sh \
         prints into MIGR_CRIU: {host}"
    );
    Ok(())
}

/// Starts a command as a workload.
///
/// # Errors
/// When it does not start.
pub fn start(host: &Daemon, name: &str, command: &[&str]) -> Result<()> {
    exec(host, name, &[], command)?.ok()?;
    Ok(())
}

/// Starts a Python program as a workload, and waits for its first word.
///
/// # Errors
/// When it does not start.
pub fn python(host: &Daemon, name: &str, program: &str) -> Result<()> {
    start(host, name, &[PYTHON, "-c", program])?;
    wait_for_line(host, name, "ready")
}

/// The end of an `exec-process`, however it ended.
///
/// # Errors
/// When it can't be run.
pub fn exec(host: &Daemon, name: &str, options: &[&str], command: &[&str]) -> Result<Ran> {
    host.migctl(&[&["exec-process", name], options, &["--"], command].concat())
}

/// Moves it as all of it is moved: while it stands still.
///
/// # Errors
/// When `migctl` can't be run.
pub fn moved(from: &Daemon, to: &Daemon, name: &str, options: &[&str]) -> Result<Ran> {
    migrate(from, to, name, &[&["--mode", "stop"], options].concat())
}

/// The same, which must complete; its report.
///
/// # Errors
/// When it does not.
pub fn moves(from: &Daemon, to: &Daemon, name: &str, options: &[&str]) -> Result<Value> {
    let report = moved(from, to, name, options)?.ok()?.json()?;
    ensure!(report["outcome"] == "completed", "{report}");
    Ok(report)
}

/// Begins to move it to an address.
///
/// # Errors
/// When `migctl` can't be started.
pub fn start_moving(from: &Daemon, to: &str, name: &str) -> Result<Running> {
    from.start_migctl(&["-o", "json", "migrate", name, "--to", to, "--mode", "stop"])
}

/// Types a line on its standard input.
///
/// # Errors
/// When it can't be typed.
pub fn type_line(host: &Daemon, name: &str, line: &str) -> Result<()> {
    let args = ["console", name, "--detach-after", "1s"];
    Running::start(host.address(), &args, Some(&format!("{line}\n")))?.wait()?.ok()?;
    Ok(())
}

/// All it has printed, but for a line that may still be arriving.
///
/// # Errors
/// When the log can't be read.
pub fn lines(host: &Daemon, name: &str) -> Result<Vec<String>> {
    let text = host.migctl(&["logs", name])?.ok()?.stdout;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    Ok(whole.lines().map(|line| line.trim_end().to_owned()).collect())
}

/// Waits until it has printed that line.
///
/// # Errors
/// When it never does, with what it printed instead.
pub fn wait_for_line(host: &Daemon, name: &str, line: &str) -> Result<()> {
    let mut seen = Vec::new();
    let found = wait::until(&format!("{name} to print {line:?}"), || {
        seen = lines(host, name)?;
        Ok(seen.iter().any(|printed| printed == line).then_some(()))
    });
    found.with_context(|| format!("it printed {seen:?}"))
}

/// Waits until the workload is in that state.
///
/// # Errors
/// When it never is.
pub fn wait_for_state(host: &Daemon, name: &str, state: &str) -> Result<()> {
    wait::until(&format!("{name} to be {state}"), || {
        Ok((host.state_of(name)?.as_deref() == Some(state)).then_some(()))
    })
}

/// Processes that count, and check everything they use with each number.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    /// Its name.
    pub name: &'static str,
    /// Memory with checksums, in MiB.
    pub memory: u32,
    /// How many children it has, each the child of the one before.
    pub depth: u32,
    /// Threads of each process, beside its first.
    pub threads: u32,
}

impl Counter {
    /// Small enough to be started often.
    #[must_use]
    pub fn small() -> Self {
        Self { name: "count", memory: 8, depth: 1, threads: 3 }
    }

    /// Starts it and waits for its first number.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn run(&self, host: &Daemon) -> Result<()> {
        let numbers = [self.memory, self.depth, self.threads].map(|number| number.to_string());
        let [memory, depth, threads] = &numbers;
        start(host, self.name, &[PYTHON, "-c", COUNTER, memory, depth, threads])?;
        self.counts(host, 1)?;
        Ok(())
    }

    /// Checks that it lives at `host`: `more` further numbers come, its log has every
    /// number once and in order, and nothing is wrong. The last number.
    ///
    /// # Errors
    /// Saying what is wrong.
    pub fn counts(&self, host: &Daemon, more: u64) -> Result<u64> {
        let state = host.state_of(self.name)?;
        ensure!(state.as_deref() == Some("running"), "it is {state:?} at {}", host.address());
        let until = self.last(host)? + more;
        wait::until(&format!("count {until} of {}", self.name), || {
            let state = host.state_of(self.name)?;
            ensure!(state.as_deref() == Some("running"), "it is {state:?} after {}", until - more);
            let last = self.last(host)?;
            Ok((last >= until).then_some(last))
        })
    }

    /// The last number of its log, which must be complete and in order.
    ///
    /// # Errors
    /// Saying where it is not.
    pub fn last(&self, host: &Daemon) -> Result<u64> {
        count(&lines(host, self.name)?)
    }
}

/// The last number of a log that has to have every number once and in order, and
/// nothing else.
fn count(lines: &[String]) -> Result<u64> {
    let mut last = 0;
    for line in lines {
        let number = line.strip_prefix("count ").and_then(|number| number.parse::<u64>().ok());
        match number {
            Some(number) if number == last + 1 => last = number,
            Some(number) => bail!("{number} follows {last}"),
            None => bail!("after {last}: {line}"),
        }
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_every_number_once_and_nothing_else() {
        let log =
            |lines: &[&str]| count(&lines.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(log(&[]).unwrap(), 0);
        assert_eq!(log(&["count 1", "count 2"]).unwrap(), 2);
        for odd in [&["count 2"][..], &["count 1", "count 1"], &["count 1", "count 3"], &["x"]] {
            assert!(log(odd).is_err(), "{odd:?}");
        }
    }
}
