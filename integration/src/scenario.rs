//! A pulse VM, and what its heartbeats say about a life in several places.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::daemon::Daemon;
use crate::host_pair::HostPair;
use crate::wait;

/// A pulse VM to run. Sizes are in MiB.
#[derive(Clone, Copy, Debug)]
pub struct Pulse {
    /// Its name.
    pub name: &'static str,
    /// Memory it has.
    pub memory: u32,
    /// vCPUs it has and uses.
    pub cpus: u32,
    /// What each vCPU rewrites in every pass.
    pub hot: u32,
    /// What is filled once and then verified.
    pub filled: u32,
    /// Passes a second, at most; 0: as many as it can.
    pub rate: u32,
}

impl Pulse {
    /// Small enough to be started often.
    #[must_use]
    pub fn small() -> Self {
        Self { name: "pulse", memory: 128, cpus: 1, hot: 2, filled: 24, rate: 100 }
    }

    /// The guest of the demo and the bench.
    #[must_use]
    pub fn of_the_demo() -> Self {
        Self { name: "pulse", memory: 1024, cpus: 1, hot: 16, filled: 512, rate: 0 }
    }

    /// With that many vCPUs.
    #[must_use]
    pub fn cpus(self, cpus: u32) -> Self {
        Self { cpus, ..self }
    }

    /// Its kernel command line.
    #[must_use]
    pub fn cmdline(&self) -> String {
        let Self { cpus, hot, filled, rate, .. } = self;
        format!("hot={hot}M static={filled}M check=1M rate={rate} seed=7 cpus={cpus}")
    }

    /// Starts it and waits for its first heartbeat.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn run(&self, pair: &HostPair, host: &Daemon) -> Result<()> {
        let kernel = pair.kernel().display().to_string();
        let (memory, cpus, cmdline) =
            (format!("{}M", self.memory), self.cpus.to_string(), self.cmdline());
        let args = ["run", self.name, "--kernel", &kernel, "--memory", &memory];
        let args = [&args[..], &["--cpus", &cpus, "--cmdline", &cmdline]].concat();
        host.migctl(&args)?.ok()?;
        wait_for_pass(host, self.name, 1)?;
        Ok(())
    }
}

/// One heartbeat of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// When its line began to arrive, in ns since 1970.
    pub at_ns: u64,
    /// The number of the pass.
    pub pass: u64,
    /// Wrong words so far.
    pub errors: u64,
    /// Times that a clock went backwards so far.
    pub back: u64,
}

/// All heartbeats of a guest.
#[derive(Clone, Debug, Default)]
pub struct Heartbeats {
    /// In the order of arrival.
    pub beats: Vec<Heartbeat>,
    /// Lines that report something wrong.
    pub complaints: Vec<String>,
}

/// What the heartbeats say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The first pass seen.
    pub first: u64,
    /// The last pass seen.
    pub last: u64,
    /// Numbers that are missing.
    pub lost: u64,
    /// Numbers that came again, or came too late.
    pub repeated: u64,
}

impl Heartbeats {
    /// Reads the output of `migctl logs --timestamps`.
    ///
    /// # Errors
    /// When a heartbeat's line is not complete and well-formed. The last line
    /// may be cut off, as it may still be arriving.
    pub fn parse(text: &str) -> Result<Self> {
        let mut all = Self::default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let Some((stamp, line)) = line.split_once(' ') else { continue };
            if line.starts_with("WRONG") || line.starts_with("TIME BACKWARDS") {
                all.complaints.push(line.to_owned());
            }
            if line.starts_with("pulse error") {
                bail!("the guest gave up: {line}");
            }
            if line.starts_with("pulse pass=") {
                let beat = heartbeat(stamp, line);
                all.beats.push(beat.with_context(|| format!("a torn heartbeat: {line:?}"))?);
            }
        }
        Ok(all)
    }

    /// Counts what is missing and what came twice.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary = Summary { first: 0, last: 0, lost: 0, repeated: 0 };
        for (index, beat) in self.beats.iter().enumerate() {
            if index == 0 {
                summary.first = beat.pass;
            } else if beat.pass > summary.last {
                summary.lost += beat.pass - summary.last - 1;
            } else {
                summary.repeated += 1;
                continue;
            }
            summary.last = beat.pass;
        }
        summary
    }

    /// Fails unless each heartbeat follows the one before it, none saw a wrong
    /// word, and no clock went backwards.
    ///
    /// # Errors
    /// Saying what is wrong.
    pub fn check(&self) -> Result<Summary> {
        let summary = self.summary();
        let mut wrong = self.complaints.iter().take(4).cloned().collect::<Vec<_>>().join("\n");
        if self.beats.is_empty() {
            wrong.push_str("no heartbeat at all");
        }
        if summary.lost > 0 || summary.repeated > 0 {
            write!(wrong, "heartbeats are missing or repeated: {summary:?}")?;
        }
        if let Some(bad) = self.beats.iter().find(|beat| beat.errors > 0 || beat.back > 0) {
            write!(wrong, "the guest found something wrong: {bad:?}")?;
        }
        ensure!(wrong.is_empty(), "{wrong}");
        Ok(summary)
    }

    /// The number of the last pass; 0 before the first.
    #[must_use]
    pub fn last_pass(&self) -> u64 {
        self.beats.last().map_or(0, |beat| beat.pass)
    }

    /// The longest time between two heartbeats, in ns, and where it began.
    /// Only intervals that touch `from_ns..=to_ns` count.
    #[must_use]
    pub fn longest_interval(&self, from_ns: u64, to_ns: u64) -> (u64, u64) {
        let pairs = self.beats.windows(2);
        let pairs = pairs.filter(|pair| pair[1].at_ns >= from_ns && pair[0].at_ns <= to_ns);
        let intervals = pairs.map(|p| (p[1].at_ns.saturating_sub(p[0].at_ns), p[0].at_ns));
        intervals.max().unwrap_or_default()
    }
}

fn heartbeat(stamp: &str, line: &str) -> Option<Heartbeat> {
    let field = |name: &str| -> Option<u64> {
        let mut fields = line.split(' ').filter_map(|field| field.split_once('='));
        fields.find(|(key, _)| *key == name)?.1.parse().ok()
    };
    let (seconds, nanos) = stamp.split_once('.')?;
    let at_ns = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?;
    let at_ns = at_ns.checked_add(nanos.parse().ok()?)?;
    Some(Heartbeat { at_ns, pass: field("pass")?, errors: field("errors")?, back: field("back")? })
}

/// All heartbeats that `host` has in the log of `name`.
///
/// # Errors
/// When the log can't be read.
pub fn heartbeats(host: &Daemon, name: &str) -> Result<Heartbeats> {
    let log = host.migctl(&["logs", name, "--timestamps"])?.ok()?;
    Heartbeats::parse(&log.stdout)
}

/// Waits until the guest at `host` has done that many passes.
///
/// # Errors
/// When it never does, or does something wrong.
pub fn wait_for_pass(host: &Daemon, name: &str, pass: u64) -> Result<Heartbeats> {
    wait::until(&format!("pass {pass} of {name}"), || {
        let beats = heartbeats(host, name)?;
        Ok((beats.last_pass() >= pass).then_some(beats))
    })
}

/// Checks that the guest lives at `host`: `more` further passes come, each
/// heartbeat of its whole life follows the one before, and nothing is wrong.
///
/// # Errors
/// Saying what is wrong.
pub fn expect_alive(host: &Daemon, name: &str, more: u64) -> Result<Summary> {
    let state = host.state_of(name)?;
    ensure!(state.as_deref() == Some("running"), "{name} is {state:?} at {}", host.address());
    let now = heartbeats(host, name)?.last_pass();
    wait_for_pass(host, name, now + more)?.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(stamp: &str, pass: u64, errors: u64) -> String {
        format!(
            "{stamp} pulse pass={pass} tsc=1 kvmclock_ns=2 cpus=1 passes={pass} \
             static_rounds=0 errors={errors} back=0\n"
        )
    }

    #[test]
    fn consecutive_heartbeats_are_good_and_their_longest_interval_is_found() {
        let text = ["1.000000000 pulse ready\n".to_owned(), line("1.100000000", 1, 0)];
        let text = text.concat() + &line("1.300000000", 2, 0) + &line("1.350000000", 3, 0);
        let beats = Heartbeats::parse(&text).unwrap();
        let good = Summary { first: 1, last: 3, lost: 0, repeated: 0 };
        assert_eq!(beats.check().unwrap(), good);
        assert_eq!(beats.longest_interval(0, u64::MAX), (200_000_000, 1_100_000_000));
        assert_eq!(beats.longest_interval(1_320_000_000, u64::MAX).0, 50_000_000);
    }

    #[test]
    fn a_line_that_is_still_arriving_is_left_out() {
        let text = line("1.000000000", 1, 0) + "1.100000000 pulse pass=2 ts";
        assert_eq!(Heartbeats::parse(&text).unwrap().last_pass(), 1);
    }

    #[test]
    fn a_torn_heartbeat_is_an_error() {
        let text = "1.000000000 pulse pass=2 tspulse pass=3 tsc=1\n";
        assert!(Heartbeats::parse(text).is_err());
    }

    #[test]
    fn lost_and_repeated_heartbeats_are_counted() {
        let text: String = [1, 2, 5, 4, 5, 6].map(|pass| line("1.000000000", pass, 0)).concat();
        let beats = Heartbeats::parse(&text).unwrap();
        assert_eq!(beats.summary(), Summary { first: 1, last: 6, lost: 2, repeated: 2 });
        assert!(beats.check().is_err());
    }

    #[test]
    fn a_wrong_word_or_a_clock_that_goes_back_is_an_error() {
        let wrong = Heartbeats::parse(&line("1.000000000", 1, 1)).unwrap();
        assert!(wrong.check().is_err());
        let text = line("1.000000000", 1, 0) + "1.100000000 TIME BACKWARDS clock=tsc cpu=0\n";
        assert!(Heartbeats::parse(&text).unwrap().check().is_err());
        assert!(Heartbeats::parse("").unwrap().check().is_err());
    }
}
