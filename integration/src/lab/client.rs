//! A client in a host that keeps one TCP connection to a guest and checks every
//! byte of it: `witness client`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::guest::{self, Guest};
use super::host::{Host, tail};
use crate::wait;

/// A client that runs.
#[derive(Debug)]
pub struct Client {
    host: Host,
    pid: u32,
    log: String,
    wall_offset_ms: f64,
}

impl Client {
    /// Starts one in `host` and waits until it exchanges frames.
    ///
    /// # Errors
    /// When it ends instead, with what it said.
    pub fn start(host: &Host, guest: &Guest) -> Result<Self> {
        let log = format!("/lab/disk/client-{}.log", host.sh("date +%s%N")?.trim());
        let witness = guest::file("witness")?;
        let words = [&witness, "client", guest.address(), guest::PORT];
        let pid = host.spawn(&words, &[], &log)?;
        let mut client = Self { host: host.clone(), pid, log, wall_offset_ms: 0.0 };
        let first = wait::patiently("the client's first report", || {
            client.expect_alive()?;
            Ok(client.lines()?.last().cloned())
        })?;
        client.wall_offset_ms = wall_offset_ms(&first)?;
        Ok(client)
    }

    /// The guest's wall clock minus that of the client's host when it started,
    /// in ms.
    #[must_use]
    pub fn first_wall_offset_ms(&self) -> f64 {
        self.wall_offset_ms
    }

    /// All its reports.
    fn lines(&self) -> Result<Vec<Value>> {
        let text = self.host.sh(&format!("cat {}", self.log))?;
        // The last line may still be arriving.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Its last report.
    ///
    /// # Errors
    /// When there is none.
    pub fn latest(&self) -> Result<Value> {
        self.lines()?.pop().context("the client has reported nothing")
    }

    /// Checks that it still runs, so that its connection has not failed.
    ///
    /// # Errors
    /// When it has ended, with what it said.
    pub fn expect_alive(&self) -> Result<()> {
        let alive = self.host.exec(&["kill", "-0", &self.pid.to_string()])?.status == 0;
        let said = || self.host.sh(&format!("tail -n 3 {}", self.log)).unwrap_or_default();
        ensure!(alive, "the client's connection is no more:\n{}", said());
        Ok(())
    }

    /// Checks that frames still come: the next report has more of them.
    ///
    /// # Errors
    /// When none come, or something was wrong with one.
    pub fn expect_progress(&self) -> Result<()> {
        let ticks = |report: &Value| report["ticks"].as_u64().unwrap_or_default();
        let before = ticks(&self.latest()?);
        wait::patiently("further frames", || {
            self.expect_alive()?;
            Ok((ticks(&self.latest()?) > before).then_some(()))
        })
    }

    /// Ends it; its summary, which must be good.
    ///
    /// # Errors
    /// When something was wrong on the connection, or in the guest.
    pub fn finish(self) -> Result<Value> {
        self.expect_alive()?;
        self.host.sh(&format!("kill -TERM {}", self.pid))?;
        let summary = wait::patiently("the client's summary", || {
            let last = self.latest()?;
            Ok(last.get("good").is_some().then_some(last))
        });
        let summary = summary.with_context(|| {
            tail(&self.host.sh(&format!("cat {}", self.log)).unwrap_or_default(), 5)
        })?;
        ensure!(summary["good"] == true, "the connection was not whole: {summary}");
        ensure!(summary["server_faults"] == 0, "the guest found faults: {summary}");
        Ok(summary)
    }
}

/// What a report says of the guest's wall clock, in ms.
///
/// # Errors
/// When it says nothing of it.
pub fn wall_offset_ms(report: &Value) -> Result<f64> {
    Ok(report["wall_offset_us"].as_f64().context("no clock in the client's report")? / 1000.0)
}
