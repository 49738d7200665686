//! The phases of a migration, its progress and its report, as values.

use std::time::{Duration, Instant};

use crate::migration::journal::JournalError;
use crate::migration::link::{Blocker, LaneTotals, LinkError};
use crate::units::{Epoch, MigrationId};
use crate::workload::WorkloadError;

/// Where a migration stands, at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Both hosts are asked; nothing has been touched.
    Planning,
    /// The destination has reserved memory and prepares.
    Offered,
    /// Memory moves while the workload runs.
    Precopy,
    /// The workload stands still; the rest moves.
    Stopped,
    /// The destination holds everything.
    Sealed,
    /// Given away: the destination may run it.
    Released,
    /// It runs at the destination.
    Running,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Planning => "planning",
            Self::Offered => "offered",
            Self::Precopy => "precopy",
            Self::Stopped => "stopped",
            Self::Sealed => "sealed",
            Self::Released => "released",
            Self::Running => "running",
        })
    }
}

/// How memory moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In rounds while the workload runs, then a short stop.
    Precopy,
    /// All of it while the workload stands still.
    Stop,
    /// What can be left behind at the stop follows when it runs at the destination.
    Postcopy,
}

/// Why a migration ended without moving the workload.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// A check said no before anything was touched.
    #[error("refused: {}", list(.0.iter().map(|b| b.message.as_str())))]
    Refused(Vec<Blocker>),
    /// The user asked.
    #[error("cancelled")]
    Cancelled,
    /// `--timeout` ran out.
    #[error("not done within the timeout of {0:?}")]
    TimedOut(Duration),
    /// The way to the peer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The workload at the source.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The source's journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The workload ended by itself meanwhile.
    #[error("the workload ended while it was being moved: {0}")]
    Ended(String),
    /// Precopy does not get anywhere.
    #[error(
        "the workload dirties memory too fast: after {rounds} rounds a stop would still take \
         {predicted:?}, over the limit of {allowed:?}"
    )]
    NotConverging {
        /// Rounds done.
        rounds: u32,
        /// Downtime if stopped now.
        predicted: Duration,
        /// The budget.
        allowed: Duration,
    },
    /// The peer said Sealed without having compared what it was asked to.
    #[error("the destination did not verify the memory although it was asked to")]
    NotVerified,
    /// The daemon is shutting down.
    #[error("migrd is shutting down")]
    ShuttingDown,
}

/// What blockers say, one after the other, and what several say alike only once.
fn list<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let mut all: Vec<&str> = Vec::new();
    for words in words {
        if !all.contains(&words) {
            all.push(words);
        }
    }
    all.join("; ")
}

impl MigrationError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Refused(blockers) => list(blockers.iter().map(|b| b.remedy.as_str())),
            Self::Cancelled => "start it again when it suits".into(),
            Self::TimedOut(_) => {
                "give it more time with --timeout, or a longer --max-downtime".into()
            }
            Self::Link(LinkError::Lost { peer, .. }) => {
                format!(
                    "check that migrd runs at {peer} and that the network is up, then start again"
                )
            }
            Self::Link(LinkError::Rejected { peer, .. }) => {
                format!("see the log of the migrd at {peer}")
            }
            Self::Link(LinkError::Source(_)) => {
                "see how it stands with `migctl list` here; if it runs, start the move again; the \
                 log of this migrd says more"
                    .into()
            }
            Self::Link(LinkError::Stranger { peer, .. } | LinkError::Misbehaved { peer, .. }) => {
                format!("check that {peer} is the address of a migrd of a matching version")
            }
            Self::Workload(_) => "see the log of this migrd, and the workload's vmm.log".into(),
            Self::Journal(_) => "make room in the state directory, then start again".into(),
            Self::Ended(_) => "nothing: it is stopped at the source; start it again".into(),
            Self::NotConverging { predicted, .. } => {
                format!("allow --max-downtime {}ms, or use --mode stop", predicted.as_millis() + 1)
            }
            Self::NotVerified => "bring both daemons to the same version".into(),
            Self::ShuttingDown => "start it again when migrd is back".into(),
        }
    }
}

/// How far a migration is, for people.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Its phase.
    pub phase: Phase,
    /// The precopy round, from 1.
    pub round: u32,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes known to remain.
    pub remaining: u64,
    /// Bytes a second.
    pub rate: f64,
    /// Bytes a second that the workload dirties.
    pub dirty_rate: f64,
    /// Downtime if it stopped now.
    pub predicted: Duration,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            phase: Phase::Planning,
            round: 0,
            sent: 0,
            remaining: 0,
            rate: 0.0,
            dirty_rate: 0.0,
            predicted: Duration::ZERO,
        }
    }
}

/// One precopy round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// Pages that differed at its end.
    pub dirty_after: u64,
}

/// Where the downtime went. The parts follow each other and make up the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakdown {
    /// Until the workload stood still.
    pub pause: Duration,
    /// Until its last pages were in place.
    pub memory: Duration,
    /// Until the rest of its state was saved.
    pub state: Duration,
    /// Hashing, at both ends.
    pub verify: Duration,
    /// Until the destination had it loaded.
    pub restore: Duration,
    /// Until both journals were written and it ran.
    pub resume: Duration,
}

impl Breakdown {
    /// The sum.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.pause + self.memory + self.state + self.verify + self.restore + self.resume
    }
}

/// What a migration did, as it goes along and at its end.
#[derive(Clone, Debug)]
pub struct Tally {
    /// When it was asked for.
    pub started: Instant,
    /// Rounds so far.
    pub rounds: Vec<Round>,
    /// What the lanes carried.
    pub lanes: LaneTotals,
    /// Of that, pages of files that went ahead.
    pub file_pages: u64,
    /// Pages that the destination took when it ran there.
    pub after_switch: u64,
    /// Pages never touched, so never read nor sent.
    pub skipped: u64,
    /// The last prediction before the stop.
    pub predicted: Duration,
    /// Where the downtime went.
    pub downtime: Breakdown,
    /// The hashes were compared.
    pub verified: Option<bool>,
}

impl Tally {
    /// So many pages differed again after the last round.
    pub fn followed_by(&mut self, pages: u64) {
        if let Some(last) = self.rounds.last_mut() {
            last.dirty_after = pages;
        }
    }

    /// Nothing done yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            rounds: Vec::new(),
            lanes: LaneTotals::default(),
            file_pages: 0,
            after_switch: 0,
            skipped: 0,
            predicted: Duration::ZERO,
            downtime: Breakdown::default(),
            verified: None,
        }
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self::new()
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the destination.
    Completed,
    /// It runs at the source, as the user wished.
    Cancelled,
    /// It runs at the source.
    Failed,
    /// It runs at most at the destination; whether it does is not known.
    InDoubt,
}

/// Why it did not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What failed.
    pub message: String,
    /// On which host.
    pub host: String,
    /// In which phase.
    pub phase: Phase,
    /// What to do.
    pub remedy: String,
}

/// The report of a migration.
#[derive(Clone, Debug)]
pub struct Report {
    /// The migration.
    pub migration: MigrationId,
    /// Name of the workload.
    pub workload: String,
    /// How memory moved.
    pub mode: Mode,
    /// Why so, in words.
    pub mode_reason: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Address of the source.
    pub source: String,
    /// Address of the destination.
    pub destination: String,
    /// The epoch it runs in, or may run in.
    pub epoch: Epoch,
    /// From the request to the end.
    pub total: Duration,
    /// The figures.
    pub tally: Tally,
    /// Why it did not complete.
    pub failure: Option<Failure>,
    /// What refused it before anything was touched.
    pub blockers: Vec<Blocker>,
}

impl Report {
    /// The phase it failed in; [`Phase::Running`] if it did not.
    #[must_use]
    pub fn phase_of_failure(&self) -> Phase {
        self.failure.as_ref().map_or(Phase::Running, |f| f.phase)
    }
}
