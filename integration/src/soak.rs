//! One VM moved back and forth many times, and what that costs the daemons.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::host_pair::HostPair;
use crate::leaks::{self, Usage};
use crate::scenario::{self, Pulse, Summary};

/// What is moved, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The guest.
    pub pulse: Pulse,
    /// Moves in all; an even number ends where it began.
    pub moves: u32,
    /// Every such move is one with `--verify`.
    pub verify_every: u32,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// vCPUs of the guest.
    pub cpus: u32,
    /// Moves done.
    pub moves: u32,
    /// Of them, verified at both ends.
    pub verified: u32,
    /// The guest's heartbeats.
    pub heartbeats: Summary,
    /// Downtime of each move, in ms, from short to long.
    pub downtime_ms: Vec<f64>,
    /// Daemon `a` after the first two moves.
    pub a_before: Usage,
    /// Daemon `a` after the last move.
    pub a_after: Usage,
    /// Daemon `b` after the first two moves.
    pub b_before: Usage,
    /// Daemon `b` after the last move.
    pub b_after: Usage,
    /// How long all moves took, in seconds.
    pub seconds: f64,
}

/// File descriptors that may come and go: connections that are kept for a while.
const SPARE_FDS: usize = 4;
/// What the allocators of a daemon may keep, in KiB: pages of one migration's
/// send and receive buffers, whose number varies with timing.
const SPARE_KIB: u64 = 24 << 10;

impl Report {
    /// Fails if a daemon has grown.
    ///
    /// # Errors
    /// Naming what has grown.
    pub fn check(&self) -> Result<()> {
        for (before, after) in [(self.a_before, self.a_after), (self.b_before, self.b_after)] {
            let grown = format!("a daemon has grown from {before:?} to {after:?}");
            ensure!(after.vms == before.vms, "{grown}");
            ensure!(after.memfds == before.memfds, "{grown}");
            ensure!(after.fds <= before.fds + SPARE_FDS, "{grown}");
            ensure!(after.rss_kib <= before.rss_kib + SPARE_KIB, "{grown}");
        }
        Ok(())
    }
}

/// Moves the guest of `plan` back and forth; `tell` hears of every move.
///
/// # Errors
/// When a move fails, a heartbeat is missing, or something is left behind.
pub fn run(plan: &Plan, mut tell: impl FnMut(u32, f64)) -> Result<Report> {
    ensure!(plan.moves >= 4 && plan.moves.is_multiple_of(2), "an even number of moves, from 4");
    let pair = HostPair::start()?;
    let name = plan.pulse.name;
    plan.pulse.run(&pair, &pair.a)?;
    let started = Instant::now();
    let mut before = None;
    let (mut verified, mut downtime_ms) = (0, Vec::new());
    for number in 1..=plan.moves {
        let verify = number % plan.verify_every == 0;
        let options: &[&str] = if verify { &["--verify"] } else { &[] };
        let moved =
            if number % 2 == 1 { pair.there(name, options) } else { pair.back(name, options) };
        let moved = moved.with_context(|| format!("move {number} of {}", plan.moves))?;
        if verify {
            ensure!(moved["verified"] == true, "move {number} was not verified: {moved}");
            verified += 1;
        }
        let downtime = moved["downtime_ms"].as_f64().context("no downtime")?;
        downtime_ms.push(downtime);
        tell(number, downtime);
        if number == 2 {
            before = Some((leaks::usage(&pair.a)?, leaks::usage(&pair.b)?));
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let heartbeats = scenario::expect_alive(&pair.a, name, 10)?;
    let (a_before, b_before) = before.context("too few moves")?;
    let (a_after, b_after) = (leaks::usage(&pair.a)?, leaks::usage(&pair.b)?);
    downtime_ms.sort_by(f64::total_cmp);
    pair.finish(name)?;
    Ok(Report {
        cpus: plan.pulse.cpus,
        moves: plan.moves,
        verified,
        heartbeats,
        downtime_ms,
        a_before,
        a_after,
        b_before,
        b_after,
        seconds,
    })
}
