//! A migration: its progress, its plan and its result.

use migr_proto::v1;
use serde::Serialize;

use super::{filled, kind, mode, phase, to_us};

/// The result of a migration: `migrate`, `watch`, and in `inspect`. Figures are
/// null when the outcome is known but not what was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Migration {
    pub migration_id: String,
    pub workload: String,
    pub kind: &'static str,
    pub mode: &'static str,
    /// Why in this mode; null where the daemon did not say.
    pub mode_reason: Option<String>,
    pub outcome: Outcome,
    pub source: String,
    pub destination: String,
    pub epoch: u64,
    pub total_ms: Option<f64>,
    pub downtime_ms: Option<f64>,
    pub downtime_breakdown_ms: Option<Breakdown>,
    pub predicted_downtime_ms: Option<f64>,
    pub rounds: Vec<Round>,
    pub pages_sent: Option<u64>,
    pub pages_zero: Option<u64>,
    pub pages_skipped: Option<u64>,
    /// Pages that came after it ran at the destination; in no other figure.
    pub pages_after_switch: Option<u64>,
    pub bytes_on_wire: Option<u64>,
    pub verified: Option<bool>,
    pub failure: Option<MigrationFailure>,
    pub blockers: Vec<Blocker>,
}

/// How a migration ended. One that nobody can name leaves the user in doubt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Completed,
    Cancelled,
    Failed,
    #[default]
    InDoubt,
}

impl Outcome {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::InDoubt => "in_doubt",
        }
    }
}

/// Where the downtime went, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Breakdown {
    pub pause: f64,
    pub memory: f64,
    pub state: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<f64>,
    pub restore: f64,
    pub resume: f64,
}

/// One round of pre-copy.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    pub pages: u64,
    pub bytes: u64,
    pub ms: f64,
    pub dirty_after: u64,
}

/// Why a migration did not complete.
#[derive(Debug, Clone, Serialize)]
pub struct MigrationFailure {
    pub message: String,
    pub host: Option<String>,
    pub phase: Option<&'static str>,
    pub remedy: Option<String>,
}

/// Something that stands in the way of a migration.
#[derive(Debug, Clone, Serialize)]
pub struct Blocker {
    pub code: String,
    pub message: String,
    pub host: Option<String>,
    pub remedy: Option<String>,
}

impl From<v1::MigrationResult> for Migration {
    fn from(from: v1::MigrationResult) -> Self {
        let verified = from.verified;
        Self {
            kind: kind(from.kind()),
            mode: mode(from.mode()),
            outcome: outcome(from.outcome()),
            mode_reason: filled(from.mode_reason),
            migration_id: from.migration_id,
            workload: from.workload,
            source: from.source,
            destination: from.destination,
            epoch: from.epoch,
            total_ms: Some(to_us(from.total_ms)),
            downtime_ms: Some(to_us(from.downtime_ms)),
            downtime_breakdown_ms: Some(breakdown(
                &from.downtime_breakdown.unwrap_or_default(),
                verified.is_some(),
            )),
            predicted_downtime_ms: Some(to_us(from.predicted_downtime_ms)),
            rounds: from.rounds.iter().map(round).collect(),
            pages_sent: Some(from.pages_sent),
            pages_zero: Some(from.pages_zero),
            pages_skipped: Some(from.pages_skipped),
            pages_after_switch: Some(from.pages_after_switch),
            bytes_on_wire: Some(from.bytes_on_wire),
            verified,
            failure: from.failure.map(Into::into),
            blockers: from.blockers.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<v1::MigrationFailure> for MigrationFailure {
    fn from(from: v1::MigrationFailure) -> Self {
        Self {
            phase: phase(from.phase()),
            message: from.message,
            host: filled(from.host),
            remedy: filled(from.remedy),
        }
    }
}

impl From<v1::Blocker> for Blocker {
    fn from(from: v1::Blocker) -> Self {
        Self {
            code: from.code,
            message: from.message,
            host: filled(from.host),
            remedy: filled(from.remedy),
        }
    }
}

fn breakdown(from: &v1::DowntimeBreakdown, verified: bool) -> Breakdown {
    Breakdown {
        pause: to_us(from.pause_ms),
        memory: to_us(from.memory_ms),
        state: to_us(from.state_ms),
        verify: verified.then(|| to_us(from.verify_ms)),
        restore: to_us(from.restore_ms),
        resume: to_us(from.resume_ms),
    }
}

fn round(from: &v1::MigrationRound) -> Round {
    Round {
        pages: from.pages,
        bytes: from.bytes,
        ms: to_us(from.ms),
        dirty_after: from.dirty_after,
    }
}

fn outcome(outcome: v1::MigrationOutcome) -> Outcome {
    match outcome {
        v1::MigrationOutcome::Completed => Outcome::Completed,
        v1::MigrationOutcome::Cancelled => Outcome::Cancelled,
        v1::MigrationOutcome::Failed => Outcome::Failed,
        v1::MigrationOutcome::InDoubt | v1::MigrationOutcome::Unspecified => Outcome::InDoubt,
    }
}

/// One progress object of `migrate` and `watch`, on stderr.
#[derive(Debug, Serialize)]
pub struct Progress<'a> {
    pub migration_id: &'a str,
    pub workload: &'a str,
    pub phase: Option<&'static str>,
    pub round: u32,
    pub bytes_sent: u64,
    pub bytes_remaining: u64,
    pub bytes_total: u64,
    pub rate_bytes_per_s: u64,
    pub dirty_rate_bytes_per_s: u64,
    pub predicted_downtime_ms: f64,
    pub elapsed_ms: f64,
}

impl<'a> From<&'a v1::MigrationProgress> for Progress<'a> {
    fn from(from: &'a v1::MigrationProgress) -> Self {
        Self {
            migration_id: &from.migration_id,
            workload: &from.workload,
            phase: phase(from.phase()),
            round: from.round,
            bytes_sent: from.bytes_sent,
            bytes_remaining: from.bytes_remaining,
            bytes_total: from.bytes_total,
            rate_bytes_per_s: from.rate_bytes_per_s,
            dirty_rate_bytes_per_s: from.dirty_rate_bytes_per_s,
            predicted_downtime_ms: to_us(from.predicted_downtime_ms),
            elapsed_ms: to_us(from.elapsed_ms),
        }
    }
}

/// `migrate --dry-run`.
#[derive(Debug, Serialize)]
pub struct Plan {
    pub workload: String,
    pub kind: &'static str,
    pub mode: &'static str,
    /// Why in this mode; null where the daemon did not say.
    pub mode_reason: Option<String>,
    pub source: String,
    pub destination: String,
    pub possible: bool,
    pub blockers: Vec<Blocker>,
    pub memory_bytes: u64,
    pub populated_bytes: u64,
    /// Of a root file system that is sent along; null where none is.
    pub rootfs_bytes: Option<u64>,
    pub destination_free_bytes: u64,
    pub measured_rate_bytes_per_s: Option<u64>,
    pub predicted_total_ms: Option<f64>,
    pub predicted_downtime_ms: Option<f64>,
    pub max_downtime_ms: f64,
    pub destination_version: Option<String>,
}

impl From<v1::MigrationPlan> for Plan {
    fn from(from: v1::MigrationPlan) -> Self {
        let max_downtime = std::time::Duration::from_micros(from.max_downtime_us);
        let known = from.measured_rate_bytes_per_s != 0;
        Self {
            kind: kind(from.kind()),
            mode: mode(from.mode()),
            mode_reason: filled(from.mode_reason),
            workload: from.workload,
            source: from.source,
            destination: from.destination,
            possible: from.blockers.is_empty(),
            blockers: from.blockers.into_iter().map(Into::into).collect(),
            memory_bytes: from.memory_bytes,
            populated_bytes: from.populated_bytes,
            rootfs_bytes: Some(from.rootfs_bytes).filter(|bytes| *bytes != 0),
            destination_free_bytes: from.destination_free_bytes,
            measured_rate_bytes_per_s: Some(from.measured_rate_bytes_per_s).filter(|r| *r != 0),
            // Without a measured rate nothing is predicted.
            predicted_total_ms: known.then(|| to_us(from.predicted_total_ms)),
            predicted_downtime_ms: known.then(|| to_us(from.predicted_downtime_ms)),
            max_downtime_ms: to_us(max_downtime.as_secs_f64() * 1000.0),
            destination_version: filled(from.destination_version),
        }
    }
}
