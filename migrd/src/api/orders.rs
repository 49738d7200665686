//! What a user orders, checked for its form before anything is done.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migr_proto::v1 as proto;
use tonic::{Code, Status};

use super::status::{Refusal, invalid};
use crate::migration::link::Peer;
use crate::migration::phase::Mode;
use crate::migration::source;
use crate::wire::Peers;
use crate::workload::ProcessOptions;
use crate::workload::vm::cpu::{self, CpuOrderError};
use crate::workload::vm::{NewVm, nets};

/// How long a guest that was asked to end may take unless the user says otherwise.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(60);
/// The longest command line of a guest that is taken, in bytes.
const MAX_CMDLINE: usize = 64 << 10;

/// Where to and how, as the user said; checked for form only.
pub(super) fn migration(
    here: &str,
    peers: &Peers,
    request: &proto::MigrateRequest,
) -> Result<(Arc<dyn Peer>, source::Request), Status> {
    let peer = peers.get(&request.to).map_err(|e| {
        Refusal {
            code: Code::InvalidArgument,
            reason: "BAD_ADDRESS",
            message: format!("{:?} is not the address of a daemon: {e}", request.to),
            host: here,
            remedy: "give --to as ADDR:PORT",
        }
        .status()
    })?;
    let mode = match request.mode() {
        proto::MigrationMode::Unspecified => None,
        proto::MigrationMode::Precopy => Some(Mode::Precopy),
        proto::MigrationMode::Stop => Some(Mode::Stop),
        proto::MigrationMode::Postcopy => Some(Mode::Postcopy),
        proto::MigrationMode::Hybrid => {
            return Err(Refusal {
                code: Code::Unimplemented,
                reason: "MODE_UNSUPPORTED",
                message: "this version does not combine rounds with memory that follows".into(),
                host: here,
                remedy: "use --mode precopy, --mode stop or --mode postcopy",
            }
            .status());
        }
    };
    let max_downtime = match request.max_downtime_us {
        0 => None,
        us => Some(Duration::from_micros(us.into())),
    };
    let timeout = (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms));
    let (verify, copy_disks) = (request.verify, request.copy_disks);
    let process = process_options(request.process.as_ref());
    Ok((peer, source::Request { mode, max_downtime, timeout, verify, copy_disks, process }))
}

/// What may be done to a process tree.
pub(super) fn process_options(options: Option<&proto::ProcessOptions>) -> ProcessOptions {
    let proto::ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } =
        options.copied().unwrap_or_default();
    ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections }
}

/// How long to wait for a guest that was asked to end; 0: the default.
pub(super) fn patience(timeout_ms: u64) -> Duration {
    match timeout_ms {
        0 => DEFAULT_PATIENCE,
        ms => Duration::from_millis(ms),
    }
}

/// A path that means the same for the daemon as for the user.
pub(super) fn absolute(here: &str, what: &str, path: &str) -> Result<PathBuf, Status> {
    if path.is_empty() || !Path::new(path).is_absolute() {
        let text = format!("{what} {path:?} is not an absolute path on the daemon's host");
        return Err(invalid(here, text));
    }
    Ok(PathBuf::from(path))
}

fn disk(here: &str, order: &proto::DiskOrder) -> Result<proto::DiskConfig, Status> {
    let proto::DiskOrder { path, read_only } = order;
    let path = absolute(here, "disk", path)?.display().to_string();
    Ok(proto::DiskConfig { path, read_only: *read_only, bytes: 0 })
}

fn net(order: &proto::NetOrder) -> proto::NetConfig {
    let proto::NetOrder { tap, bridge, mac } = order.clone();
    let mut net = proto::NetConfig { tap, bridge, mac };
    nets::complete(&mut net);
    net
}

/// The CPUs that a user asks for, fixed for as long as the VM lives.
pub(super) async fn cpu_model(
    here: &str,
    order: Option<&proto::CpuOrder>,
) -> Result<proto::CpuModel, Status> {
    cpu::model(order).await.map_err(|error| match error {
        CpuOrderError::Senseless(error) => invalid(here, error.to_string()),
        CpuOrderError::Host(error) => super::status::workload(here, &error),
    })
}

/// The VM that a user asks for; its CPUs are still to be chosen, and whether it
/// can be so is not checked yet.
pub(super) fn new_vm(here: &str, request: &proto::RunRequest) -> Result<NewVm, Status> {
    if request.cmdline.len() > MAX_CMDLINE || request.cmdline.contains('\0') {
        let text = format!("the command line is longer than {MAX_CMDLINE} bytes or has a NUL");
        return Err(invalid(here, text));
    }
    let initrd = match request.initrd.as_str() {
        "" => None,
        path => Some(absolute(here, "initrd", path)?),
    };
    let vm = NewVm {
        kernel: absolute(here, "kernel", &request.kernel)?,
        initrd,
        cmdline: request.cmdline.clone(),
        memory_bytes: request.memory_bytes,
        cpus: request.cpus,
        disks: request.disks.iter().map(|order| disk(here, order)).collect::<Result<_, _>>()?,
        nets: request.nets.iter().map(net).collect(),
        cpu: None,
    };
    Ok(vm)
}
