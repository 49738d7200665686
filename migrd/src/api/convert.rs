//! Between the protocol's messages and our own types, field by field.

use std::path::PathBuf;
use std::time::Duration;

use migr_proto::v1 as proto;
use prost::Message;

use crate::keeper::container::Spec;
use crate::migration::link::Blocker;
use crate::migration::phase::{Breakdown, Mode, Outcome, Phase, Progress, Report};
use crate::migration::plan::Plan;
use crate::migration::policy::DEFAULT_MAX_DOWNTIME;
use crate::registry::{State, Status};
use crate::units::WorkloadId;
use crate::workload::process::net as process_net;
use crate::workload::vm::cpu;
use crate::workload::{Footprint, Kind};

pub(super) fn kind(kind: Kind) -> proto::WorkloadKind {
    match kind {
        Kind::Vm => proto::WorkloadKind::Vm,
        Kind::Process => proto::WorkloadKind::Process,
        Kind::Container => proto::WorkloadKind::Container,
    }
}

fn state(state: State) -> proto::WorkloadState {
    match state {
        State::Running => proto::WorkloadState::Running,
        State::Paused => proto::WorkloadState::Paused,
        State::Stopped => proto::WorkloadState::Stopped,
        State::Migrating => proto::WorkloadState::Migrating,
        State::InDoubt => proto::WorkloadState::InDoubt,
        State::Gone => proto::WorkloadState::Gone,
    }
}

pub(super) fn workload(status: &Status) -> proto::Workload {
    let Status { identity, epoch, state: now, reason, peer, migration } = status;
    proto::Workload {
        id: identity.id.to_string(),
        name: identity.name.clone(),
        kind: kind(identity.kind).into(),
        state: state(*now).into(),
        epoch: epoch.0,
        memory_bytes: identity.memory_bytes,
        cpus: identity.cpus,
        reason: reason.clone(),
        moved_to: peer.clone(),
        migration_id: migration.map_or_else(String::new, |m| m.to_string()),
        created_unix_ms: identity.created_unix_ms,
    }
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A disk as a user ordered it.
fn disk(disk: proto::DiskConfig) -> proto::DiskOrder {
    let proto::DiskConfig { path, read_only, bytes: _ } = disk;
    proto::DiskOrder { path, read_only }
}

/// A network interface as a user could have ordered it.
fn net(net: proto::NetConfig) -> proto::NetOrder {
    let proto::NetConfig { tap, bridge, mac } = net;
    proto::NetOrder { tap, bridge, mac }
}

/// The part of `common` that only a VM has.
pub(super) fn vm(
    common: proto::InspectReply,
    config: &[u8],
    footprint: &Footprint,
) -> proto::InspectReply {
    let config = proto::VmConfig::decode(config).unwrap_or_default();
    let cpu = cpu::order(&config);
    proto::InspectReply {
        kernel: config.kernel,
        initrd: config.initrd,
        cmdline: config.cmdline,
        vmm_pid: footprint.pid,
        disks: config.disks.into_iter().map(disk).collect(),
        nets: config.nets.into_iter().map(net).collect(),
        cpu,
        ..common
    }
}

/// The part of `common` that only process trees and containers have. `rootfs` is where
/// a container has its root file system, if that is not where its bundle says.
pub(super) fn process(
    id: WorkloadId,
    common: proto::InspectReply,
    config: &[u8],
    footprint: &Footprint,
    rootfs: Option<PathBuf>,
) -> proto::InspectReply {
    let proto::ProcessConfig { version: _, argv, env: _, cwd, net, container, adopted: _ } =
        proto::ProcessConfig::decode(config).unwrap_or_default();
    let Footprint { pid, processes, .. } = *footprint;
    let container = container.map(|container| {
        let spec = Spec::parse(&container.spec).ok();
        let rootfs = rootfs.or_else(|| spec.map(|spec| spec.rootfs().to_owned()));
        let carrying = match container.rootfs_copied {
            true => proto::RootfsCarrying::Copy,
            false => proto::RootfsCarrying::Shared,
        };
        proto::ContainerInfo {
            bundle: container.bundle,
            rootfs: rootfs.map_or_else(String::new, |path| path.display().to_string()),
            runc_id: id.to_string(),
            carrying: carrying.into(),
        }
    });
    // One that was not asked for follows from the id.
    let net = net.map(|net| {
        let mac = process_net::hardware(id, &net).map_or(net.mac, |mac| mac.to_vec().into());
        proto::ProcessNet { mac, ..net }
    });
    let process = proto::ProcessInfo { argv, cwd, net, pid, processes, container };
    proto::InspectReply { process: Some(process), ..common }
}

/// A rate in whole bytes a second.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(rate: f64) -> u64 {
    // `as` saturates, and a rate is never negative.
    rate as u64
}

pub(super) fn phase(phase: Phase) -> proto::MigrationPhase {
    match phase {
        Phase::Planning => proto::MigrationPhase::Planning,
        Phase::Offered => proto::MigrationPhase::Offered,
        Phase::Precopy => proto::MigrationPhase::Precopy,
        Phase::Stopped => proto::MigrationPhase::Stopped,
        Phase::Sealed => proto::MigrationPhase::Sealed,
        Phase::Released => proto::MigrationPhase::Released,
        Phase::Running => proto::MigrationPhase::Running,
    }
}

pub(super) fn mode(mode: Mode) -> proto::MigrationMode {
    match mode {
        Mode::Precopy => proto::MigrationMode::Precopy,
        Mode::Stop => proto::MigrationMode::Stop,
        Mode::Postcopy => proto::MigrationMode::Postcopy,
    }
}

pub(super) fn progress(
    id: &str,
    workload: &str,
    progress: &Progress,
    elapsed: Duration,
) -> proto::MigrationProgress {
    let Progress { phase: now, round, sent, remaining, rate, dirty_rate, predicted } = *progress;
    proto::MigrationProgress {
        migration_id: id.to_owned(),
        workload: workload.to_owned(),
        phase: phase(now).into(),
        round,
        bytes_sent: sent,
        bytes_remaining: remaining,
        bytes_total: sent + remaining,
        rate_bytes_per_s: whole(rate),
        dirty_rate_bytes_per_s: whole(dirty_rate),
        predicted_downtime_ms: ms(predicted),
        elapsed_ms: ms(elapsed),
    }
}

pub(super) fn blocker(blocker: &Blocker, here: &str) -> proto::Blocker {
    let Blocker { code, message, remedy, host } = blocker;
    let host = if host.is_empty() { here } else { host };
    proto::Blocker {
        code: code.clone(),
        message: message.clone(),
        remedy: remedy.clone(),
        host: host.to_owned(),
    }
}

fn breakdown(parts: &Breakdown) -> proto::DowntimeBreakdown {
    let Breakdown { pause, memory, state, verify, restore, resume } = *parts;
    proto::DowntimeBreakdown {
        pause_ms: ms(pause),
        memory_ms: ms(memory),
        state_ms: ms(state),
        verify_ms: ms(verify),
        restore_ms: ms(restore),
        resume_ms: ms(resume),
    }
}

fn outcome(outcome: Outcome) -> proto::MigrationOutcome {
    match outcome {
        Outcome::Completed => proto::MigrationOutcome::Completed,
        Outcome::Cancelled => proto::MigrationOutcome::Cancelled,
        Outcome::Failed => proto::MigrationOutcome::Failed,
        Outcome::InDoubt => proto::MigrationOutcome::InDoubt,
    }
}

pub(super) fn report(report: &Report, workload_kind: Kind) -> proto::MigrationResult {
    let tally = &report.tally;
    let rounds = tally.rounds.iter().map(|round| proto::MigrationRound {
        pages: round.pages,
        bytes: round.bytes,
        ms: ms(round.took),
        dirty_after: round.dirty_after,
    });
    let failure = report.failure.as_ref().map(|failure| proto::MigrationFailure {
        message: failure.message.clone(),
        host: failure.host.clone(),
        phase: phase(failure.phase).into(),
        remedy: failure.remedy.clone(),
    });
    // Only a workload that moved stood still for as long as the parts say.
    let moved = report.outcome == Outcome::Completed;
    proto::MigrationResult {
        migration_id: report.migration.to_string(),
        workload: report.workload.clone(),
        kind: kind(workload_kind).into(),
        mode: mode(report.mode).into(),
        outcome: outcome(report.outcome).into(),
        source: report.source.clone(),
        destination: report.destination.clone(),
        epoch: report.epoch.0,
        total_ms: ms(report.total),
        downtime_ms: if moved { ms(tally.downtime.total()) } else { 0.0 },
        downtime_breakdown: moved.then(|| breakdown(&tally.downtime)),
        predicted_downtime_ms: ms(tally.predicted),
        rounds: rounds.collect(),
        pages_sent: tally.lanes.data_pages,
        pages_zero: tally.lanes.zero_pages,
        pages_skipped: tally.skipped,
        bytes_on_wire: tally.lanes.bytes_on_wire,
        verified: tally.verified,
        failure,
        blockers: report.blockers.iter().map(|b| blocker(b, &report.destination)).collect(),
        mode_reason: report.mode_reason.clone(),
        pages_after_switch: tally.after_switch,
    }
}

/// What a plan says, for the user that asked for it.
pub(super) struct Planned<'a> {
    pub status: &'a Status,
    pub plan: &'a Plan,
    pub here: &'a str,
    pub to: &'a str,
    pub populated_bytes: u64,
    /// As the user said.
    pub max_downtime: Option<Duration>,
}

pub(super) fn plan(planned: &Planned<'_>) -> proto::MigrationPlan {
    let Planned { status, plan, here, to, populated_bytes, max_downtime } = planned;
    let peer = plan.peer.as_ref();
    let usual = match status.identity.kind {
        Kind::Vm => DEFAULT_MAX_DOWNTIME,
        Kind::Process | Kind::Container => Duration::ZERO,
    };
    let max_downtime = max_downtime.unwrap_or(usual);
    proto::MigrationPlan {
        workload: status.identity.name.clone(),
        kind: kind(status.identity.kind).into(),
        mode: mode(plan.mode.mode).into(),
        source: (*here).to_owned(),
        destination: (*to).to_owned(),
        blockers: plan.blockers.iter().map(|b| blocker(b, to)).collect(),
        memory_bytes: status.identity.memory_bytes,
        populated_bytes: *populated_bytes,
        destination_free_bytes: peer.map_or(0, |p| p.memory_free_bytes),
        measured_rate_bytes_per_s: whole(plan.rate),
        predicted_total_ms: plan.total.map_or(0.0, ms),
        predicted_downtime_ms: plan.downtime.map_or(0.0, ms),
        max_downtime_us: u64::try_from(max_downtime.as_micros()).unwrap_or(u64::MAX),
        destination_version: peer.map_or_else(String::new, |p| p.version.clone()),
        mode_reason: plan.mode.why.clone(),
        rootfs_bytes: plan.files_bytes,
    }
}
