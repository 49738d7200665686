//! Files that are not where their path says: CRIU's `check_path_remap`.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{SFlag, stat};
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, PROC_SUPER_MAGIC};

use super::places::{Place, namespace};
use super::report::Report;
use super::tree::Tree;
use super::{GHOST_LIMIT, Options, procfs};

/// Message queues (`include/uapi/linux/magic.h` does not have it;
/// `ipc/mqueue.c` does).
const MQUEUE_MAGIC: FsType = FsType(0x1980_0202);
/// In what unit the kernel counts blocks, in bytes.
const BLOCK: u64 = 512;

/// What the kernel puts behind the path of what has lost it.
const DELETED: &[u8] = b" (deleted)";

/// What of the places is where its path says, and so must be at the destination.
pub(super) fn check<'a, 'b>(
    tree: &Tree,
    places: &'b [Place<'a>],
    options: &Options,
    report: &mut Report,
) -> Vec<&'b Place<'a>> {
    let mut checker = Checker::new(tree, options);
    places.iter().filter(|place| checker.is_there(place, report)).collect()
}

struct Checker<'o> {
    init: u32,
    init_mounts: Option<u64>,
    options: &'o Options,
    /// The mounts of each mount namespace.
    mounts: HashMap<u64, HashSet<u32>>,
    /// What was told already: path, device and inode.
    told: HashSet<(PathBuf, u64, u64)>,
}

impl<'o> Checker<'o> {
    fn new(tree: &Tree, options: &'o Options) -> Self {
        let mut mounts = HashMap::new();
        for process in &tree.processes {
            let Some(namespace) = namespace(process.pid, "mnt") else { continue };
            mounts.entry(namespace).or_insert_with(|| {
                let text = procfs::read(process.pid, "mountinfo").unwrap_or_default();
                procfs::mounts(&text).collect::<HashSet<_>>()
            });
        }
        let init_mounts = namespace(tree.init, "mnt");
        Self { init: tree.init, init_mounts, options, mounts, told: HashSet::new() }
    }

    fn is_there(&mut self, place: &Place<'_>, report: &mut Report) -> bool {
        let probe = &place.probe;
        let file_system = probe.file_system;
        if place.is_system_v() || probe.format().is_empty() {
            return false;
        }
        if let Some(mount) = probe.mount
            && !self.mounts.values().any(|mounts| mounts.contains(&mount))
        {
            if self.first(place) {
                outside_of_mounts(place, report);
            }
            return false;
        }
        if file_system == PROC_SUPER_MAGIC || file_system == DEVPTS_SUPER_MAGIC {
            return true;
        }
        if probe.stat.st_nlink == 0 {
            self.ghost(place, report);
            return false;
        }
        let bytes = place.path.as_os_str().as_bytes();
        let silly = file_system == NFS_SUPER_MAGIC && is_silly(&place.path);
        match self.at_path(place) {
            Some(true) if !silly => return true,
            Some(true) => self.nameless(place, report),
            None if silly || bytes.ends_with(DELETED) => self.nameless(place, report),
            Some(false) | None => {
                // One that has ended meanwhile has no root to look from, and needs nothing.
                let lives = namespace(place.process.pid, "mnt").is_some();
                if lives && self.first(place) {
                    hidden(place, report);
                }
            }
        }
        false
    }

    /// Whether this thing is at its path, or something else; `None`: nothing.
    fn at_path(&self, place: &Place<'_>) -> Option<bool> {
        // The path counts from the root of the mount namespace, which for those
        // in the init's is the init's own root.
        let pid = place.process.pid;
        let same = namespace(pid, "mnt") == self.init_mounts;
        let root = procfs::path(if same { self.init } else { pid }, "root");
        let found = stat(&root.join(place.path.strip_prefix("/").ok()?)).ok()?;
        let stat = &place.probe.stat;
        Some((found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
    }

    fn nameless(&mut self, place: &Place<'_>, report: &mut Report) {
        if !self.options.link_remap && self.first(place) {
            let bytes = place.path.as_os_str().as_bytes();
            let path = bytes.strip_suffix(DELETED).unwrap_or(bytes);
            renamed(place, &String::from_utf8_lossy(path), report);
        }
    }

    fn ghost(&mut self, place: &Place<'_>, report: &mut Report) {
        let limit = match self.options.ghost_limit_bytes {
            0 => GHOST_LIMIT,
            limit => limit,
        };
        let blocks = u64::try_from(place.probe.stat.st_blocks).unwrap_or(0);
        let bytes = blocks.saturating_mul(BLOCK);
        if place.probe.format() == SFlag::S_IFREG && bytes > limit && self.first(place) {
            report.add(
                "deleted-file",
                format!(
                    "{place} is a deleted file of {bytes} bytes ({}): CRIU carries up to {limit}",
                    place.path.display()
                ),
                format!("say --ghost-limit {bytes} or more: its content travels with the process"),
            );
        }
    }

    fn first(&mut self, place: &Place<'_>) -> bool {
        let stat = &place.probe.stat;
        self.told.insert((place.path.clone(), stat.st_dev, stat.st_ino))
    }
}

fn outside_of_mounts(place: &Place<'_>, report: &mut Report) {
    let path = place.path.display();
    if place.probe.file_system == MQUEUE_MAGIC {
        report.add(
            "shared-anon-outside",
            format!("{place} is the POSIX message queue {path}, which CRIU does not carry"),
            "have the program close it",
        );
        return;
    }
    report.add(
        "file-outside-mounts",
        format!("{place} is {path} on a mount that the workload does not have"),
        "have the program open it itself, inside of the workload, instead of inheriting it",
    );
}

fn hidden(place: &Place<'_>, report: &mut Report) {
    report.add(
        "hidden-file",
        format!("{place} is {}, but that is not at its path now", place.path.display()),
        "remove what was mounted over it, or have the program open it anew",
    );
}

fn renamed(place: &Place<'_>, path: &str, report: &mut Report) {
    report.add(
        "deleted-file",
        format!("{place} is a file that lost its name {path} and has others"),
        "say --link-remap: it gets a new name beside the old one, which the destination finds on \
         shared storage only; or have the program close it",
    );
}

/// The name that NFS gives to a file that is deleted while it is open.
fn is_silly(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_bytes().starts_with(b".nfs"))
}
