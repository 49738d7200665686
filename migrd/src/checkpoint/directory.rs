//! A directory of a snapshot, held open: nothing in it leads out of it, and what is
//! no plain file is refused.
//!
//! Everything below it is reached from its descriptor and by one name, so symbolic
//! links in it are not followed, and whoever renames the directory meanwhile changes
//! nothing.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::CheckpointError;

/// A directory.
#[derive(Debug)]
pub(super) struct Place {
    /// The snapshot, as the user names it.
    root: PathBuf,
    /// What comes before a name in it, in messages.
    inside: String,
    fd: OwnedFd,
}

impl Place {
    /// The snapshot itself. A symbolic link to it is the user's own.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let opened = nix::fcntl::open(path, directory_flags(), Mode::empty());
        let fd = opened.map_err(|e| super::io_error("open", path)(e.into()))?;
        Ok(Self { root: path.to_owned(), inside: String::new(), fd })
    }

    /// The snapshot that it is, or is in.
    pub(super) fn path(&self) -> &Path {
        &self.root
    }

    /// A directory in it.
    pub(super) fn below(&self, name: &str) -> Result<Self, CheckpointError> {
        match openat(&self.fd, name, directory_flags() | OFlag::O_NOFOLLOW, Mode::empty()) {
            Ok(fd) => {
                let inside = format!("{}{name}/", self.inside);
                Ok(Self { root: self.root.clone(), inside, fd })
            }
            Err(Errno::ENOTDIR | Errno::ELOOP) => Err(self.damaged(name, "is not a directory")),
            Err(Errno::ENOENT) => Err(self.damaged(name, "is missing")),
            Err(error) => Err(self.failed("open", name)(error.into())),
        }
    }

    /// Makes a directory in it, for its owner alone.
    pub(super) fn make(&self, name: &str) -> Result<Self, CheckpointError> {
        let made = mkdirat(&self.fd, name, Mode::S_IRWXU);
        made.map_err(|e| self.failed("make", name)(e.into()))?;
        self.below(name)
    }

    /// Another descriptor of it.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, CheckpointError> {
        self.fd.try_clone().map_err(self.failed("open", ""))
    }

    /// The names in it, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let failed = |e: Errno| self.failed("read", "")(e.into());
        // With a position of its own.
        let again = openat(&self.fd, ".", directory_flags(), Mode::empty()).map_err(failed)?;
        let mut directory = Dir::from_fd(again).map_err(failed)?;
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(failed)?;
            match entry.file_name().to_bytes() {
                b"." | b".." => {}
                name => names.push(String::from_utf8_lossy(name).into_owned()),
            }
        }
        names.sort();
        Ok(names)
    }

    /// A plain file of it to read, and its length in bytes. A pipe, say, might hold
    /// the reader for ever.
    pub(super) fn plain(&self, name: &str) -> Result<(File, u64), CheckpointError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Err(self.damaged(name, "is missing")),
            Err(Errno::ELOOP) => return Err(self.damaged(name, "is a symbolic link")),
            Err(error) => return Err(self.failed("read", name)(error.into())),
        };
        let found = file.metadata().map_err(self.failed("read", name))?;
        if found.is_file() {
            Ok((file, found.len()))
        } else {
            Err(self.damaged(name, "is no file"))
        }
    }

    /// Where a symbolic link in it leads.
    pub(super) fn link(&self, name: &str) -> Result<String, CheckpointError> {
        match readlinkat(&self.fd, name) {
            Ok(target) => Ok(target.to_string_lossy().into_owned()),
            Err(Errno::ENOENT) => Err(self.damaged(name, "is missing")),
            Err(Errno::EINVAL) => Err(self.damaged(name, "is no symbolic link")),
            Err(error) => Err(self.failed("read", name)(error.into())),
        }
    }

    /// Writes a new file of it, durably.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let made = openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut file = File::from(made.map_err(|e| self.failed("write", name)(e.into()))?);
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        written.map_err(self.failed("write", name))
    }

    /// Gives what is in it another name.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), CheckpointError> {
        let renamed = renameat(&self.fd, from, &self.fd, to);
        renamed.map_err(|e| self.failed("name", to)(e.into()))
    }

    /// Makes its names outlive a crash of the host.
    pub(super) fn sync(&self) -> Result<(), CheckpointError> {
        let file = File::from(self.descriptor()?);
        file.sync_all().map_err(self.failed("write", ""))
    }

    /// Removes a directory of plain files in it, which may be missing.
    pub(super) fn remove(&self, name: &str) -> Result<(), CheckpointError> {
        let below = match self.below(name) {
            Ok(below) => below,
            Err(CheckpointError::Damaged { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        for file in below.names()? {
            below.unlink(&file, UnlinkatFlags::NoRemoveDir)?;
        }
        self.unlink(name, UnlinkatFlags::RemoveDir)
    }

    fn unlink(&self, name: &str, how: UnlinkatFlags) -> Result<(), CheckpointError> {
        let removed = unlinkat(self.fd.as_fd(), name, how);
        removed.map_err(|e| self.failed("remove", name)(e.into()))
    }

    /// Something in it is not what it should be.
    pub(super) fn damaged(&self, name: &str, why: &str) -> CheckpointError {
        super::damaged(&self.root, format!("{}{name} {why}", self.inside))
    }

    /// Something of it could not be done.
    pub(super) fn failed(
        &self,
        what: &'static str,
        name: &str,
    ) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
        let path = self.root.join(&self.inside).join(name);
        move |source| super::io_error(what, &path)(source)
    }
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn nothing_in_a_snapshot_leads_out_of_it() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        let inside = tempfile::tempdir().unwrap();
        let place = Place::open(inside.path()).unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.path().join("images")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), inside.path().join("file"))
            .unwrap();
        nix::unistd::mkfifo(&inside.path().join("pipe"), Mode::S_IRWXU).unwrap();
        let text = |error: CheckpointError| error.to_string();
        assert!(text(place.below("images").unwrap_err()).contains("images is not a directory"));
        assert!(text(place.plain("file").unwrap_err()).contains("file is a symbolic link"));
        assert!(text(place.plain("pipe").unwrap_err()).contains("pipe is no file"));
        assert!(text(place.plain("none").unwrap_err()).contains("none is missing"));
        place.remove("images").unwrap();
        assert!(outside.path().join("secret").exists(), "it was removed through a link");
        assert!(place.write("file", b"y").is_err());
        assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"x");
    }

    #[test]
    fn a_directory_of_files_is_made_renamed_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::open(root.path()).unwrap();
        let below = place.make("part").unwrap();
        below.write("b", b"2").unwrap();
        below.write("a", b"1").unwrap();
        assert!(below.write("a", b"3").is_err(), "it is there");
        assert_eq!(below.names().unwrap(), ["a", "b"]);
        place.rename("part", "whole").unwrap();
        assert_eq!(place.names().unwrap(), ["whole"]);
        assert_eq!(place.below("whole").unwrap().plain("a").unwrap().1, 1);
        place.remove("whole").unwrap();
        place.remove("whole").unwrap();
        assert!(place.names().unwrap().is_empty());
    }
}
