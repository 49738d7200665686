//! The start of a child: its files, its descriptors, its process.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use migr_proto::v1 as proto;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{ChildError, SERIAL_LOG, SOCKET, VMM_LOG, system};
use crate::sys::memfd;
use crate::sys::process::isolate;
use crate::units::WorkloadId;
use crate::vmm::entry::number;
use crate::vmm::memory;
use crate::workload::outliving::{config_file, control_socket};

/// What a child is made of.
#[derive(Debug)]
pub struct ChildSpec {
    /// The workload it is.
    pub id: WorkloadId,
    /// Where its socket and logs are; must exist.
    pub directory: PathBuf,
    /// The VM.
    pub config: proto::VmConfig,
    /// The kernel, when it is to be booted.
    pub kernel: Option<File>,
    /// The initrd that goes with the kernel.
    pub initrd: Option<File>,
    /// The binary that has the `vmm-child` command: the daemon's own, which
    /// [`own_program`](crate::workload::outliving::own_program) names.
    pub program: PathBuf,
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// When there is none or it may not be used, with what to do about it.
pub fn open_kvm() -> Result<File, ChildError> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map_err(|source| {
        let remedy = match source.kind() {
            ErrorKind::NotFound => {
                "load kvm_intel or kvm_amd, and switch virtualization on in the firmware"
            }
            ErrorKind::PermissionDenied => "run migrd as root or as a member of the group kvm",
            _ => "load kvm_intel or kvm_amd again",
        };
        ChildError::NoKvm { remedy, source }
    })
}

/// Starts the process, with its descriptors in place.
pub(super) fn start(spec: ChildSpec) -> Result<std::process::Child, ChildError> {
    let ChildSpec { id, directory, config, kernel, initrd, program } = spec;
    let kvm = open_kvm()?;
    let bytes = config.memory_bytes;
    memory::extents(bytes)?;
    let name = std::ffi::CString::new(format!("migr-{id}")).unwrap_or_default();
    let ram = memfd::create(&name, bytes).map_err(system(format!("reserve {bytes} bytes")))?;
    let listener = control_socket(&directory.join(SOCKET)).map_err(system("make its socket"))?;
    let open = |name: &str, append: bool| {
        let mut how = OpenOptions::new();
        how.create(true).read(true).write(true).append(append).mode(0o600);
        how.open(directory.join(name)).map_err(system(format!("open {name} in the VM's directory")))
    };
    let (log, messages) = (open(SERIAL_LOG, false)?, open(VMM_LOG, true)?);
    let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let bell = bell.map_err(|e| system("create an eventfd")(e.into()))?;
    let mut inherited: Vec<(OwnedFd, _)> = vec![
        (listener, number::LISTENER),
        (ram.into(), number::MEMORY),
        (kvm.into(), number::KVM),
        (log.into(), number::LOG),
        (bell.into(), number::BELL),
        (config_file(&config).map_err(system("hand over the configuration"))?, number::CONFIG),
    ];
    inherited.extend(kernel.map(|file| (file.into(), number::KERNEL)));
    inherited.extend(initrd.map(|file| (file.into(), number::INITRD)));
    let mut command = Command::new(program);
    command.arg("vmm-child").env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(messages).current_dir("/");
    isolate(&mut command, inherited);
    command.spawn().map_err(system("start the VM's process"))
}
