//! The files that a tree must find at the destination: CRIU writes down paths,
//! not content, and checks size and mode when it opens them again. The content
//! of what a tree only reads is compared by hash, for a library of the same size
//! and another build makes a process that crashes later.

mod compare;
mod hash;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;

use nix::sys::stat::SFlag;
use nix::sys::statfs::{
    BPF_FS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, DEVPTS_SUPER_MAGIC,
    FsType, PROC_SUPER_MAGIC, SECURITYFS_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC,
};

use super::places::{Place, Role};

pub use compare::compare;
pub use hash::hash;
pub use wire::{BadFiles, from_wire, to_wire};

/// How many files of a tree are compared at most.
pub const MAX_FILES: usize = 65_536;
/// The largest file that is hashed, in bytes.
pub const MAX_HASHED: u64 = 256 << 20;
/// How much is hashed of all files together, in bytes.
pub const MAX_HASHED_TOTAL: u64 = 4 << 30;

/// What a file is to a tree; the first that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process runs it.
    Executable,
    /// It is mapped: a library, most often.
    Mapped,
    /// It is open.
    Open,
    /// A directory that is open, or one that a process is in.
    Directory,
    /// A device is open.
    Device,
    /// A named pipe is open.
    NamedPipe,
    /// A Unix socket is bound there. It is made anew: its directory is needed.
    Socket,
    /// What is mounted there is not carried: something has to be in its place.
    MountPoint,
}

/// How its content may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Not by the tree.
    Read,
    /// By adding to its end: CRIU does not mind its size.
    Append,
    /// In any way.
    Write,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedFile {
    /// Absolute, in the tree's root.
    pub path: PathBuf,
    /// What it is to the tree.
    pub kind: Kind,
    /// What the tree does to it.
    pub access: Access,
    /// In bytes; 0 of a directory.
    pub size: u64,
    /// `st_mode`, with the type of the file.
    pub mode: u32,
    /// When it was last written, in ns since the Unix epoch.
    pub mtime_ns: i64,
    /// Of its content, if that was hashed.
    pub blake3: Option<[u8; 32]>,
}

impl UsedFile {
    /// The type of file that its mode says.
    fn format(&self) -> SFlag {
        SFlag::from_bits_truncate(self.mode & SFlag::S_IFMT.bits())
    }

    /// Whether another file of this name is told by its content, and not only by
    /// its size. A plan says which ones are not.
    #[must_use]
    pub fn is_compared_by_content(&self) -> bool {
        self.blake3.is_some()
    }
}

/// Another thing than a file, of which all that matters is that it is there.
pub(super) fn thing(path: PathBuf, kind: Kind, mode: u32) -> UsedFile {
    UsedFile { path, kind, access: Access::Read, size: 0, mode, mtime_ns: 0, blake3: None }
}

/// The files among `places`, each once, by path.
pub(super) fn of<'a>(places: impl Iterator<Item = &'a Place<'a>>) -> Vec<UsedFile> {
    let mut files: BTreeMap<&PathBuf, UsedFile> = BTreeMap::new();
    for place in places {
        let Some(file) = file(place) else { continue };
        files
            .entry(&place.path)
            .and_modify(|known| {
                known.kind = known.kind.min(file.kind);
                known.access = known.access.max(file.access);
            })
            .or_insert(file);
    }
    files.into_values().collect()
}

fn file(place: &Place<'_>) -> Option<UsedFile> {
    let probe = &place.probe;
    let format = probe.format();
    if is_made_by_the_kernel(probe.file_system) {
        return None;
    }
    let kind = match (place.role, format) {
        (_, SFlag::S_IFDIR) => Kind::Directory,
        (Role::Executable, SFlag::S_IFREG) => Kind::Executable,
        (Role::Mapping, SFlag::S_IFREG) => Kind::Mapped,
        (Role::Descriptor(_), SFlag::S_IFREG) => Kind::Open,
        (Role::Descriptor(_), SFlag::S_IFIFO) => {
            return Some(thing(place.path.clone(), Kind::NamedPipe, probe.stat.st_mode));
        }
        (Role::Descriptor(_), SFlag::S_IFCHR | SFlag::S_IFBLK) => {
            return Some(thing(place.path.clone(), Kind::Device, probe.stat.st_mode));
        }
        _ => return None,
    };
    let access = match (kind, place.writes, place.appends) {
        (Kind::Directory, ..) | (_, false, _) => Access::Read,
        (_, true, true) => Access::Append,
        (_, true, false) => Access::Write,
    };
    let size = if kind == Kind::Directory { 0 } else { probe.stat.st_size };
    Some(UsedFile {
        path: place.path.clone(),
        kind,
        access,
        size: u64::try_from(size).unwrap_or(0),
        mode: probe.stat.st_mode,
        mtime_ns: time_ns(probe.stat.st_mtime, probe.stat.st_mtime_nsec),
        blake3: None,
    })
}

fn time_ns(seconds: i64, ns: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(ns)
}

/// File systems whose files say what a kernel does: no two hosts have the same,
/// and reading one may do something.
fn is_made_by_the_kernel(file_system: FsType) -> bool {
    [
        PROC_SUPER_MAGIC,
        SYSFS_MAGIC,
        DEVPTS_SUPER_MAGIC,
        CGROUP_SUPER_MAGIC,
        CGROUP2_SUPER_MAGIC,
        DEBUGFS_MAGIC,
        TRACEFS_MAGIC,
        SECURITYFS_MAGIC,
        BPF_FS_MAGIC,
    ]
    .contains(&file_system)
}

#[cfg(test)]
mod tests;
