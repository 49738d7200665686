//! Whether a path still leads to the image that a VM has open.
//!
//! An image that is renamed, or put in place of another, stays open where it was. But
//! whoever opens the path after that gets another disk, maybe of the same size.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use migr_proto::v1::DiskConfig;

use super::error::DiskError;

/// What tells files apart: of a device its number, as it may have several names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Identity {
    File { device: u64, inode: u64 },
    Device { number: u64 },
}

impl Identity {
    fn of(found: &Metadata) -> Self {
        if found.file_type().is_block_device() {
            return Self::Device { number: found.rdev() };
        }
        Self::File { device: found.dev(), inode: found.ino() }
    }
}

/// What the process `pid` has open (proc(5), `/proc/PID/fd`).
pub(super) fn open_in(pid: u32) -> Result<BTreeSet<Identity>, DiskError> {
    let directory = PathBuf::from(format!("/proc/{pid}/fd"));
    let failed = |source| DiskError::Io { what: "look for", path: directory.clone(), source };
    let mut open = BTreeSet::new();
    for entry in fs::read_dir(&directory).map_err(failed)? {
        match fs::metadata(entry.map_err(failed)?.path()) {
            Ok(found) => drop(open.insert(Identity::of(&found))),
            // Closed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(open)
}

/// Whether the path of `disk` leads to one of those that are `open`.
///
/// # Errors
/// When it does not.
pub(super) fn check(disk: &DiskConfig, open: &BTreeSet<Identity>) -> Result<(), DiskError> {
    let path = Path::new(&disk.path);
    let there = match fs::metadata(path) {
        Ok(found) => open.contains(&Identity::of(&found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(source) => {
            return Err(DiskError::Io { what: "look at", path: path.to_owned(), source });
        }
    };
    if there { Ok(()) } else { Err(DiskError::Strayed { path: path.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_path_that_leads_to_another_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.img");
        fs::write(&path, [0; 512]).unwrap();
        let disk = DiskConfig { path: path.display().to_string(), read_only: false, bytes: 512 };
        let held = File::open(&path).unwrap();
        let open = open_in(std::process::id()).unwrap();
        check(&disk, &open).unwrap();
        let link = directory.path().join("link.img");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        check(&DiskConfig { path: link.display().to_string(), ..disk.clone() }, &open).unwrap();
        fs::rename(&path, directory.path().join("b.img")).unwrap();
        assert!(matches!(check(&disk, &open), Err(DiskError::Strayed { .. })), "nothing is there");
        fs::write(&path, [0; 512]).unwrap();
        let error = check(&disk, &open).unwrap_err();
        assert!(error.to_string().contains("a.img"), "{error}");
        drop(held);
    }
}
