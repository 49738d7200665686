//! The JSON objects of every verb. Their field names are a contract with scripts.

use migr_proto::v1;
use serde::Serialize;

/// A workload, as in `list` and `inspect`.
#[derive(Debug, Clone, Serialize)]
pub struct Workload {
    pub name: String,
    pub kind: &'static str,
    pub state: &'static str,
    pub epoch: u64,
    pub id: String,
    pub memory_bytes: u64,
    pub cpus: u32,
    pub reason: Option<String>,
    pub moved_to: Option<String>,
    pub migration_id: Option<String>,
    pub created_unix_ms: i64,
}

impl From<v1::Workload> for Workload {
    fn from(from: v1::Workload) -> Self {
        Self {
            kind: kind(from.kind()),
            state: state(from.state()),
            name: from.name,
            epoch: from.epoch,
            id: from.id,
            memory_bytes: from.memory_bytes,
            cpus: from.cpus,
            reason: filled(from.reason),
            moved_to: filled(from.moved_to),
            migration_id: filled(from.migration_id),
            created_unix_ms: from.created_unix_ms,
        }
    }
}

/// `inspect`.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub workload: Workload,
    pub kernel: String,
    pub initrd: Option<String>,
    pub cmdline: String,
    pub vmm_pid: Option<u32>,
    pub memory_populated_bytes: u64,
    pub vmm_overhead_bytes: u64,
    pub log_bytes: u64,
    pub log_dropped_bytes: u64,
    pub last_migration: Option<Migration>,
}

impl From<v1::InspectReply> for Inspection {
    fn from(from: v1::InspectReply) -> Self {
        Self {
            workload: from.workload.unwrap_or_default().into(),
            kernel: from.kernel,
            initrd: filled(from.initrd),
            cmdline: from.cmdline,
            vmm_pid: Some(from.vmm_pid).filter(|pid| *pid != 0),
            memory_populated_bytes: from.memory_populated_bytes,
            vmm_overhead_bytes: from.vmm_overhead_bytes,
            log_bytes: from.log_bytes,
            log_dropped_bytes: from.log_dropped_bytes,
            last_migration: from.last_migration.map(Into::into),
        }
    }
}

/// The result of a migration: `migrate`, `watch`, and in `inspect`. Figures are
/// null when the outcome is known but not what was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Migration {
    pub migration_id: String,
    pub workload: String,
    pub kind: &'static str,
    pub mode: &'static str,
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
    pub source: String,
    pub destination: String,
    pub possible: bool,
    pub blockers: Vec<Blocker>,
    pub memory_bytes: u64,
    pub populated_bytes: u64,
    pub destination_free_bytes: u64,
    pub measured_rate_bytes_per_s: Option<u64>,
    pub predicted_total_ms: f64,
    pub predicted_downtime_ms: f64,
    pub max_downtime_ms: f64,
    pub destination_version: Option<String>,
}

impl From<v1::MigrationPlan> for Plan {
    fn from(from: v1::MigrationPlan) -> Self {
        let max_downtime = std::time::Duration::from_micros(from.max_downtime_us);
        Self {
            kind: kind(from.kind()),
            mode: mode(from.mode()),
            workload: from.workload,
            source: from.source,
            destination: from.destination,
            possible: from.blockers.is_empty(),
            blockers: from.blockers.into_iter().map(Into::into).collect(),
            memory_bytes: from.memory_bytes,
            populated_bytes: from.populated_bytes,
            destination_free_bytes: from.destination_free_bytes,
            measured_rate_bytes_per_s: Some(from.measured_rate_bytes_per_s).filter(|r| *r != 0),
            predicted_total_ms: to_us(from.predicted_total_ms),
            predicted_downtime_ms: to_us(from.predicted_downtime_ms),
            max_downtime_ms: to_us(max_downtime.as_secs_f64() * 1000.0),
            destination_version: filled(from.destination_version),
        }
    }
}

/// One host of `hosts`.
#[derive(Debug, Serialize)]
pub struct Host {
    pub host_id: String,
    pub address: String,
    pub version: String,
    pub protocol: u32,
    pub kernel: String,
    pub cpus: u32,
    pub memory_total_bytes: u64,
    pub memory_free_bytes: u64,
    pub memory_reserved_bytes: u64,
    pub kvm: bool,
    pub kvm_problem: Option<String>,
    pub workloads: u32,
}

impl From<v1::HostReply> for Host {
    fn from(from: v1::HostReply) -> Self {
        Self {
            host_id: from.host_id,
            address: from.address,
            version: from.version,
            protocol: from.protocol,
            kernel: from.kernel,
            cpus: from.cpus,
            memory_total_bytes: from.memory_total_bytes,
            memory_free_bytes: from.memory_free_bytes,
            memory_reserved_bytes: from.memory_reserved_bytes,
            kvm: from.kvm,
            kvm_problem: filled(from.kvm_problem),
            workloads: from.workloads,
        }
    }
}

fn filled(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Milliseconds to the microsecond: more digits would only be noise.
fn to_us(ms: f64) -> f64 {
    (ms * 1000.0).round() / 1000.0
}

/// The name of a kind.
pub fn kind(kind: v1::WorkloadKind) -> &'static str {
    match kind {
        v1::WorkloadKind::Unspecified => "unknown",
        v1::WorkloadKind::Vm => "vm",
        v1::WorkloadKind::Process => "process",
        v1::WorkloadKind::Container => "container",
    }
}

fn state(state: v1::WorkloadState) -> &'static str {
    match state {
        v1::WorkloadState::Unspecified => "unknown",
        v1::WorkloadState::Running => "running",
        v1::WorkloadState::Paused => "paused",
        v1::WorkloadState::Stopped => "stopped",
        v1::WorkloadState::Migrating => "migrating",
        v1::WorkloadState::InDoubt => "in_doubt",
        v1::WorkloadState::Gone => "gone",
    }
}

/// The name of a mode, as `--mode` takes it.
pub fn mode(mode: v1::MigrationMode) -> &'static str {
    match mode {
        v1::MigrationMode::Unspecified => "unknown",
        v1::MigrationMode::Precopy => "precopy",
        v1::MigrationMode::Stop => "stop",
        v1::MigrationMode::Postcopy => "postcopy",
        v1::MigrationMode::Hybrid => "hybrid",
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

/// The name of a phase; none if the daemon gave none.
pub fn phase(phase: v1::MigrationPhase) -> Option<&'static str> {
    match phase {
        v1::MigrationPhase::Unspecified => None,
        v1::MigrationPhase::Planning => Some("planning"),
        v1::MigrationPhase::Offered => Some("offered"),
        v1::MigrationPhase::Precopy => Some("precopy"),
        v1::MigrationPhase::Stopped => Some("stopped"),
        v1::MigrationPhase::Sealed => Some("sealed"),
        v1::MigrationPhase::Released => Some("released"),
        v1::MigrationPhase::Running => Some("running"),
    }
}
