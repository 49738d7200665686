//! How long a process stands still when it is moved, beside what CRIU alone takes for
//! the same: written to a file system in memory, copied over a connection, made anew.
//! The process itself measures both.

mod costs;
mod plain;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use super::{PYTHON, hosts, moves, start};
use crate::measure::Spread;
use crate::wait;
use costs::Costs;

const PROGRAM: &str = include_str!("../frozen.py");
const NAME: &str = "frozen";

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Memory of the process, in MiB.
    pub memory: u32,
    /// Moves; each has a plain one beside it. An even number ends where it began.
    pub moves: u32,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Memory of the process.
    pub memory_mib: u32,
    /// Moves.
    pub moves: u32,
    /// How long the process stood still in a move, as it saw that.
    pub frozen_ms: Spread,
    /// The parts of it, as migr reports them.
    pub pause_ms: Spread,
    /// Written, sent and put in place.
    pub memory_ms: Spread,
    /// Made anew.
    pub restore_ms: Spread,
    /// The same with CRIU alone, as the process saw it.
    pub plain_ms: Spread,
    /// `criu dump`.
    pub plain_dump_ms: Spread,
    /// Its images copied over a loopback connection.
    pub plain_copy_ms: Spread,
    /// `criu restore`.
    pub plain_restore_ms: Spread,
    /// One by the other, pair by pair.
    pub frozen_to_plain: Spread,
    /// The most that a daemon and its keeper took together, without the images.
    pub own_memory_mib: f64,
    /// The most that daemons, keepers and CRIU wrote to a disk in a move.
    pub written_mib: f64,
}

/// Moves a process and, in turns, has CRIU do the same without migr; `tell` hears of
/// each pair.
///
/// # Errors
/// When something does not move, or arrives with other memory than it had.
pub fn run(plan: Plan, tell: impl Fn(&str)) -> Result<Row> {
    ensure!(plan.moves >= 2 && plan.moves.is_multiple_of(2), "an even number of moves");
    let pair = hosts()?;
    let log = Log(pair.directory().join("moved.log"));
    let size = plan.memory.to_string();
    let path = log.0.display().to_string();
    start(&pair.a, NAME, &[PYTHON, "-c", PROGRAM, &size, &path])?;
    log.wait_for("ready")?;
    let mut samples = Vec::new();
    let mut costs = Costs::default();
    for number in 0..plan.moves {
        let plain = plain::cycle(plan.memory)?;
        let (from, to) = if number % 2 == 0 { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
        let seen = log.times()?.len();
        let result = costs.watch([&pair.a, &pair.b], || moves(from, to, NAME, &[]))?;
        let frozen = log.longest_after(seen)?;
        let ratio = frozen / plain.frozen;
        tell(&format!(
            "{size} MiB: frozen {frozen:.0} ms, {}; CRIU alone {:.0} ms (dump {:.0}, copy {:.0}, \
             restore {:.0}); ratio {ratio:.2}",
            result["downtime_breakdown_ms"], plain.frozen, plain.dump, plain.copy, plain.restore,
        ));
        samples.push(Sample { result, frozen, plain });
    }
    pair.a.migctl(&["stop", NAME])?.ok()?;
    log.wait_for("right")?;
    pair.finish(NAME)?;
    row(plan, &samples, &costs)
}

struct Sample {
    result: Value,
    frozen: f64,
    plain: plain::Plain,
}

impl Sample {
    fn part(&self, name: &str) -> f64 {
        self.result["downtime_breakdown_ms"][name].as_f64().unwrap_or(f64::NAN)
    }
}

fn row(plan: Plan, samples: &[Sample], costs: &Costs) -> Result<Row> {
    let spread = |figure: &dyn Fn(&Sample) -> f64| Spread::of(samples.iter().map(figure));
    Ok(Row {
        memory_mib: plan.memory,
        moves: plan.moves,
        frozen_ms: spread(&|s| s.frozen)?,
        pause_ms: spread(&|s| s.part("pause"))?,
        memory_ms: spread(&|s| s.part("memory"))?,
        restore_ms: spread(&|s| s.part("restore"))?,
        plain_ms: spread(&|s| s.plain.frozen)?,
        plain_dump_ms: spread(&|s| s.plain.dump)?,
        plain_copy_ms: spread(&|s| s.plain.copy)?,
        plain_restore_ms: spread(&|s| s.plain.restore)?,
        frozen_to_plain: spread(&|s| s.frozen / s.plain.frozen)?,
        own_memory_mib: costs.own_memory_mib(),
        written_mib: costs.written_mib(),
    })
}

/// What the process writes down.
struct Log(PathBuf);

impl Log {
    fn lines(&self) -> Result<Vec<String>> {
        if !Path::new(&self.0).exists() {
            return Ok(Vec::new());
        }
        let text = fs::read_to_string(&self.0)?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Ok(whole.lines().map(ToOwned::to_owned).collect())
    }

    fn wait_for(&self, word: &str) -> Result<()> {
        wait::until(&format!("the process to say {word:?}"), || {
            let lines = self.lines()?;
            ensure!(!lines.iter().any(|line| line == "wrong"), "its memory has changed");
            Ok(lines.iter().any(|line| line == word).then_some(()))
        })
    }

    /// The times that it stood still, in ms.
    fn times(&self) -> Result<Vec<f64>> {
        Ok(self.lines()?.iter().filter_map(|line| line.parse().ok()).collect())
    }

    /// The longest of those that come after the first `seen`.
    fn longest_after(&self, seen: usize) -> Result<f64> {
        let new = wait::until("the process to notice that it stood still", || {
            let times = self.times()?;
            Ok((times.len() > seen).then(|| times[seen..].to_vec()))
        })?;
        new.into_iter().max_by(f64::total_cmp).context("no time")
    }
}
