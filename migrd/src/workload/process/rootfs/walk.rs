//! A look at everything that is in a root file system.
//!
//! No path is followed that the container could lead elsewhere: every directory is
//! opened below the root, without symbolic links and without mounts.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, major, minor};

use super::attributes::{self, Attribute};
use super::{Devices, MAX_NODES, RootfsError, refused, system};

/// How close to a look a change may be without being told from a later one, in s:
/// clocks of file systems have ticks of up to that.
const TICK: i64 = 2;

/// What tells whether something has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) device: u64,
    pub(super) inode: u64,
    changed: (i64, i64),
    written: (i64, i64),
    size: u64,
    mode: u32,
    owner: (u32, u32),
}

impl Seen {
    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            changed: (stat.st_ctime, stat.st_ctime_nsec),
            written: (stat.st_mtime, stat.st_mtime_nsec),
            size: length(stat),
            mode: stat.st_mode,
            owner: (stat.st_uid, stat.st_gid),
        }
    }

    /// Whether something may have happened at the time of a look that began then and
    /// not be told from this.
    pub(super) fn is_fresh(&self, began: i64) -> bool {
        self.changed.0 >= began - TICK
    }
}

/// One thing.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// Where, relative to the root; of the root itself empty.
    pub(super) path: PathBuf,
    /// Which of those found before is its directory.
    pub(super) parent: usize,
    pub(super) stat: FileStat,
    /// Of a symbolic link.
    pub(super) target: Vec<u8>,
    pub(super) attributes: Vec<Attribute>,
    /// Which of those found before is the same file under another name.
    pub(super) same_as: Option<usize>,
}

impl Found {
    pub(super) fn name(&self) -> &[u8] {
        self.path.file_name().map_or(b"", OsStr::as_bytes)
    }

    pub(super) fn seen(&self) -> Seen {
        Seen::of(&self.stat)
    }

    pub(super) fn format(&self) -> SFlag {
        format_of(&self.stat)
    }

    pub(super) fn size(&self) -> u64 {
        length(&self.stat)
    }
}

/// All of them, each directory before what is in it.
#[derive(Debug)]
pub(super) struct Walk {
    /// When it began, in s since the Unix epoch.
    pub(super) began: i64,
    pub(super) found: Vec<Found>,
}

/// How a look is taken.
pub(super) struct Looking<'a> {
    /// Everything stands still: what can't be seen is a failure, and not something that
    /// went meanwhile.
    pub(super) still: bool,
    /// Devices that may be there.
    pub(super) devices: &'a Devices,
    /// Whether nothing has to be known of it but that it is there.
    pub(super) known: &'a dyn Fn(&Path, &FileStat) -> bool,
}

fn length(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn format_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Opens a root file system.
///
/// # Errors
/// When it is not there.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd, RootfsError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(refused("open", path))
}

/// Opens something below a root, without leaving it.
///
/// # Errors
/// What openat2(2) says.
pub(super) fn open_below(root: impl AsFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

/// The flags by which a directory is opened to be read.
pub(super) const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW);

/// Looks at everything below `root`.
///
/// # Errors
/// When it has something that does not travel, or can't be looked at.
pub(super) fn walk(root: &OwnedFd, looking: &Looking) -> Result<Walk, RootfsError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let began = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let stat = fstat(root).map_err(refused("look at", Path::new("/")))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/.", root.as_raw_fd()));
    let attributes = attributes::read(&path).map_err(system("read the attributes of", &path))?;
    let target = Vec::new();
    let first = Found { path: PathBuf::new(), parent: 0, stat, target, attributes, same_as: None };
    let mut walker = Walker { root, looking, found: vec![first], names: HashMap::new() };
    let mut next = 0;
    // What is found in a directory comes behind all that is known.
    while next < walker.found.len() {
        if walker.found[next].format() == SFlag::S_IFDIR {
            walker.directory(next)?;
        }
        next += 1;
    }
    Ok(Walk { began, found: walker.found })
}

struct Walker<'a> {
    root: &'a OwnedFd,
    looking: &'a Looking<'a>,
    found: Vec<Found>,
    /// The first name of each file that has several.
    names: HashMap<(u64, u64), usize>,
}

impl Walker<'_> {
    fn directory(&mut self, parent: usize) -> Result<(), RootfsError> {
        let path = self.found[parent].path.clone();
        let opened = match open_below(self.root, &path, DIRECTORY) {
            Ok(opened) => opened,
            Err(Errno::EXDEV) => return Err(mounted(&path)),
            Err(Errno::ENAMETOOLONG) => return Err(too_deep(&path)),
            // Something else has taken its place. What is in it now is new.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) if !self.looking.still => {
                return Ok(());
            }
            Err(error) => return Err(refused("open", &path)(error)),
        };
        for name in names_in(&opened, &path)? {
            self.entry(parent, &opened, path.join(&name), &name)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        parent: usize,
        directory: &OwnedFd,
        path: PathBuf,
        name: &OsStr,
    ) -> Result<(), RootfsError> {
        let stat = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) if !self.looking.still => return Ok(()),
            Err(error) => return Err(refused("look at", &path)(error)),
        };
        if self.found.len() >= MAX_NODES {
            return Err(RootfsError::Unfit {
                code: "rootfs-files",
                what: format!("it has more than {MAX_NODES} files and directories"),
                remedy: "put what has many files on storage that both hosts share, as a mount of \
                         type bind",
            });
        }
        if path.as_os_str().len() > libc::PATH_MAX.cast_unsigned() as usize - 1 {
            return Err(too_deep(&path));
        }
        let mut found =
            Found { path, parent, stat, target: Vec::new(), attributes: Vec::new(), same_as: None };
        if found.format() != SFlag::S_IFDIR && stat.st_nlink > 1 {
            let first = self.names.entry((stat.st_dev, stat.st_ino)).or_insert(self.found.len());
            let is_file = found.format() == SFlag::S_IFREG;
            found.same_as = Some(*first).filter(|first| is_file && *first != self.found.len());
        }
        if !(self.looking.known)(&found.path, &stat) && !self.look_closer(directory, &mut found)? {
            return Ok(());
        }
        self.found.push(found);
        Ok(())
    }

    /// Whether it was still there.
    fn look_closer(&self, directory: &OwnedFd, found: &mut Found) -> Result<bool, RootfsError> {
        let name = OsString::from_vec(found.name().to_vec());
        match found.format() {
            SFlag::S_IFLNK => match readlinkat(directory, name.as_os_str()) {
                Ok(target) => found.target = target.into_vec(),
                Err(Errno::ENOENT | Errno::EINVAL) if !self.looking.still => return Ok(false),
                Err(error) => return Err(refused("read", &found.path)(error)),
            },
            SFlag::S_IFBLK | SFlag::S_IFCHR => {
                let device = found.stat.st_rdev;
                let numbers = (numbers(major(device)), numbers(minor(device)));
                let block = found.format() == SFlag::S_IFBLK;
                if !self.looking.devices.has(block, numbers.0, numbers.1) {
                    return Err(device_inside(&found.path, numbers));
                }
            }
            SFlag::S_IFREG | SFlag::S_IFDIR if found.same_as.is_none() => {
                let at = format!("/proc/self/fd/{}", directory.as_raw_fd());
                match attributes::read(&Path::new(&at).join(&name)) {
                    Ok(attributes) => found.attributes = attributes,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound && !self.looking.still => {
                        return Ok(false);
                    }
                    Err(e) => return Err(system("read the attributes of", &found.path)(e)),
                }
                if found.attributes.len() > attributes::MOST {
                    return Err(RootfsError::Unfit {
                        code: "rootfs-attributes",
                        what: format!("/{} has too many attributes", found.path.display()),
                        remedy: "remove some of them (setfattr -x)",
                    });
                }
            }
            _ => {}
        }
        Ok(true)
    }
}

fn numbers(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// What is in a directory, by name.
pub(super) fn names_in(directory: &OwnedFd, path: &Path) -> Result<Vec<OsString>, RootfsError> {
    let failed = |error: nix::Error| refused("list", path)(error);
    let again = directory.try_clone().map_err(system("list", path))?;
    let mut entries = Dir::from_fd(again).map_err(failed)?;
    let mut names = Vec::new();
    for entry in entries.iter() {
        let name = entry.map_err(failed)?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort();
    Ok(names)
}

/// Opens the content of a file that was found, if it is still that file.
///
/// # Errors
/// When it is not.
pub(super) fn open_found(root: &OwnedFd, path: &Path, inode: u64) -> std::io::Result<File> {
    // What has taken the place of a file may be a pipe, which nobody should wait for.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let opened = open_below(root, path, flags)?;
    let stat = fstat(&opened)?;
    if format_of(&stat) != SFlag::S_IFREG || stat.st_ino != inode {
        return Err(std::io::ErrorKind::NotFound.into());
    }
    Ok(opened.into())
}

fn mounted(path: &Path) -> RootfsError {
    RootfsError::Unfit {
        code: "rootfs-mount",
        what: format!("something is mounted in it at /{}", path.display()),
        remedy: "unmount it, or name it in config.json as a mount of type bind",
    }
}

fn device_inside(path: &Path, (major, minor): (u32, u32)) -> RootfsError {
    RootfsError::Unfit {
        code: "rootfs-device",
        what: format!(
            "/{} is the device {major}:{minor}, which its config.json does not give it",
            path.display()
        ),
        remedy: "remove it, or add the device to linux.devices in config.json",
    }
}

fn too_deep(path: &Path) -> RootfsError {
    let shown: String = path.display().to_string().chars().take(80).collect();
    RootfsError::Unfit {
        code: "rootfs-depth",
        what: format!("a path in it is longer than any path can be: /{shown}…"),
        remedy: "remove the directories that are that deep",
    }
}
