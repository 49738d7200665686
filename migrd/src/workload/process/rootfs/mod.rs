//! The root file system of a container that travels with it.
//!
//! Owns how one is read ([`walk`], [`leaving`]), how it becomes one stream
//! ([`extents`]), what may be in it ([`list`], [`attributes`]), and how it is made at a
//! destination ([`landing`], [`make`]) and deleted ([`remove`]). May not touch
//! processes, CRIU or runc, and writes to nothing but the directory of migrd's own that
//! [`place_of`] names.
//!
//! The list of what is there goes with the offer; the content of its files follows
//! while the container runs. When it stands still it is looked through once more, and
//! what has changed follows ([`changes`]), together with the list of that.

mod attributes;
mod changes;
mod extents;
mod landing;
mod leaving;
mod list;
mod make;
mod remove;
mod walk;

use std::io;
use std::path::{Path, PathBuf};

pub use landing::{Landing, arrived, problems};
pub use leaving::Leaving;
pub use remove::remove;

use super::failed;
use crate::units::PAGE_SIZE;
use crate::workload::{StreamKey, StreamSpec, WorkloadError};

/// The stream of a root file system.
pub const ROOTFS_STREAM: StreamKey = StreamKey(65);
/// What of the stream is before the content of files, in pages: the changes.
const LIST_PAGES: u64 = 4096;
/// The version of the list of changes.
const VERSION: u32 = 1;
/// The longest list in an offer (bytes): what else a container needs goes with it.
const MAX_LIST_BYTES: usize = 16 << 20;
/// The most files, directories and all others.
const MAX_NODES: usize = 262_144;
/// The longest stream, in pages: 1 TiB. Sets of pages have a bit for each.
const MAX_PAGES: u64 = 1 << 28;

/// Where the root file systems of a daemon are that came with their containers.
#[must_use]
pub fn places(directory: &Path) -> PathBuf {
    let state = directory.parent().and_then(Path::parent);
    state.unwrap_or(Path::new("/")).join("rootfs")
}

/// The place of the container that lives in `directory`.
#[must_use]
pub fn place_of(directory: &Path) -> PathBuf {
    places(directory).join(directory.file_name().unwrap_or_default())
}

/// The root file system in a place.
#[must_use]
pub fn root_in(place: &Path) -> PathBuf {
    place.join("root")
}

/// Something about a root file system that keeps it from travelling, or from arriving.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The system.
    #[error("cannot {what} {path:?} of the root file system: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With what, relative to the root.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// It has something that does not travel.
    #[error("its root file system can't be sent: {what}")]
    Unfit {
        /// For scripts.
        code: &'static str,
        /// What.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// It has changed too much.
    #[error(
        "its root file system has grown while it was about to move: {what}; try again, or have \
         it write less meanwhile"
    )]
    Grown {
        /// How.
        what: String,
    },
    /// What a peer says of it can't be.
    #[error("what was sent of the root file system is not usable: {0}")]
    Odd(String),
}

impl From<RootfsError> for WorkloadError {
    fn from(error: RootfsError) -> Self {
        Self::new(error.to_string())
    }
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::System { what, path, source }
}

/// The same of what nix says.
fn refused(what: &'static str, path: &Path) -> impl FnOnce(nix::Error) -> RootfsError {
    let told = system(what, path);
    move |error| told(error.into())
}

/// How many pages that many bytes take.
fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

/// Devices that a container may have: of every one, or of its specification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices(Vec<(bool, u32, u32)>);

/// What runc gives to every container (OCI runtime specification, "Default Devices"):
/// `null`, `zero`, `full`, `random`, `urandom`, `tty`, `console`, `ptmx`.
const DEFAULT_DEVICES: [(u32, u32); 8] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];

impl Devices {
    /// The usual ones, and those of a specification: whether it is a block device,
    /// major, minor.
    pub fn and(more: impl IntoIterator<Item = (bool, u32, u32)>) -> Self {
        let usual = DEFAULT_DEVICES.into_iter().map(|(major, minor)| (false, major, minor));
        Self(usual.chain(more).collect())
    }

    fn has(&self, block: bool, major: u32, minor: u32) -> bool {
        self.0.contains(&(block, major, minor))
    }
}

/// The stream, of so many pages; `used` bytes of it need room on a disk.
fn stream_spec(pages: u64, used: u64) -> StreamSpec {
    StreamSpec { key: ROOTFS_STREAM, name: "rootfs".into(), length: pages * PAGE_SIZE, used }
}

/// Does what waits for a disk on a thread of its own.
///
/// # Errors
/// When it fails, or panics.
pub async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RootfsError> + Send + 'static,
) -> Result<T, WorkloadError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Into::into),
        Err(error) => Err(failed("work on its root file system")(io::Error::other(error))),
    }
}

#[cfg(test)]
mod tests;
