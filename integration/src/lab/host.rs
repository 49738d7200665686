//! One host's life, from outside: power, network cable, commands.

use std::fs::{self, File};
use std::io::Read;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::channel::{Channel, LIMIT};
use super::layout::Layout;
use super::process::{self, Life};
use super::protocol::Order;
use super::qemu::{self, Accelerator};
use super::qmp;
use super::settings::{HostNumber, Settings};
use crate::migctl::Ran;

/// The size of a host's disk, in bytes. It takes as much room outside as was
/// written to it.
const DISK_BYTES: u64 = 16 << 30;
/// Clock settings until the message took next to no time.
const CLOCK_TRIES: usize = 5;

/// How a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Powered off.
    Off,
    /// On, but its instructions do not go on.
    Frozen,
    /// On.
    On,
}

/// A host.
#[derive(Clone, Debug)]
pub struct Host {
    pub(super) layout: Layout,
    settings: Settings,
    number: HostNumber,
}

impl Host {
    pub(super) fn new(layout: &Layout, settings: &Settings, number: HostNumber) -> Self {
        Self { layout: layout.clone(), settings: settings.clone(), number }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> HostNumber {
        self.number
    }

    /// Gives it an empty disk.
    ///
    /// # Errors
    /// When there is one, or mkfs is missing.
    pub(super) fn make_disk(&self) -> Result<()> {
        let path = self.layout.disk(self.number);
        let disk = File::create_new(&path).with_context(|| format!("make {}", path.display()))?;
        disk.set_len(DISK_BYTES)?;
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path).output();
        let made = made.context("mkfs.ext4 is missing: install e2fsprogs")?;
        ensure!(made.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&made.stderr));
        Ok(())
    }

    /// Powers it on. It boots meanwhile: [`Host::wait_up`].
    ///
    /// # Errors
    /// When it is on, or QEMU can't be started.
    pub fn power_on(&self, life: Life) -> Result<()> {
        let (layout, number) = (&self.layout, self.number);
        let accelerator = Accelerator::of_this_machine();
        let command = qemu::command(layout, &self.settings, number, accelerator)?;
        // A cable is plugged in at a start.
        self.note_cable(true)?;
        process::start(&command, life, &layout.qemu_log(number), &layout.pid(number))
            .with_context(|| format!("power host {number} on"))
    }

    /// Waits until its agent answers, and sets its clock.
    ///
    /// # Errors
    /// When it goes off instead, with what its console said.
    pub fn wait_up(&self) -> Result<()> {
        let mut channel = self.channel()?;
        for _ in 0..CLOCK_TRIES {
            channel.set_clock()?;
        }
        Ok(())
    }

    /// The first line in which its kernel complained of itself since the lab was
    /// made.
    pub(super) fn complaint(&self) -> Option<String> {
        let console = fs::read_to_string(self.layout.console(self.number)).unwrap_or_default();
        let told = ["Kernel panic", "Oops:", "BUG:", "general protection fault", "rcu: INFO"];
        let mut lines = console.lines();
        lines.find(|line| told.iter().any(|words| line.contains(words))).map(str::to_owned)
    }

    /// Waits until its agent answers, for at most `limit`.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn greet(&self, limit: Duration) -> Result<()> {
        self.channel_within(limit).map(drop)
    }

    /// What its QEMU says to a command of its monitor.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn monitor(&self, command: &str) -> Result<String> {
        let said = self.order("human-monitor-command", &json!({"command-line": command}))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    fn channel(&self) -> Result<Channel> {
        self.channel_within(LIMIT)
    }

    fn channel_within(&self, limit: Duration) -> Result<Channel> {
        Channel::open(&self.layout, self.number, limit, &mut || self.expect_on())
            .with_context(|| format!("reach host {}", self.number))
    }

    fn expect_on(&self) -> Result<()> {
        ensure!(
            process::running(&self.layout.pid(self.number))?.is_some(),
            "host {} is off; its console ends with\n{}\n{}",
            self.number,
            tail(&fs::read_to_string(self.layout.console(self.number)).unwrap_or_default(), 20),
            self.qemu_said(),
        );
        Ok(())
    }

    /// The end of what its QEMU complained of, without what the emulation always
    /// lacks.
    pub(super) fn qemu_said(&self) -> String {
        let log = fs::read_to_string(self.layout.qemu_log(self.number)).unwrap_or_default();
        let lines = log.lines().filter(|line| !line.contains("TCG doesn't support requested"));
        tail(&lines.collect::<Vec<_>>().join("\n"), 20)
    }

    /// How it is.
    ///
    /// # Errors
    /// When its QEMU does not answer.
    pub fn condition(&self) -> Result<Condition> {
        if process::running(&self.layout.pid(self.number))?.is_none() {
            return Ok(Condition::Off);
        }
        let status = self.order("query-status", &json!({}))?;
        Ok(if status["running"] == true { Condition::On } else { Condition::Frozen })
    }

    /// Whether its network cable is cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.layout.cut(self.number).exists()
    }

    fn order(&self, command: &str, arguments: &serde_json::Value) -> Result<serde_json::Value> {
        qmp::execute(&self.layout.qmp(self.number), command, arguments)
    }

    /// Cuts its network cable.
    ///
    /// # Errors
    /// When it is off.
    pub fn cut(&self) -> Result<()> {
        self.order("set_link", &json!({"name": "net", "up": false}))?;
        self.note_cable(false)
    }

    /// Mends its network cable.
    ///
    /// # Errors
    /// When it is off.
    pub fn heal(&self) -> Result<()> {
        self.order("set_link", &json!({"name": "net", "up": true}))?;
        self.note_cable(true)
    }

    fn note_cable(&self, whole: bool) -> Result<()> {
        let note = self.layout.cut(self.number);
        match whole {
            true if note.exists() => fs::remove_file(note)?,
            true => {}
            false => drop(File::create(note)?),
        }
        Ok(())
    }

    /// Stops its CPUs where they are.
    ///
    /// # Errors
    /// When it is off.
    pub fn freeze(&self) -> Result<()> {
        self.order("stop", &json!({})).map(drop)
    }

    /// Lets its CPUs go on.
    ///
    /// # Errors
    /// When it is off.
    pub fn thaw(&self) -> Result<()> {
        self.order("cont", &json!({})).map(drop)
    }

    /// Takes its power away. What it has synced to its disk is there at the next
    /// [`Host::power_on`], and nothing else.
    ///
    /// # Errors
    /// When it stays.
    pub fn power_off(&self) -> Result<()> {
        process::end(&self.layout.pid(self.number))
    }

    /// Runs a program in it to its end, without input.
    ///
    /// # Errors
    /// When it can't be started; not when it fails.
    pub fn exec(&self, words: &[&str]) -> Result<Ran> {
        self.exec_with(words, None)
    }

    /// Runs a program in it to its end.
    ///
    /// # Errors
    /// When it can't be started; not when it fails.
    pub fn exec_with(&self, words: &[&str], input: Option<&str>) -> Result<Ran> {
        let input = input.map(|text| -> Box<dyn Read + Send> {
            Box::new(std::io::Cursor::new(text.to_owned().into_bytes()))
        });
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = self.stream(words, input, &mut |error, data| {
            if error { &mut stderr } else { &mut stdout }.extend_from_slice(data);
            Ok(())
        })?;
        Ok(Ran {
            command: format!("host {}: {}", self.number, words.join(" ")),
            status,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }

    /// Runs a shell script in a host of which nothing is known; what it printed,
    /// or why nothing is heard of it.
    pub(super) fn ask_shell(&self, script: &str, limit: Duration) -> Result<String> {
        let mut said = Vec::new();
        let words = ["sh", "-c", script];
        self.channel_within(limit)?.run(order(&words, &[]), None, &mut |_, data| {
            said.extend_from_slice(data);
            Ok(())
        })?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// Runs a program in it to its end, with its output as it comes; its exit
    /// status.
    ///
    /// # Errors
    /// When it can't be started; not when it fails.
    pub fn stream(
        &self,
        words: &[&str],
        input: Option<Box<dyn Read + Send>>,
        sink: super::channel::Sink<'_>,
    ) -> Result<i32> {
        self.channel()?
            .run(order(words, &[]), input, sink)
            .with_context(|| format!("run {} in host {}", words.join(" "), self.number))
    }

    /// Runs a shell script in it, which must succeed; what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        Ok(self.exec(&["sh", "-c", script])?.ok()?.stdout)
    }

    /// Starts a program in it that goes on by itself, with its output appended
    /// to a file; its process id there.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(&self, words: &[&str], environment: &[(&str, &str)], log: &str) -> Result<u32> {
        self.channel()?
            .spawn(order(words, environment), log)
            .with_context(|| format!("start {} in host {}", words.join(" "), self.number))
    }
}

fn order(words: &[&str], environment: &[(&str, &str)]) -> Order {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Order {
        words: words.iter().map(|word| (*word).to_owned()).collect(),
        environment: environment.iter().map(owned).collect(),
    }
}

/// The last lines of a text.
pub(super) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
