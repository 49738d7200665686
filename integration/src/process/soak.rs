//! One process tree or container with TCP connections moved back and forth many times, and what that
//! costs the daemons.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::served::{self, Beside, Kind};
use super::{can_move, moves};
use crate::daemon::Daemon;
use crate::leaks::{self, Usage};
use crate::two_nets::{Side, TwoNets, on_two_hosts};

/// What is moved, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What is moved.
    pub kind: Kind,
    /// Moves in all; an even number ends where it began.
    pub moves: u32,
    /// Every such move is one with `--verify`.
    pub verify_every: u32,
    /// Connections from each host beside the one of its client, as many as that.
    pub crowd: usize,
}

/// What a daemon uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Held {
    /// The process.
    #[serde(flatten)]
    pub usage: Usage,
    /// Mounts in its state directory, and of namespaces.
    pub mounts: usize,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Moves done.
    pub moves: u32,
    /// Of them, verified at both ends.
    pub verified: u32,
    /// Messages that all clients together sent, and whose answers came once, in order
    /// and unchanged.
    pub answers: u64,
    /// Times that all memory of the server was verified by itself: after each move.
    pub memory_verified: u32,
    /// Downtime of each move, in ms, from short to long.
    pub downtime_ms: Vec<f64>,
    /// The longest time that a client waited for an answer in each move, in ms, from
    /// short to long.
    pub stall_ms: Vec<f64>,
    /// Daemon `a` after the first two moves.
    pub a_before: Held,
    /// Daemon `a` after the last move.
    pub a_after: Held,
    /// Daemon `b` after the first two moves.
    pub b_before: Held,
    /// Daemon `b` after the last move.
    pub b_after: Held,
    /// How long all moves took, in seconds.
    pub seconds: f64,
}

/// File descriptors that may come and go: connections that are kept for a while.
const SPARE_FDS: usize = 4;
/// What the allocators of a daemon may keep, in KiB.
const SPARE_KIB: u64 = 24 << 10;

impl Report {
    /// Fails if a daemon has grown.
    ///
    /// # Errors
    /// Naming what has grown.
    pub fn check(&self) -> Result<()> {
        for (before, after) in [(self.a_before, self.a_after), (self.b_before, self.b_after)] {
            let grown = format!("a daemon has grown from {before:?} to {after:?}");
            ensure!(after.mounts == before.mounts, "{grown}");
            let (before, after) = (before.usage, after.usage);
            ensure!(after.memfds == before.memfds, "{grown}");
            ensure!(after.fds <= before.fds + SPARE_FDS, "{grown}");
            ensure!(after.rss_kib <= before.rss_kib + SPARE_KIB, "{grown}");
        }
        Ok(())
    }
}

fn held(daemon: &Daemon) -> Result<Held> {
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", daemon.pid()?))?;
    // Others mount and unmount what they like on this machine.
    let place = daemon.state_dir().display().to_string();
    let its = |line: &&str| line.contains(&place) || line.contains(" - nsfs ");
    Ok(Held { usage: leaks::usage(daemon)?, mounts: mounts.lines().filter(its).count() })
}

/// Moves the server of [`served`] back and forth between two hosts with networks of
/// their own, with a client on each; `tell` hears of every move and its downtime (ms).
///
/// # Errors
/// When a move fails, an answer or the server's memory is wrong, or something is left
/// behind.
pub fn run(plan: Plan, tell: impl FnMut(u32, f64) + Send + 'static) -> Result<Report> {
    ensure!(plan.moves >= 4 && plan.moves.is_multiple_of(2), "an even number of moves, from 4");
    on_two_hosts(move |nets| {
        nets.start()?;
        can_move(&nets.a)?;
        can_move(&nets.b)?;
        soak(nets, plan, tell)
    })
}

fn soak(nets: &TwoNets, plan: Plan, mut tell: impl FnMut(u32, f64)) -> Result<Report> {
    plan.kind.serve(nets)?;
    let mut clients = Vec::from(served::clients(nets)?);
    for side in [Side::A, Side::B].into_iter().filter(|_| plan.crowd > 0) {
        let mut crowd = Beside::crowd(nets, side, plan.crowd)?;
        crowd.gets(u64::try_from(plan.crowd)?)?;
        clients.push(crowd);
    }
    let started = Instant::now();
    let mut before = None;
    let (mut verified, mut memory_verified) = (0, 0);
    let (mut downtime_ms, mut stall_ms) = (Vec::new(), Vec::new());
    for (number, from) in (1..=plan.moves).zip([Side::A, Side::B].into_iter().cycle()) {
        let verify = number % plan.verify_every == 0;
        let options: &[&str] = if verify { &["--verify"] } else { &[] };
        let seen: Vec<_> = clients.iter_mut().map(Beside::answers).collect();
        let moved = moves(nets.daemon(from), nets.daemon(from.other()), served::NAME, options);
        let moved = moved.with_context(|| format!("move {number} of {}", plan.moves))?;
        if verify {
            ensure!(moved["verified"] == true, "move {number} was not verified: {moved}");
            verified += 1;
        }
        // Each direction was measured once.
        let predicted = moved["predicted_downtime_ms"].as_f64().unwrap_or_default();
        ensure!(number <= 2 || predicted > 0.0, "move {number} had no prediction: {moved}");
        let mut stall = 0.0_f64;
        for (client, seen) in clients.iter_mut().zip(seen) {
            client.gets(served::WHOLE_MEMORY).with_context(|| format!("after move {number}"))?;
            stall = stall.max(client.longest_wait_ms(seen?)?);
        }
        memory_verified += 1;
        nets.expect_nothing_left(from)?;
        let downtime = moved["downtime_ms"].as_f64().context("no downtime")?;
        downtime_ms.push(downtime);
        stall_ms.push(stall);
        tell(number, downtime);
        if number == 2 {
            before = Some((held(&nets.a)?, held(&nets.b)?));
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let (a_before, b_before) = before.context("too few moves")?;
    let (a_after, b_after) = (held(&nets.a)?, held(&nets.b)?);
    downtime_ms.sort_by(f64::total_cmp);
    stall_ms.sort_by(f64::total_cmp);
    let answers = served::finish(nets, Side::A, clients)?;
    Ok(Report {
        moves: plan.moves,
        verified,
        answers,
        memory_verified,
        downtime_ms,
        stall_ms,
        a_before,
        a_after,
        b_before,
        b_after,
        seconds,
    })
}
