//! `migctl`, run as a user would.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::binaries::Program;
use crate::wait;

/// The longest stop of a move that asks for none. In an emulated host a guest dirties
/// its memory faster than emulated CPUs carry it away within the default.
const MAX_DOWNTIME: &str = "MIGR_TEST_MAX_DOWNTIME";

/// A `migctl` that has ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its command line, for messages.
    pub command: String,
    /// Its exit status; -1 when a signal ended it.
    pub status: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Ran {
    /// Itself, if it succeeded.
    ///
    /// # Errors
    /// When it did not, with everything it said.
    pub fn ok(self) -> Result<Self> {
        if self.status == 0 {
            return Ok(self);
        }
        bail!("{} ended with {}:\n{}{}", self.command, self.status, self.stdout, self.stderr)
    }

    /// The one object it printed.
    ///
    /// # Errors
    /// When that is not one JSON object.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| {
            format!("{} printed no JSON: {}{}", self.command, self.stdout, self.stderr)
        })
    }

    /// Fails unless it ended with `status` and said every one of `words`.
    ///
    /// # Errors
    /// Saying what is missing.
    pub fn expect(&self, status: i32, words: &[&str]) -> Result<()> {
        let said = format!("{}{}", self.stdout, self.stderr);
        if self.status != status {
            bail!("{}: status {}, not {status}:\n{said}", self.command, self.status);
        }
        let folded = said.to_lowercase();
        for word in words {
            if !folded.contains(&word.to_lowercase()) {
                bail!("{}: nothing is said of {word:?}:\n{said}", self.command);
            }
        }
        Ok(())
    }
}

/// A `migctl` under way. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    /// Its standard input, while that is left open.
    input: Option<ChildStdin>,
    stdout: File,
    stderr: File,
}

impl Running {
    /// Starts it; `input` is its standard input.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(host: SocketAddr, args: &[&str], input: Option<&str>) -> Result<Self> {
        let mut running = Self::start_open(host, args, input)?;
        running.input = None;
        Ok(running)
    }

    /// The same, whose standard input does not end until it is waited for.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_open(host: SocketAddr, args: &[&str], input: Option<&str>) -> Result<Self> {
        let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let program = Program::Migctl.path()?;
        let mut command = Command::new(&program);
        command.env_remove("MIGCTL_HOST").arg("--host").arg(host.to_string()).args(args);
        if let Ok(downtime) = std::env::var(MAX_DOWNTIME)
            && is_unlimited_move(args)
        {
            command.args(["--max-downtime", &downtime]);
        }
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let mut pipe = child.stdin.take();
        if let (Some(text), Some(pipe)) = (input, &mut pipe) {
            pipe.write_all(text.as_bytes()).context("feed migctl")?;
        }
        let command = format!("migctl --host {host} {}", args.join(" "));
        Ok(Self { command, child, input: pipe, stdout, stderr })
    }

    /// What it printed so far.
    ///
    /// # Errors
    /// Those of reading.
    pub fn stdout(&mut self) -> Result<String> {
        content(&mut self.stdout)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it never ends.
    pub fn wait(mut self) -> Result<Ran> {
        self.input = None;
        let command = self.command.clone();
        let ended = wait::until(&command, || Ok(self.child.try_wait()?))?;
        Ok(Ran {
            command,
            status: ended.code().unwrap_or(-1),
            stdout: content(&mut self.stdout)?,
            stderr: content(&mut self.stderr)?,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether these arguments move something in rounds and say nothing of its stop.
fn is_unlimited_move(args: &[&str]) -> bool {
    let has = |word| args.contains(&word);
    has("migrate") && has("--to") && !has("--max-downtime") && !has("stop")
}

fn content(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_moves_in_rounds_without_a_limit_are_given_one() {
        let moves = ["-o", "json", "migrate", "web", "--to", "127.0.0.1:1"];
        assert!(is_unlimited_move(&moves));
        assert!(!is_unlimited_move(&[&moves[..], &["--max-downtime", "1ms"]].concat()));
        assert!(!is_unlimited_move(&[&moves[..], &["--mode", "stop"]].concat()));
        assert!(!is_unlimited_move(&["list"]));
    }
}
