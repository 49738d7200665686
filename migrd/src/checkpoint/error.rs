//! Why a snapshot could not be written or read.

use std::io;
use std::path::Path;

use super::NEWEST;
use crate::registry::RegistryError;
use crate::workload::{Problem, WorkloadError};

/// A snapshot could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or directory.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The directory is in use.
    #[error("{0} is there and not empty; name a directory that is not there yet")]
    NotEmpty(String),
    /// The workload can't be saved as it is.
    #[error("it can't be saved as it is: {}; {}{}", .first.message, .first.remedy, and_more(*.more))]
    Refused {
        /// What keeps it from that.
        first: Problem,
        /// How many problems there are beside it.
        more: usize,
    },
    /// It is not a snapshot, or damaged.
    #[error("{path} is not a usable snapshot: {why}")]
    Damaged {
        /// The directory.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// This host can't have it.
    #[error("this host can't have it: {}: {}; {}{}", .first.code, .first.message, .first.remedy,
        if *.more == 0 { String::new() } else { format!(" ({} more)", .more) })]
    Unfit {
        /// What it lacks.
        first: Problem,
        /// How many problems there are beside it.
        more: usize,
    },
    /// It was written by a newer migr.
    #[error(
        "{path} is of snapshot version {version}, this migrd knows up to {NEWEST}; use a newer migrd"
    )]
    Newer {
        /// The directory.
        path: String,
        /// Its version.
        version: u32,
    },
    /// The workload or this host.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
}

pub(super) fn io_error(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.display().to_string();
    move |source| CheckpointError::Io { what, path, source }
}

fn and_more(more: usize) -> String {
    if more == 0 {
        return String::new();
    }
    format!(" ({more} more: see `migctl checkpoint --dry-run`)")
}

pub(super) fn damaged(directory: &Path, why: impl ToString) -> CheckpointError {
    CheckpointError::Damaged { path: directory.display().to_string(), why: why.to_string() }
}

/// Why a host can't have what it was found to lack something for.
pub(super) fn unfit(problems: Vec<Problem>) -> Option<CheckpointError> {
    let mut problems = problems.into_iter();
    let first = problems.next()?;
    Some(CheckpointError::Unfit { first, more: problems.len() })
}
