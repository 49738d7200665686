//! Makes what a list says, below a root that nobody else reaches.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, futimens, makedev, mkdirat,
    mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};

use super::list::{List, Node, What};
use super::walk::{DIRECTORY, open_below};
use super::{RootfsError, attributes, refused, system};

/// The mode of what is not complete yet.
const PRIVATE: Mode = Mode::S_IRWXU;

/// Makes and deletes below a root.
pub(super) struct Maker<'a> {
    root: &'a OwnedFd,
    /// The directory that was needed last, by its path.
    directory: Option<(PathBuf, OwnedFd)>,
}

impl<'a> Maker<'a> {
    pub(super) fn new(root: &'a OwnedFd) -> Self {
        Self { root, directory: None }
    }

    /// The directory that something is in.
    fn directory(&mut self, of: &Path) -> Result<&OwnedFd, RootfsError> {
        let path = of.parent().unwrap_or(Path::new(""));
        if self.directory.as_ref().is_none_or(|(known, _)| known != path) {
            let opened = open_below(self.root, path, DIRECTORY);
            let opened = opened.map_err(refused("open", path))?;
            self.directory = Some((path.to_owned(), opened));
        }
        self.directory.as_ref().map(|(_, fd)| fd).ok_or_else(|| RootfsError::Odd("no root".into()))
    }

    /// Makes something, without content, and without what [`Maker::dress`] gives it. A
    /// file is given open.
    pub(super) fn make(&mut self, list: &List, number: u32) -> Result<Option<File>, RootfsError> {
        let Some(node) = list.get(number).filter(|_| number > 0) else { return Ok(None) };
        let path = list.path(number);
        let name = OsStr::from_bytes(&node.name);
        let failed = refused("make", path);
        if let What::Same(other) = node.what {
            let first = list.path(other);
            let beside = open_below(self.root, first.parent().unwrap_or(Path::new("")), DIRECTORY);
            let beside = beside.map_err(refused("open", first))?;
            let directory = self.directory(path)?;
            let first = first.file_name().unwrap_or_default();
            let done = linkat(&beside, first, directory, name, AtFlags::empty());
            return done.map(|()| None).map_err(failed);
        }
        let directory = self.directory(path)?;
        let done = match &node.what {
            What::Directory => mkdirat(directory, name, PRIVATE),
            What::File { size, .. } => {
                let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
                let opened = openat(directory, name, flags | OFlag::O_CLOEXEC, PRIVATE);
                let file = File::from(opened.map_err(failed)?);
                file.set_len(*size).map_err(system("make", path))?;
                return Ok(Some(file));
            }
            What::Link(target) => symlinkat(OsStr::from_bytes(target), directory, name),
            What::Pipe => mknodat(directory, name, SFlag::S_IFIFO, PRIVATE, 0),
            What::Socket => mknodat(directory, name, SFlag::S_IFSOCK, PRIVATE, 0),
            What::Device { block, major, minor } => {
                let format = if *block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
                let device = makedev(u64::from(*major), u64::from(*minor));
                mknodat(directory, name, format, PRIVATE, device)
            }
            What::Same(_) => Ok(()),
        };
        done.map(|()| None).map_err(failed)
    }

    /// Gives something its owner, mode, attributes and time.
    pub(super) fn dress(&mut self, list: &List, number: u32) -> Result<(), RootfsError> {
        let Some(node) = list.get(number) else { return Ok(()) };
        let path = list.path(number);
        match node.what {
            What::Directory => {
                let opened = open_below(self.root, path, DIRECTORY);
                dress_open(&opened.map_err(refused("open", path))?, node, path)
            }
            What::File { .. } => {
                let opened = open_below(self.root, path, OFlag::O_RDONLY | OFlag::O_NOFOLLOW);
                dress_open(&opened.map_err(refused("open", path))?, node, path)
            }
            // It is a file that was dressed under its first name.
            What::Same(_) => Ok(()),
            What::Link(_) | What::Pipe | What::Socket | What::Device { .. } => {
                let name = OsStr::from_bytes(&node.name);
                let is_link = matches!(node.what, What::Link(_));
                let directory = self.directory(path)?;
                let done = (|| {
                    let (uid, gid) = owner(node);
                    fchownat(directory, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                    if !is_link {
                        fchmodat(directory, name, mode(node), FchmodatFlags::FollowSymlink)?;
                    }
                    let (atime, mtime) = times(node);
                    utimensat(directory, name, &atime, &mtime, UtimensatFlags::NoFollowSymlink)
                })();
                done.map_err(refused("set the owner of", path))
            }
        }
    }

    /// Deletes something; a directory must be empty.
    pub(super) fn remove(&mut self, list: &List, number: u32) -> Result<(), RootfsError> {
        let Some(node) = list.get(number).filter(|_| number > 0) else { return Ok(()) };
        let path = list.path(number);
        if node.what == What::Directory {
            // It may be that very one.
            self.directory = None;
        }
        let flag = match node.what {
            What::Directory => UnlinkatFlags::RemoveDir,
            _ => UnlinkatFlags::NoRemoveDir,
        };
        let directory = self.directory(path)?;
        unlinkat(directory, OsStr::from_bytes(&node.name), flag).map_err(refused("delete", path))
    }
}

fn owner(node: &Node) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)))
}

fn mode(node: &Node) -> Mode {
    Mode::from_bits_truncate(node.mode)
}

/// When it was read last is left as it is.
fn times(node: &Node) -> (TimeSpec, TimeSpec) {
    let (seconds, ns) =
        (node.mtime_ns.div_euclid(1_000_000_000), node.mtime_ns.rem_euclid(1_000_000_000));
    (TimeSpec::UTIME_OMIT, TimeSpec::new(seconds, ns))
}

/// The same of an open file or directory. A change of owner takes capabilities and some
/// bits of the mode away, so it comes first.
pub(super) fn dress_open(
    file: &impl std::os::fd::AsFd,
    node: &Node,
    path: &Path,
) -> Result<(), RootfsError> {
    let (uid, gid) = owner(node);
    fchown(file, uid, gid).map_err(refused("set the owner of", path))?;
    attributes::write(file, &node.attributes).map_err(system("set the attributes of", path))?;
    fchmod(file, mode(node)).map_err(refused("set the mode of", path))?;
    let (atime, mtime) = times(node);
    futimens(file, &atime, &mtime).map_err(refused("set the time of", path))
}
