//! The mounts that a process tree sees, and which of them CRIU is to look away
//! from.
//!
//! A tree sees its host's file systems in a mount namespace of its own, without
//! those that only mean something on that host (cgroups, tracing, automounts).
//! `/proc`, `/dev/shm` and `/dev/pts` are made for it alone, so that what it has in
//! them moves with it. All others are *external* to CRIU: it does not look into
//! them, and at a destination they are whatever is mounted, or lies, under the
//! same path.

use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// One line of `/proc/PID/mountinfo` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// Where it is.
    pub path: String,
    /// The type of the file system.
    pub kind: String,
}

/// Types of file systems that say something of this host only.
const LEFT_OUT: [&str; 17] = [
    "autofs",
    "binder",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "nsfs",
    "proc",
    "pstore",
    "rpc_pipefs",
    "securityfs",
    "tracefs",
];

/// Where memory file systems of the host are kept; others, such as a session's, are
/// not.
const MEMORY_KEPT: [&str; 4] = ["/dev", "/run", "/tmp", "/var/tmp"];

/// Those made for the tree alone: path, type, options.
const OWN: [(&str, &str, &str); 3] = [
    ("/proc", "proc", ""),
    ("/dev/shm", "tmpfs", "mode=1777"),
    ("/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5"),
];

/// Where the file systems are that are made for each tree, and move with it.
pub fn carried() -> impl Iterator<Item = &'static str> {
    OWN.iter().map(|(path, _, _)| *path)
}

/// Whether `path` is on a file system that a tree has for itself.
#[must_use]
pub fn is_own(path: &Path) -> bool {
    OWN.iter().any(|(own, _, _)| path.starts_with(own))
}

/// Reads the mounts of a process: `self`, or its number.
///
/// # Errors
/// When it is gone.
pub fn of(process: &str) -> io::Result<Vec<MountPoint>> {
    let text = std::fs::read_to_string(format!("/proc/{process}/mountinfo"))?;
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<MountPoint> {
    let (before, after) = line.split_once(" - ")?;
    let path = unescape(before.split(' ').nth(4)?);
    Some(MountPoint { path, kind: after.split(' ').next()?.to_owned() })
}

/// Blanks and backslashes in paths are written in octal.
fn unescape(path: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let mut ahead = bytes.clone();
        let octal: Vec<u8> = ahead.by_ref().take(3).collect();
        let code = std::str::from_utf8(&octal).ok().and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(code) if byte == b'\\' && octal.len() == 3 => {
                out.push(code);
                bytes = ahead;
            }
            _ => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn is_kept(mount: &MountPoint) -> bool {
    let below = |parent: &str| mount.path.starts_with(parent);
    match mount.path.as_str() {
        "/" => true,
        path if OWN.iter().any(|(own, _, _)| *own == path) => false,
        _ if below("/proc/") || below("/sys/") => false,
        _ if LEFT_OUT.contains(&mount.kind.as_str()) => false,
        path if mount.kind == "tmpfs" => MEMORY_KEPT.contains(&path),
        _ => true,
    }
}

/// What is mounted in this mount namespace from now on is seen in no other.
///
/// # Errors
/// What mount(2) says.
pub fn make_private() -> io::Result<()> {
    let none: Option<&str> = None;
    Ok(mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?)
}

/// Makes the mounts of a tree out of its host's, in the mount namespace of its
/// init, which was just made.
///
/// # Errors
/// When the system refuses, with what was being done.
pub fn make() -> io::Result<()> {
    make_private()?;
    // The deepest first: a mount can't go before those on it.
    for found in of("self")?.iter().rev().filter(|found| !is_kept(found)) {
        match umount2(found.path.as_str(), MntFlags::MNT_DETACH) {
            // It was hidden below another one, or went with it.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => return Err(failed("unmount", &found.path, error)),
        }
    }
    for (path, kind, options) in OWN {
        if Path::new(path).is_dir() {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
            let flags = if kind == "tmpfs" { flags | MsFlags::MS_NODEV } else { flags };
            mount(Some(kind), path, Some(kind), flags, Some(options))
                .map_err(|error| failed("mount", path, error))?;
        }
    }
    Ok(())
}

fn failed(doing: &str, path: &str, error: nix::Error) -> io::Error {
    io::Error::other(format!("cannot {doing} {path}: {error}"))
}

/// The mount points of a tree that CRIU is not to look into.
#[must_use]
pub fn external(mounts: &[MountPoint]) -> Vec<String> {
    let own = |mount: &MountPoint| {
        OWN.iter().any(|(path, kind, _)| *path == mount.path && *kind == mount.kind)
    };
    let mut paths: Vec<_> = mounts
        .iter()
        .filter(|mount| mount.path != "/" && !own(mount))
        .map(|mount| mount.path.clone())
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// Binds `/` to a directory in this process' own mount namespace: CRIU wants the
/// root of a tree that it makes to be a mount point.
///
/// # Errors
/// What mount(2) says.
pub fn bind_root(to: &Path) -> io::Result<()> {
    let none: Option<&str> = None;
    mount(Some("/"), to, none, MsFlags::MS_BIND, none)?;
    Ok(mount(none, to, none, MsFlags::MS_PRIVATE, none)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str, kind: &str) -> MountPoint {
        MountPoint { path: path.into(), kind: kind.into() }
    }

    #[test]
    fn a_line_of_mountinfo_says_where_and_what() {
        let line =
            "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(parse(line), Some(at("/mnt 2", "ext3")));
        assert_eq!(parse("36 35 98:0 / /"), None);
        assert_eq!(unescape("\\134x\\9\\04"), "\\x\\9\\04");
    }

    #[test]
    fn what_says_something_of_one_host_only_is_left_out() {
        let kept = [
            at("/", "ext4"),
            at("/sys", "sysfs"),
            at("/dev", "devtmpfs"),
            at("/home", "nfs4"),
            at("/run", "tmpfs"),
        ];
        assert!(kept.iter().all(is_kept));
        let gone = [
            at("/proc", "proc"),
            at("/proc/sys/fs/binfmt_misc", "autofs"),
            at("/sys/fs/cgroup", "tmpfs"),
            at("/dev/pts", "devpts"),
            at("/run/user/0", "tmpfs"),
            at("/mnt", "debugfs"),
        ];
        assert!(!gone.iter().any(is_kept));
    }

    #[test]
    fn external_is_what_was_not_made_for_the_tree() {
        let mounts = [
            at("/", "ext4"),
            at("/sys", "sysfs"),
            at("/dev", "devtmpfs"),
            at("/dev/shm", "tmpfs"),
            at("/dev/pts", "devpts"),
            at("/proc", "proc"),
            at("/sys", "sysfs"),
        ];
        assert_eq!(external(&mounts), ["/dev", "/sys"]);
    }

    #[test]
    fn this_process_has_a_root() {
        assert!(of("self").unwrap().iter().any(|mount| mount.path == "/"));
        assert!(of("nobody").is_err());
    }
}
