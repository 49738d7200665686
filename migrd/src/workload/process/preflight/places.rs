//! Everything of a tree that has a path: open files, mapped ones, executables
//! and directories, each with what is really behind it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::sys::statfs::{FsType, fstatfs};

use super::Options;
use super::descriptors::{Descriptor, Kind};
use super::mappings::Mapping;
use super::procfs::{self, FdInfo};
use super::tree::{Process, Tree};

/// What a process does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Descriptor(u32),
    Mapping,
    Executable,
    WorkingDirectory,
    RootDirectory,
}

/// What is behind a link in /proc.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub(super) stat: FileStat,
    pub(super) file_system: FsType,
    pub(super) mount: Option<u32>,
}

impl Probe {
    /// Looks without opening: what is behind the link may be a device, or end
    /// somebody's wait.
    pub(super) fn of(link: &Path) -> Option<Self> {
        let fd = open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
        let stat = fstat(&fd).ok()?;
        let file_system = fstatfs(&fd).ok()?.filesystem_type();
        Some(Self { stat, file_system, mount: mount(&fd) })
    }

    /// `S_IFREG` and its like; empty for what has none.
    pub(super) fn format(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }
}

fn mount(fd: &OwnedFd) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    FdInfo::parse(&info).mount
}

/// One use of something with a path.
#[derive(Clone, Debug)]
pub(super) struct Place<'a> {
    pub(super) process: &'a Process,
    pub(super) role: Role,
    /// As the kernel says it, ` (deleted)` included.
    pub(super) path: PathBuf,
    pub(super) probe: Probe,
    /// Contents may change through it.
    pub(super) writes: bool,
    /// All it may do is add to the end.
    pub(super) appends: bool,
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.role {
            Role::Descriptor(fd) => write!(f, "fd {fd} of {}", self.process),
            Role::Mapping => write!(f, "a mapping of {}", self.process),
            Role::Executable => write!(f, "the executable of {}", self.process),
            Role::WorkingDirectory => write!(f, "the working directory of {}", self.process),
            Role::RootDirectory => write!(f, "the root directory of {}", self.process),
        }
    }
}

/// All of a tree's, but what is only memory with a name.
pub(super) fn read<'a>(
    tree: &'a Tree,
    descriptors: &[Descriptor<'a>],
    mappings: &[Mapping<'a>],
) -> Vec<Place<'a>> {
    let memory = Memory::of_this_kernel();
    let mut places = Vec::new();
    for descriptor in descriptors {
        let Kind::Path(path) = &descriptor.kind else { continue };
        let Some(probe) = Probe::of(&descriptor.path()) else { continue };
        if memory.is(path, &probe) {
            continue;
        }
        let flags = descriptor.info.flags;
        places.push(Place {
            process: descriptor.process,
            role: Role::Descriptor(descriptor.fd),
            path: path.clone(),
            probe,
            writes: descriptor.writes,
            appends: flags & libc::O_ACCMODE == libc::O_WRONLY && flags & libc::O_APPEND != 0,
        });
    }
    // Most processes map the same libraries: each is looked at once.
    let mut probes: HashMap<(&Path, Option<u64>), Option<Probe>> = HashMap::new();
    for mapping in mappings.iter().filter(|mapping| mapping.path.has_root()) {
        let namespace = namespace(mapping.process.pid, "mnt");
        let probe = probes.entry((&mapping.path, namespace));
        let Some(probe) = *probe.or_insert_with(|| Probe::of(&mapping.link())) else { continue };
        if memory.is(&mapping.path, &probe) {
            continue;
        }
        places.push(Place {
            process: mapping.process,
            role: Role::Mapping,
            path: mapping.path.clone(),
            probe,
            writes: mapping.writes,
            appends: false,
        });
    }
    for process in &tree.processes {
        let roles = [
            (Role::Executable, "exe"),
            (Role::WorkingDirectory, "cwd"),
            (Role::RootDirectory, "root"),
        ];
        for (role, link) in roles {
            let link = procfs::path(process.pid, link);
            let (Ok(path), Some(probe)) = (fs::read_link(&link), Probe::of(&link)) else {
                continue;
            };
            places.push(Place { process, role, path, probe, writes: false, appends: false });
        }
    }
    places
}

/// The mounts of the tree that move with it.
pub(super) fn carried(tree: &Tree, options: &Options) -> HashSet<u32> {
    let text = procfs::read(tree.init, "mountinfo").unwrap_or_default();
    let points = procfs::mount_points(&text);
    points.filter(|(_, path)| options.carried.iter().any(|c| c == path)).map(|(id, _)| id).collect()
}

/// The inode of a namespace of a process.
pub(super) fn namespace(pid: u32, kind: &str) -> Option<u64> {
    let link = fs::read_link(procfs::path(pid, &format!("ns/{kind}"))).ok()?;
    match Kind::of(link) {
        Kind::Namespace(inode) => Some(inode),
        _ => None,
    }
}

/// What looks like a file and is memory: memfds, shared anonymous memory, rings
/// of asynchronous I/O.
#[derive(Debug)]
struct Memory {
    /// The device of the file system that the kernel has for it.
    device: Option<libc::dev_t>,
}

impl Memory {
    fn of_this_kernel() -> Self {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let fd = nix::sys::memfd::memfd_create(c"preflight", flags).ok();
        Self { device: fd.and_then(|fd| fstat(fd).ok()).map(|stat| stat.st_dev) }
    }

    /// System V's shared memory is told by the caller, and is not left out.
    fn is(&self, path: &Path, probe: &Probe) -> bool {
        let path = path.as_os_str().as_bytes();
        if is_system_v(path) && self.device == Some(probe.stat.st_dev) {
            return false;
        }
        let hidden = [&b"/memfd:"[..], b"/anon_hugepage (deleted)", b"/[aio] (deleted)"];
        self.device == Some(probe.stat.st_dev) || hidden.iter().any(|name| path.starts_with(name))
    }
}

fn is_system_v(path: &[u8]) -> bool {
    path.starts_with(b"/SYSV")
}

impl Place<'_> {
    /// Whether it is on one of these mounts.
    pub(super) fn is_on(&self, mounts: &HashSet<u32>) -> bool {
        self.probe.mount.is_some_and(|mount| mounts.contains(&mount))
    }

    /// Whether it is a segment of System V's shared memory.
    pub(super) fn is_system_v(&self) -> bool {
        self.role == Role::Mapping
            && self.probe.file_system == nix::sys::statfs::TMPFS_MAGIC
            && is_system_v(self.path.as_os_str().as_bytes())
            && self.path.as_os_str().as_bytes().ends_with(b" (deleted)")
    }
}
