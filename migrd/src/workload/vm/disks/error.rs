//! Why a disk can't be had, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::workload::{Problem, WorkloadError};

/// A disk can't be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Nothing is there.
    #[error("the disk image {} is not there", path.display())]
    Missing {
        /// Where.
        path: PathBuf,
    },
    /// It can't be opened or used.
    #[error("cannot {what} the disk image {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something else is there.
    #[error("{} is neither a file nor a block device, so it can't be a disk", path.display())]
    NotAnImage {
        /// Where.
        path: PathBuf,
    },
    /// Not a size that a disk can have.
    #[error("{} has {bytes} bytes: a disk has a multiple of 512 bytes, at least 512", path.display())]
    OddSize {
        /// Where.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Not the size that the VM knows.
    #[error("{} has {found} bytes and the VM's disk has {bytes}", path.display())]
    SizeDiffers {
        /// Where.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The VM's.
        bytes: u64,
    },
    /// Somebody writes to it, or reads what this VM would write to.
    #[error("the disk image {} is in use by {holder}", path.display())]
    Locked {
        /// Where.
        path: PathBuf,
        /// Who has it.
        holder: String,
        /// The note that says so, where that is all there is to see of it.
        note: Option<PathBuf>,
    },
    /// An old copy.
    #[error(
        "{} is the copy that {holder} left behind when it took its disks to another host",
        path.display()
    )]
    Stale {
        /// Where.
        path: PathBuf,
        /// Who left it.
        holder: String,
        /// The note that says so.
        note: PathBuf,
    },
    /// Half a copy.
    #[error("{} is a copy of a disk of {holder} that never came whole", path.display())]
    Incomplete {
        /// Where.
        path: PathBuf,
        /// Whose it would have been.
        holder: String,
        /// The note that says so.
        note: PathBuf,
    },
    /// The note beside the image says nothing that can be understood.
    #[error("{}, which says who holds the disk image beside it, is damaged", note.display())]
    DamagedNote {
        /// The note.
        note: PathBuf,
    },
    /// The note beside the image can't be read or written.
    #[error("cannot {what} {}, which says who holds the disk image beside it: {source}", note.display())]
    Note {
        /// What was tried.
        what: &'static str,
        /// The note.
        note: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A copy would go where something is.
    #[error("{} is there already, and is no copy that this workload left behind", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// A copy would be made among devices.
    #[error("{} is no place for a copy of a disk: it is below /dev", path.display())]
    Device {
        /// Where.
        path: PathBuf,
    },
    /// There is no directory for a copy.
    #[error("{}, where a copy of a disk would go, is not a directory", directory.display())]
    NoDirectory {
        /// Where.
        directory: PathBuf,
    },
    /// The file system is too full for a copy.
    #[error("the copies of its disks need {needed} MiB in {} and {free} MiB are free", directory.display())]
    NoSpace {
        /// Where.
        directory: PathBuf,
        /// MiB that would be written.
        needed: u64,
        /// MiB that are free.
        free: u64,
    },
    /// The VM has another file open than the one that is there by now.
    #[error(
        "{} does not lead to the disk image any more that the VM has open under that name",
        path.display()
    )]
    Strayed {
        /// Where.
        path: PathBuf,
    },
    /// A read-only image that was there is another one.
    #[error("the read-only disk image {} differs from the source's", path.display())]
    Differs {
        /// Where.
        path: PathBuf,
    },
}

impl DiskError {
    /// Its name for scripts, as a destination says it, or a source of its own disks.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "destination-disk-missing",
            Self::OddSize { .. } | Self::SizeDiffers { .. } => "destination-disk-size",
            Self::Locked { .. } => "destination-disk-locked",
            Self::Stale { .. } | Self::Incomplete { .. } => "destination-disk-stale",
            Self::Exists { .. } => "destination-disk-exists",
            Self::NoSpace { .. } => "destination-disk-space",
            Self::Differs { .. } => "destination-disk-differs",
            Self::Strayed { .. } => "source-disk-strayed",
            Self::Io { .. }
            | Self::NotAnImage { .. }
            | Self::DamagedNote { .. }
            | Self::Note { .. }
            | Self::NoDirectory { .. }
            | Self::Device { .. } => "destination-disk-unusable",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Missing { .. } => "make the image reachable there by the same path; a move can \
                                     take it along with --copy-disks"
                .into(),
            Self::Io { .. } | Self::NotAnImage { .. } => {
                "name a raw image or a block device that migrd may open".into()
            }
            Self::OddSize { .. } => "give the image a size that is a multiple of 512 bytes".into(),
            Self::SizeDiffers { .. } => {
                "both hosts must reach the same image by that path; else use --copy-disks".into()
            }
            Self::Locked { note: None, .. } => "stop what uses it, or name another image".into(),
            Self::Locked { note: Some(note), .. } => format!(
                "stop it there, or, if that host is gone for good, delete {}",
                note.display()
            ),
            Self::Stale { note, .. } | Self::Incomplete { note, .. } => format!(
                "delete it and {}; where hosts share no storage, move with --copy-disks",
                note.display()
            ),
            Self::DamagedNote { note } => {
                format!("make sure that nothing uses the image, then delete {}", note.display())
            }
            Self::Note { .. } => "let migrd read and write in the image's directory".into(),
            Self::Exists { .. } => "where both hosts reach the same image leave out --copy-disks; \
                                    else move what is there away"
                .into(),
            Self::NoDirectory { .. } => "make the directory there".into(),
            Self::Device { .. } => {
                "block devices are not copied: share them, or use image files".into()
            }
            Self::NoSpace { .. } => "make room there".into(),
            Self::Strayed { .. } => {
                "bring that file back to its path (it is still open), or stop the VM".into()
            }
            Self::Differs { .. } => "remove it at the destination, so that it is copied".into(),
        }
    }

    /// As a plan tells it.
    #[must_use]
    pub fn problem(&self) -> Problem {
        Problem::new(self.code(), self.to_string(), self.remedy())
    }
}

impl From<DiskError> for WorkloadError {
    fn from(error: DiskError) -> Self {
        Self::new(format!("{error}; {}", error.remedy()))
    }
}
