//! The JSON objects of every verb. Their field names are a contract with scripts.

mod migration;
mod names;

use migr_proto::v1;
use serde::Serialize;

use crate::units::show_mac;
pub use migration::{Blocker, Migration, MigrationFailure, Outcome, Plan, Progress};
use names::state;
pub use names::{kind, mode, phase};

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

/// A disk of a workload, in `inspect`.
#[derive(Debug, Serialize)]
pub struct Disk {
    pub path: String,
    pub read_only: bool,
}

impl From<v1::DiskOrder> for Disk {
    fn from(from: v1::DiskOrder) -> Self {
        let v1::DiskOrder { path, read_only } = from;
        Self { path, read_only }
    }
}

/// A network interface of a workload, in `inspect`.
#[derive(Debug, Serialize)]
pub struct Net {
    pub tap: String,
    pub bridge: Option<String>,
    pub mac: String,
}

impl From<v1::NetOrder> for Net {
    fn from(from: v1::NetOrder) -> Self {
        let v1::NetOrder { tap, bridge, mac } = from;
        Self { tap, bridge: filled(bridge), mac: show_mac(&mac) }
    }
}

/// `inspect`.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub workload: Workload,
    pub kernel: String,
    pub initrd: Option<String>,
    pub cmdline: String,
    pub disks: Vec<Disk>,
    pub nets: Vec<Net>,
    pub vmm_pid: Option<u32>,
    pub memory_populated_bytes: u64,
    pub vmm_overhead_bytes: u64,
    pub log_bytes: u64,
    pub log_dropped_bytes: u64,
    pub cpu: Option<CpuModel>,
    pub process: Option<Process>,
    pub last_migration: Option<Migration>,
}

/// What `inspect` says of a process tree.
#[derive(Debug, Serialize)]
pub struct Process {
    pub argv: Vec<String>,
    pub cwd: String,
    pub net: Option<ProcessNet>,
    pub pid: Option<u32>,
    pub processes: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
}

/// What `inspect` says of a container.
#[derive(Debug, Serialize)]
pub struct Container {
    pub bundle: String,
    pub rootfs: String,
    /// `shared` or `copy`, as `run-container` was told.
    pub rootfs_mode: &'static str,
    pub runc_id: String,
}

impl From<v1::ProcessInfo> for Process {
    fn from(from: v1::ProcessInfo) -> Self {
        let v1::ProcessInfo { argv, cwd, net, pid, processes, container } = from;
        let pid = Some(pid).filter(|pid| *pid != 0);
        let container = container.map(|container| {
            let rootfs_mode = match container.carrying() {
                v1::RootfsCarrying::Copy => "copy",
                v1::RootfsCarrying::Shared | v1::RootfsCarrying::Unspecified => "shared",
            };
            let v1::ContainerInfo { bundle, rootfs, runc_id, carrying: _ } = container;
            Container { bundle, rootfs, rootfs_mode, runc_id }
        });
        Self { argv, cwd, net: net.map(Into::into), pid, processes, container }
    }
}

/// The network of a process tree, in `inspect`.
#[derive(Debug, Serialize)]
pub struct ProcessNet {
    pub ip: String,
    pub bridge: String,
    pub gateway: Option<String>,
    pub mac: Option<String>,
}

impl From<v1::ProcessNet> for ProcessNet {
    fn from(from: v1::ProcessNet) -> Self {
        let v1::ProcessNet { address, bridge, gateway, mac } = from;
        Self { ip: address, bridge, gateway: filled(gateway), mac: filled(show_mac(&mac)) }
    }
}

/// `adopt` that was refused, or `--dry-run`.
#[derive(Debug, Serialize)]
pub struct AdoptPlan {
    pub pid: u32,
    pub possible: bool,
    pub blockers: Vec<Blocker>,
}

/// `checkpoint --dry-run`.
#[derive(Debug, Serialize)]
pub struct CheckpointPlan {
    pub workload: String,
    pub directory: String,
    pub possible: bool,
    pub blockers: Vec<Blocker>,
}

/// The CPU features that a guest was given.
#[derive(Debug, Serialize)]
pub struct CpuModel {
    pub name: String,
    pub features: Vec<String>,
}

impl From<v1::InspectReply> for Inspection {
    fn from(from: v1::InspectReply) -> Self {
        Self {
            workload: from.workload.unwrap_or_default().into(),
            kernel: from.kernel,
            initrd: filled(from.initrd),
            cmdline: from.cmdline,
            disks: from.disks.into_iter().map(Into::into).collect(),
            nets: from.nets.into_iter().map(Into::into).collect(),
            vmm_pid: Some(from.vmm_pid).filter(|pid| *pid != 0),
            memory_populated_bytes: from.memory_populated_bytes,
            vmm_overhead_bytes: from.vmm_overhead_bytes,
            log_bytes: from.log_bytes,
            log_dropped_bytes: from.log_dropped_bytes,
            cpu: from.cpu.map(|v1::CpuOrder { name, features }| CpuModel { name, features }),
            process: from.process.map(Into::into),
            last_migration: from.last_migration.map(Into::into),
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
    pub criu: Option<String>,
    pub criu_problem: Option<String>,
    pub workloads: u32,
    pub cpu: Option<HostCpu>,
}

/// What a host can give its guests.
#[derive(Debug, Serialize)]
pub struct HostCpu {
    pub vendor: String,
    pub tsc_khz: u32,
    pub tsc_scaling: bool,
    pub features: Vec<String>,
}

impl From<v1::HostCpu> for HostCpu {
    fn from(from: v1::HostCpu) -> Self {
        let v1::HostCpu { vendor, features, tsc_khz, tsc_scaling } = from;
        Self { vendor, tsc_khz, tsc_scaling, features }
    }
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
            criu: filled(from.criu),
            criu_problem: filled(from.criu_problem),
            workloads: from.workloads,
            cpu: from.cpu.map(Into::into),
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
