//! A pulse VM, and what its heartbeats say about a life in several places.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::host_pair::HostPair;
use crate::migctl::Running;
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
    /// What of the lowest memory it leaves alone.
    pub skip: u32,
}

impl Pulse {
    /// Small enough to be started often.
    #[must_use]
    pub fn small() -> Self {
        Self { name: "pulse", memory: 128, cpus: 1, hot: 2, filled: 24, rate: 100, skip: 0 }
    }

    /// The guest of the demo and the bench.
    #[must_use]
    pub fn of_the_demo() -> Self {
        Self { name: "pulse", memory: 1024, cpus: 1, hot: 16, filled: 512, rate: 0, skip: 0 }
    }

    /// With that many vCPUs.
    #[must_use]
    pub fn cpus(self, cpus: u32) -> Self {
        Self { cpus, ..self }
    }

    /// Its kernel command line.
    #[must_use]
    pub fn cmdline(&self) -> String {
        let Self { cpus, hot, filled, rate, skip, .. } = self;
        format!("hot={hot}M static={filled}M check=1M rate={rate} seed=7 cpus={cpus} skip={skip}M")
    }

    /// Starts it and waits for its first heartbeat.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn run(&self, pair: &HostPair, host: &Daemon) -> Result<()> {
        self.run_with(pair, host, &[])
    }

    /// The same, with more options of `run`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn run_with(&self, pair: &HostPair, host: &Daemon, options: &[&str]) -> Result<()> {
        let kernel = pair.kernel().display().to_string();
        let (memory, cpus, cmdline) =
            (format!("{}M", self.memory), self.cpus.to_string(), self.cmdline());
        let args = ["run", self.name, "--kernel", &kernel, "--memory", &memory];
        let args = [&args[..], &["--cpus", &cpus, "--cmdline", &cmdline], options].concat();
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
    /// Where its line begins in the guest's whole output, in bytes.
    pub offset: u64,
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
    /// Reads the output of `migctl -o json logs`.
    ///
    /// # Errors
    /// When a heartbeat's line is not complete and well-formed. The last line
    /// may be cut off, as it may still be arriving.
    pub fn parse(text: &str) -> Result<Self> {
        let mut all = Self::default();
        let mut line: Option<Line> = None;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for piece in whole.lines() {
            let piece: Value = serde_json::from_str(piece).context("a piece of the log")?;
            let text = piece["text"].as_str().context("a piece without text")?;
            let number = |name: &str| piece[name].as_u64().with_context(|| format!("no {name}"));
            let (mut offset, at_ns) = (number("offset")?, number("line_unix_ns")?);
            for part in text.split_inclusive('\n') {
                let open = line.get_or_insert_with(|| Line { offset, at_ns, text: String::new() });
                open.text.push_str(part);
                offset += part.len() as u64;
                if part.ends_with('\n')
                    && let Some(line) = line.take()
                {
                    all.take(&line)?;
                }
            }
        }
        Ok(all)
    }

    fn take(&mut self, line: &Line) -> Result<()> {
        let text = line.text.trim_end();
        if text.starts_with("WRONG") || text.starts_with("TIME BACKWARDS") {
            self.complaints.push(text.to_owned());
        }
        ensure!(!text.starts_with("pulse error"), "the guest gave up: {text}");
        if text.starts_with("pulse pass=") {
            let beat = heartbeat(line);
            self.beats.push(beat.with_context(|| format!("a torn heartbeat: {text:?}"))?);
        }
        Ok(())
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

    /// The time between the last heartbeat before that byte of the log and the
    /// first one from there on, in ns; none when one of them is missing.
    #[must_use]
    pub fn gap_at(&self, offset: u64) -> Option<u64> {
        let pairs = self.beats.windows(2);
        let mut around = pairs.filter(|p| p[0].offset < offset && p[1].offset >= offset);
        around.next().map(|pair| pair[1].at_ns.saturating_sub(pair[0].at_ns))
    }

    /// The longest time between two heartbeats, both of them not before that
    /// time and before that byte of the log, in ns.
    #[must_use]
    pub fn longest_interval(&self, from_ns: u64, offset: u64) -> u64 {
        let pairs = self.beats.windows(2);
        let pairs = pairs.filter(|pair| pair[0].at_ns >= from_ns && pair[1].offset < offset);
        pairs.map(|pair| pair[1].at_ns.saturating_sub(pair[0].at_ns)).max().unwrap_or_default()
    }
}

/// One line of the log.
struct Line {
    offset: u64,
    at_ns: u64,
    text: String,
}

fn heartbeat(line: &Line) -> Option<Heartbeat> {
    let field = |name: &str| -> Option<u64> {
        let mut fields = line.text.trim_end().split(' ').filter_map(|f| f.split_once('='));
        fields.find(|(key, _)| *key == name)?.1.parse().ok()
    };
    let (pass, errors, back) = (field("pass")?, field("errors")?, field("back")?);
    Some(Heartbeat { at_ns: line.at_ns, offset: line.offset, pass, errors, back })
}

/// All heartbeats that `host` has in the log of `name`.
///
/// # Errors
/// When the log can't be read.
pub fn heartbeats(host: &Daemon, name: &str) -> Result<Heartbeats> {
    let log = host.migctl(&["-o", "json", "logs", name])?.ok()?;
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

/// Types at the guest's console, and leaves it when the guest has said all `words`.
///
/// # Errors
/// When it never does.
pub fn converse(host: &Daemon, name: &str, typed: &str, words: &[&str]) -> Result<()> {
    let args = ["console", name, "--detach-after", "1s"];
    let mut console = Running::start_open(host.address(), &args, Some(typed))?;
    let mut said = String::new();
    wait::until(&format!("{name} to say {words:?}"), || {
        said = console.stdout()?;
        Ok(words.iter().all(|word| said.contains(word)).then_some(()))
    })
    .with_context(|| format!("it said {said}"))?;
    console.wait()?.ok().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, ns: u64, text: &str) -> String {
        let piece = serde_json::json!(
            {"offset": offset, "line_unix_ns": ns, "starts_line": true, "text": text});
        format!("{piece}\n")
    }

    fn line(ns: u64, pass: u64, errors: u64) -> String {
        let text = format!(
            "pulse pass={pass} tsc=1 kvmclock_ns=2 cpus=1 passes={pass} static_rounds=0 \
             errors={errors} back=0\n"
        );
        piece(pass * 1000, ns, &text)
    }

    #[test]
    fn consecutive_heartbeats_are_good_and_the_gaps_between_them_are_found() {
        let text = [piece(0, 90, "pulse ready\n"), line(100, 1, 0), line(300, 2, 0)];
        let beats = Heartbeats::parse(&(text.concat() + &line(350, 3, 0))).unwrap();
        let good = Summary { first: 1, last: 3, lost: 0, repeated: 0 };
        assert_eq!(beats.check().unwrap(), good);
        assert_eq!(beats.gap_at(3000), Some(50));
        assert_eq!(beats.gap_at(1001), Some(200));
        assert_eq!(beats.gap_at(3001), None);
        assert_eq!(beats.longest_interval(0, 5000), 200);
        assert_eq!(beats.longest_interval(0, 2000), 0);
        assert_eq!(beats.longest_interval(200, 5000), 50);
    }

    #[test]
    fn a_line_that_arrives_in_pieces_begins_with_its_first() {
        let whole = line(100, 1, 0)
            .replace("errors", "err\"}\n{\"offset\":1030,\"line_unix_ns\":100,\"text\":\"ors");
        let beats = Heartbeats::parse(&whole).unwrap();
        assert_eq!((beats.beats[0].offset, beats.last_pass()), (1000, 1));
    }

    #[test]
    fn a_line_that_is_still_arriving_is_left_out() {
        let text = line(100, 1, 0) + &piece(2000, 200, "pulse pass=2 ts");
        assert_eq!(Heartbeats::parse(&text).unwrap().last_pass(), 1);
        let torn = line(100, 1, 0) + "{\"offset\":2000,";
        assert_eq!(Heartbeats::parse(&torn).unwrap().last_pass(), 1);
    }

    #[test]
    fn a_torn_heartbeat_is_an_error() {
        assert!(Heartbeats::parse(&piece(0, 1, "pulse pass=2 tspulse pass=3 tsc=1\n")).is_err());
    }

    #[test]
    fn lost_and_repeated_heartbeats_are_counted() {
        let text = [1, 2, 5, 4, 5, 6].map(|pass| line(1, pass, 0)).concat();
        let beats = Heartbeats::parse(&text).unwrap();
        assert_eq!(beats.summary(), Summary { first: 1, last: 6, lost: 2, repeated: 2 });
        assert!(beats.check().is_err());
    }

    #[test]
    fn a_wrong_word_or_a_clock_that_goes_back_is_an_error() {
        assert!(Heartbeats::parse(&line(1, 1, 1)).unwrap().check().is_err());
        let text = line(1, 1, 0) + &piece(2000, 2, "TIME BACKWARDS clock=tsc cpu=0\n");
        assert!(Heartbeats::parse(&text).unwrap().check().is_err());
        assert!(Heartbeats::parse("").unwrap().check().is_err());
    }
}
