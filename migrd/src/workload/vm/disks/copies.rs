//! Copies of disks that arrive with a VM.
//!
//! A copy is a new file, or takes the place of the one that the same workload
//! left behind when it moved away. Until the VM is this host's, the note beside
//! it says that it is arriving. Which copies a VM's arrival makes is written
//! into its directory first, so that a daemon that was killed meanwhile clears
//! them away at its next start.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use migr_proto::v1::DiskConfig;
use nix::sys::statvfs::statvfs;

use super::error::DiskError;
use super::holder::{self, Holder, Note, State};
use super::image::Image;
use super::stream::{DiskStreams, Use};
use crate::units::{HostId, WorkloadId};

/// The list of copies in a VM's directory.
const LIST: &str = "copies.json";

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DiskError + 'a {
    move |source| DiskError::Io { what, path: path.to_owned(), source }
}

/// How a copy would come to be.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// As a new file.
    Make,
    /// In place of an old copy, which has that many bytes on the disk.
    Replace(u64),
    /// It is there and nobody writes to it.
    Compare,
}

fn way(disk: &DiskConfig, by: &Holder) -> Result<Way, DiskError> {
    let path = Path::new(&disk.path);
    if path.starts_with("/dev") {
        return Err(DiskError::Device { path: path.to_owned() });
    }
    let found = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Way::Make),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(DiskError::NoDirectory { directory: path.parent().unwrap_or(path).into() });
        }
        Err(e) => return Err(io_error("look at", path)(e)),
        Ok(found) => found,
    };
    let exists = || DiskError::Exists { path: path.to_owned() };
    let note = holder::read_note(path)?;
    if found.is_file()
        && let Some(note) = &note
        && note.holder.workload == by.workload
        && note.holder.host == by.host
    {
        match note.state {
            State::Moved | State::Arriving => return Ok(Way::Replace(found.blocks() * 512)),
            State::Held | State::Released => return Err(exists()),
        }
    }
    if !disk.read_only || note.is_some() {
        return Err(exists());
    }
    Image::open_as(disk)?;
    Ok(Way::Compare)
}

/// What keeps copies of `disks` from being made; `used` says how many bytes of
/// each will come.
pub fn problems(disks: &[DiskConfig], used: &[u64], by: &Holder) -> Vec<DiskError> {
    let mut found = Vec::new();
    let mut wanted: Vec<(u64, PathBuf, u64)> = Vec::new();
    for (disk, used) in disks.iter().zip(used) {
        let path = Path::new(&disk.path);
        let there = match way(disk, by) {
            Ok(Way::Make) => 0,
            Ok(Way::Replace(there)) => there,
            Ok(Way::Compare) => continue,
            Err(error) => {
                found.push(error);
                continue;
            }
        };
        let directory = path.parent().unwrap_or(path);
        match std::fs::metadata(directory) {
            Ok(meta) if meta.is_dir() => {
                let needed = used.saturating_sub(there);
                match wanted.iter_mut().find(|(device, _, _)| *device == meta.dev()) {
                    Some((_, _, sum)) => *sum = sum.saturating_add(needed),
                    None => wanted.push((meta.dev(), directory.to_owned(), needed)),
                }
            }
            Ok(_) => found.push(DiskError::NoDirectory { directory: directory.to_owned() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                found.push(DiskError::NoDirectory { directory: directory.to_owned() });
            }
            Err(e) => found.push(io_error("look at", directory)(e)),
        }
    }
    found.extend(wanted.into_iter().filter_map(|(_, directory, needed)| room(directory, needed)));
    found
}

fn room(directory: PathBuf, needed: u64) -> Option<DiskError> {
    let free = statvfs(&directory).map(|s| s.blocks_available().saturating_mul(s.fragment_size()));
    match free {
        Ok(free) if free < needed => {
            let (needed, free) = (needed.div_ceil(1 << 20), free >> 20);
            Some(DiskError::NoSpace { directory, needed, free })
        }
        Ok(_) => None,
        Err(e) => Some(io_error("find room for", &directory)(e.into())),
    }
}

/// Makes empty copies of `disks` for the arrival in the VM's `directory`.
///
/// # Errors
/// When one can't be made; [`undo`] clears away those that were.
pub fn prepare(
    disks: &[DiskConfig],
    by: &Holder,
    directory: &Path,
) -> Result<DiskStreams, DiskError> {
    let paths: Vec<&str> = disks.iter().map(|disk| disk.path.as_str()).collect();
    let list = directory.join(LIST);
    let text = serde_json::to_vec(&paths).map_err(|e| io_error("note", &list)(e.into()))?;
    std::fs::write(&list, text).map_err(io_error("note", &list))?;
    let mut streams = DiskStreams::default();
    for disk in disks {
        let path = PathBuf::from(&disk.path);
        let (file, used_as) = match way(disk, by)? {
            Way::Make => (make(disk, &path, by)?, Use::Fill),
            Way::Replace(_) => (replace(disk, &path, by)?, Use::Fill),
            Way::Compare => {
                let image = Image::open_as(disk)?;
                holder::lock(&image.file, &path, true)?;
                (image.file, Use::Compare)
            }
        };
        streams.push(file, path, disk.bytes, used_as);
    }
    Ok(streams)
}

fn make(disk: &DiskConfig, path: &Path, by: &Holder) -> Result<File, DiskError> {
    let mut options = OpenOptions::new();
    let made = options.read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = made.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => DiskError::Exists { path: path.to_owned() },
        _ => io_error("make", path)(e),
    })?;
    let filled = (|| {
        holder::lock(&file, path, false)?;
        let note = Note::new(State::Arriving, by).made(true);
        holder::write_note(path, &note, false)?;
        file.set_len(disk.bytes).map_err(io_error("make", path))?;
        // Its name must outlive a power cut as its contents will.
        let directory = path.parent().unwrap_or(path);
        File::open(directory).and_then(|d| d.sync_all()).map_err(io_error("make", path))
    })();
    if let Err(error) = filled {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

fn replace(disk: &DiskConfig, path: &Path, by: &Holder) -> Result<File, DiskError> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    let file = opened.map_err(io_error("open", path))?;
    holder::lock(&file, path, false)?;
    // Looked at again: before the lock somebody may have taken it.
    let Way::Replace(_) = way(disk, by)? else {
        return Err(DiskError::Exists { path: path.to_owned() });
    };
    let made = holder::read_note(path)?.is_some_and(|n| n.state == State::Arriving && n.made);
    let note = Note::new(State::Arriving, by).made(made);
    holder::write_note(path, &note, true)?;
    // What is not sent is a hole at the source, and must be one here.
    let emptied = file.set_len(0).and_then(|()| file.set_len(disk.bytes));
    emptied.map_err(io_error("empty", path))?;
    Ok(file)
}

/// Clears away the copies of an arrival that did not become this host's. What
/// is somebody's by now stays.
pub fn undo(directory: &Path, workload: WorkloadId, host: HostId) {
    let Ok(text) = std::fs::read(directory.join(LIST)) else { return };
    let paths: Vec<PathBuf> = serde_json::from_slice(&text).unwrap_or_default();
    for path in paths {
        if let Err(error) = undo_one(&path, workload, host) {
            tracing::warn!(path = %path.display(), %error, "half a copy of a disk stays behind");
        }
    }
}

fn undo_one(path: &Path, workload: WorkloadId, host: HostId) -> Result<(), DiskError> {
    let Some(note) = holder::read_note(path)? else { return Ok(()) };
    let ours = note.holder.workload == workload && note.holder.host == host;
    if !ours || note.state != State::Arriving {
        return Ok(());
    }
    if !note.made {
        // It was an old copy before, and is one that nobody may use all the more.
        return holder::write_note(path, &note.becoming(State::Moved), false);
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("delete", path)(e)),
        _ => {}
    }
    holder::delete_note(path)
}
