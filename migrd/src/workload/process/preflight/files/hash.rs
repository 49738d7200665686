//! The content of files, read with care: a path may lead to a device, a pipe or
//! a file of the kernel's, and then nothing is opened.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::sys::statfs::fstatfs;

use super::{Access, Kind, MAX_HASHED, MAX_HASHED_TOTAL, UsedFile, is_made_by_the_kernel};
use crate::workload::process::preflight::procfs;

/// Hashes the files of the tree of `init` that it only reads, as far as the
/// limits go: [`MAX_HASHED`] and [`MAX_HASHED_TOTAL`]. A file that can't be read,
/// or is not any more what was seen, keeps no hash. Blocks as long as it takes to
/// read them.
pub fn hash(init: u32, files: &mut [UsedFile]) {
    let root = procfs::path(init, "root");
    let mut budget = Budget::new();
    for file in files.iter_mut().filter(|file| is_hashed(file)) {
        let Ok(path) = file.path.strip_prefix("/") else { continue };
        if !budget.take(file.size) {
            continue;
        }
        let found = Found::at(&root.join(path));
        file.blake3 = found.and_then(|found| found.hash(file.size)).ok();
    }
}

/// Whether its content is to be compared.
pub(super) fn is_hashed(file: &UsedFile) -> bool {
    let content = matches!(file.kind, Kind::Executable | Kind::Mapped | Kind::Open);
    content && file.access == Access::Read && file.size <= MAX_HASHED
}

/// How much may still be hashed.
#[derive(Debug)]
pub(super) struct Budget(u64);

impl Budget {
    pub(super) fn new() -> Self {
        Self(MAX_HASHED_TOTAL)
    }

    /// Whether there is room for `size` bytes, which are then spent.
    pub(super) fn take(&mut self, size: u64) -> bool {
        match self.0.checked_sub(size) {
            Some(left) => {
                self.0 = left;
                true
            }
            None => false,
        }
    }
}

/// What is at a path: looked at, not opened.
#[derive(Debug)]
pub(super) struct Found {
    fd: OwnedFd,
    pub(super) stat: FileStat,
}

impl Found {
    /// Symbolic links are followed, as CRIU does.
    ///
    /// # Errors
    /// What open(2) says.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&fd)?;
        Ok(Self { fd, stat })
    }

    pub(super) fn format(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    /// Hashes its content, which must be a regular file's and `size` bytes long.
    ///
    /// # Errors
    /// When it is not, or can't be read.
    pub(super) fn hash(&self, size: u64) -> io::Result<[u8; 32]> {
        let wrong = |what: &str| Err(io::Error::other(what.to_owned()));
        if self.format() != SFlag::S_IFREG {
            return wrong("not a regular file");
        }
        if is_made_by_the_kernel(fstatfs(&self.fd)?.filesystem_type()) {
            return wrong("a file of the kernel's");
        }
        // The same file, whatever is at the path by now.
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = File::from(open(&path, flags, Mode::empty())?);
        let mut hasher = blake3::Hasher::new();
        // One byte more, to see that it has grown.
        let mut limited = file.take(size.saturating_add(1));
        let read = io::copy(&mut limited, &mut hasher)?;
        if read == size { Ok(hasher.finalize().into()) } else { wrong("it changed meanwhile") }
    }
}
