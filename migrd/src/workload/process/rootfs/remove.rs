//! Deletes a root file system that came with a container, and only that: no link and no
//! mount is followed.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::walk::{DIRECTORY, open_below};
use crate::keeper::mounts;

/// How deep directories are followed before one is taken up to the top: a container may
/// have made them as deep as it likes.
const DEEP: usize = 128;

/// Deletes what is in a place, and the place. Harmless when there is none.
///
/// # Errors
/// When something in it can't be deleted, or is mounted.
pub fn remove(place: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let top = match open(place, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    if mounts::of("self")?.iter().any(|mount| Path::new(&mount.path).starts_with(place)) {
        let text = format!("something is mounted in {}: unmount it", place.display());
        return Err(io::Error::other(text));
    }
    let mut taken_up = 0;
    // What was taken up is there after the first time.
    while empty(&top, &top, 0, &mut taken_up)? {}
    std::fs::remove_dir(place)
}

/// Deletes what is in a directory; whether something of it was taken up.
fn empty(top: &OwnedFd, directory: &OwnedFd, depth: usize, taken_up: &mut u32) -> io::Result<bool> {
    let before = *taken_up;
    for (name, is_directory) in entries(directory)? {
        if !is_directory {
            unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
            continue;
        }
        if depth >= DEEP {
            *taken_up += 1;
            let up = format!(".taken-up-{taken_up}");
            renameat(directory, name.as_os_str(), top, up.as_str())?;
            continue;
        }
        let below = open_below(directory, Path::new(&name), DIRECTORY)?;
        empty(top, &below, depth + 1, taken_up)?;
        unlinkat(directory, name.as_os_str(), UnlinkatFlags::RemoveDir)?;
    }
    Ok(*taken_up > before)
}

/// What is in a directory, and what of that are directories.
fn entries(directory: &OwnedFd) -> io::Result<Vec<(OsString, bool)>> {
    use std::os::unix::ffi::OsStrExt;
    let again = open_below(directory.as_fd(), Path::new("."), DIRECTORY)?;
    let mut found = Vec::new();
    for entry in Dir::from_fd(again)?.iter() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        if name == "." || name == ".." {
            continue;
        }
        let is_directory = match entry.file_type() {
            Some(kind) => kind == nix::dir::Type::Directory,
            None => open_below(directory.as_fd(), Path::new(&name), DIRECTORY).is_ok(),
        };
        found.push((name, is_directory));
    }
    Ok(found)
}
