//! The open descriptors of a tree's processes.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::procfs::{self, FdInfo};
use super::tree::{Process, Tree};

/// What a descriptor is, as its link in /proc says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A socket, by its inode.
    Socket(u64),
    /// A pipe without a name, by its inode.
    Pipe(u64),
    /// Something of the kernel's without a file system: `[eventfd]`.
    Anonymous(String),
    /// A process.
    PidFd,
    /// A namespace, by its inode.
    Namespace(u64),
    /// Something with a path.
    Path(PathBuf),
    /// Anything else, as the kernel says it.
    Other(String),
}

impl Kind {
    pub(super) fn of(link: PathBuf) -> Self {
        if link.as_os_str().as_bytes().starts_with(b"/") {
            return Self::Path(link);
        }
        let link = link.to_string_lossy();
        let inode = |rest: &str| rest.strip_prefix('[')?.strip_suffix(']')?.parse::<u64>().ok();
        match link.split_once(':') {
            Some(("anon_inode", "[pidfd]") | ("pidfd", _)) => Self::PidFd,
            Some(("anon_inode", name)) => Self::Anonymous(name.to_owned()),
            Some((kind, rest)) => match (kind, inode(rest)) {
                ("socket", Some(inode)) => Self::Socket(inode),
                ("pipe", Some(inode)) => Self::Pipe(inode),
                (_, Some(inode)) => Self::Namespace(inode),
                (_, None) => Self::Other(link.into_owned()),
            },
            None => Self::Other(link.into_owned()),
        }
    }
}

/// One open descriptor.
#[derive(Clone, Debug)]
pub(super) struct Descriptor<'a> {
    pub(super) process: &'a Process,
    pub(super) fd: u32,
    pub(super) kind: Kind,
    pub(super) writes: bool,
    pub(super) info: FdInfo,
}

impl Descriptor<'_> {
    /// Where it is in /proc.
    pub(super) fn path(&self) -> PathBuf {
        procfs::path(self.process.pid, &format!("fd/{}", self.fd))
    }
}

impl std::fmt::Display for Descriptor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "fd {} of {}", self.fd, self.process)
    }
}

/// All of a tree's.
pub(super) fn read(tree: &Tree) -> Vec<Descriptor<'_>> {
    let mut all = Vec::new();
    for process in &tree.processes {
        let numbers = procfs::numbers(&procfs::path(process.pid, "fd")).unwrap_or_default();
        all.extend(numbers.into_iter().filter_map(|fd| descriptor(process, fd)));
    }
    all
}

fn descriptor(process: &Process, fd: u32) -> Option<Descriptor<'_>> {
    let path = procfs::path(process.pid, &format!("fd/{fd}"));
    let kind = Kind::of(fs::read_link(&path).ok()?);
    // The link's own mode says how it was opened.
    let mode = fs::symlink_metadata(&path).ok()?.permissions().mode();
    // A socket's says nothing that is not asked for elsewhere.
    let info = match kind {
        Kind::Socket(_) => FdInfo::default(),
        _ => FdInfo::parse(&procfs::read(process.pid, &format!("fdinfo/{fd}"))?),
    };
    Some(Descriptor { process, fd, kind, writes: mode & 0o200 != 0, info })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_say_what_a_descriptor_is() {
        let of = |link: &str| Kind::of(link.into());
        assert_eq!(of("socket:[12]"), Kind::Socket(12));
        assert_eq!(of("pipe:[7]"), Kind::Pipe(7));
        assert_eq!(of("anon_inode:[io_uring]"), Kind::Anonymous("[io_uring]".into()));
        assert_eq!(of("anon_inode:[pidfd]"), Kind::PidFd);
        assert_eq!(of("pidfd:[2]"), Kind::PidFd);
        assert_eq!(of("net:[4026531833]"), Kind::Namespace(4_026_531_833));
        assert_eq!(of("/tmp/socket:[12]"), Kind::Path("/tmp/socket:[12]".into()));
        assert_eq!(of("mnt:[many]"), Kind::Other("mnt:[many]".into()));
        assert_eq!(of("?"), Kind::Other("?".into()));
    }
}
