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
use crate::workload::vm::NewVm;

/// The longest stop that is planned for unless the user says otherwise.
const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_millis(50);
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
        proto::MigrationMode::Unspecified | proto::MigrationMode::Precopy => Mode::Precopy,
        proto::MigrationMode::Stop => Mode::Stop,
        proto::MigrationMode::Postcopy | proto::MigrationMode::Hybrid => {
            return Err(Refusal {
                code: Code::Unimplemented,
                reason: "MODE_UNSUPPORTED",
                message: "this version moves memory before the hand-over only".into(),
                host: here,
                remedy: "use --mode precopy or --mode stop",
            }
            .status());
        }
    };
    let max_downtime = match request.max_downtime_us {
        0 => DEFAULT_MAX_DOWNTIME,
        us => Duration::from_micros(us.into()),
    };
    let timeout = (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms));
    let (verify, copy_disks) = (request.verify, request.copy_disks);
    Ok((peer, source::Request { mode, max_downtime, timeout, verify, copy_disks }))
}

/// A path that means the same for the daemon as for the user.
pub(super) fn absolute(here: &str, what: &str, path: &str) -> Result<PathBuf, Status> {
    if path.is_empty() || !Path::new(path).is_absolute() {
        let text = format!("{what} {path:?} is not an absolute path on the daemon's host");
        return Err(invalid(here, text));
    }
    Ok(PathBuf::from(path))
}

/// The VM that a user asks for.
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
    };
    vm.check().map_err(|e| invalid(here, e.to_string()))?;
    Ok(vm)
}
