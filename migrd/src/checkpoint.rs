//! Snapshot directories: a workload on disk. A process tree is there in CRIU's own
//! files ([`tree`]), others in the chunks and states that also go over the wire ([`pages`]).
//!
//! The manifest is written last, under its final name: a directory without one
//! is not a snapshot.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::migration::destination::identity;
use crate::registry::{Registry, Status};
use crate::workload::{Arriving, Carry, Chain, Manifest, ProcessOptions, WorkloadError};

mod chunks;
mod directory;
mod error;
mod hashed;
mod pages;
mod plan;
mod tree;

pub use error::CheckpointError;
pub use plan::plan;

use error::{damaged, io_error, unfit};

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.bin";
const CHUNKS: &str = "chunks.bin";
/// The newest layout.
const NEWEST: u32 = tree::CHAINED;
/// The longest manifest and state that are read, in bytes.
const MAX_SMALL: u64 = 64 << 20;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes, of all files.
    pub bytes: u64,
    /// Pages that held something.
    pub pages: u64,
    /// How long the workload stood still.
    pub paused: Duration,
}

/// Without its disks: they are no part of a snapshot.
fn carry(process: ProcessOptions, chain: Chain) -> Carry {
    Carry { to_files: true, chain, process, ..Carry::default() }
}

/// How a snapshot is made.
#[derive(Clone, Debug, Default)]
pub struct How {
    /// What may be done to a process tree for that.
    pub process: ProcessOptions,
    /// The workload ends once the snapshot is complete; otherwise it goes on.
    pub ends: bool,
    /// A snapshot that it builds on: only what memory has changed since is written.
    pub parent: Option<PathBuf>,
}

/// Writes a snapshot of the workload `name` to `directory`, which is made. The
/// workload stands still meanwhile.
///
/// # Errors
/// When it is not here, or can't be written; nothing is then left and it runs. When it
/// was written and the workload neither goes on nor ends as it should; the snapshot is
/// complete then.
pub async fn write(
    registry: &Registry,
    name: &str,
    directory: &Path,
    how: How,
) -> Result<Written, CheckpointError> {
    let status = registry.find(name)?;
    let onto = tree::Onto::find(how.parent.as_deref(), directory).await?;
    let looked = registry.look(name, carry(how.process, onto.chain())).await?;
    let unfit = onto.problem(looked.saves_files);
    let mut found = looked.problems.into_iter().chain(unfit);
    if let Some(first) = found.next() {
        return Err(CheckpointError::Refused { first, more: found.count() });
    }
    let made = make(directory)?;
    let written = if looked.saves_files {
        tree::write(registry, status, directory, how, onto).await
    } else {
        pages::write(registry, status, directory, how).await
    };
    match written {
        Ok((written, None)) => Ok(written),
        Ok((_, Some(error))) => Err(error.into()),
        Err(error) => {
            made.unmake(directory);
            Err(error)
        }
    }
}

/// What of the directory was there before.
struct Made {
    directory: bool,
}

impl Made {
    fn unmake(&self, directory: &Path) {
        tree::remove(directory);
        for file in [MANIFEST, STATE, CHUNKS] {
            let _ = fs::remove_file(directory.join(file));
        }
        if self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn make(directory: &Path) -> Result<Made, CheckpointError> {
    // Guest memory is nobody else's to read.
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => Ok(Made { directory: true }),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let entries = fs::read_dir(directory).map_err(io_error("read", directory))?;
            if entries.count() > 0 {
                return Err(CheckpointError::NotEmpty(directory.display().to_string()));
            }
            Ok(Made { directory: false })
        }
        Err(e) => Err(io_error("make", directory)(e)),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, CheckpointError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(WorkloadError::caused("the work on the snapshot failed", error).into()),
    }
}

/// Makes the names in `directory`, and its own, outlive a crash of the host:
/// syncing a file does not do that for its name (fsync(2)).
fn sync_names(directory: &Path) -> Result<(), CheckpointError> {
    for directory in [Some(directory), directory.parent()].into_iter().flatten() {
        let synced = File::open(directory).and_then(|opened| opened.sync_all());
        synced.map_err(io_error("write", directory))?;
    }
    Ok(())
}

/// Opens a file of a snapshot. Anything but a plain file, a pipe say, might
/// hold the reader for ever.
fn open_plain(path: &Path) -> Result<File, CheckpointError> {
    let mut options = fs::OpenOptions::new();
    let opened = options.read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let file = opened.map_err(io_error("read", path))?;
    if file.metadata().map_err(io_error("read", path))?.is_file() {
        return Ok(file);
    }
    Err(damaged(path.parent().unwrap_or(path), format!("{} is not a file", path.display())))
}

fn read_small(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes = Vec::new();
    let file = open_plain(path)?;
    file.take(MAX_SMALL).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    Ok(bytes)
}

/// The manifest with a checksum over it: CRC-32 (IEEE) of its members, sorted
/// by name and without white space.
#[derive(Serialize, Deserialize)]
struct SealedManifest {
    crc32: u32,
    manifest: serde_json::Value,
}

fn seal(on_disk: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let manifest = serde_json::to_value(on_disk)?;
    let crc32 = crc32fast::hash(&serde_json::to_vec(&manifest)?);
    serde_json::to_vec_pretty(&SealedManifest { crc32, manifest })
}

/// What a directory holds, by its manifest.
enum Layout {
    /// With its state.
    Pages(Box<pages::OnDisk>, Vec<u8>),
    Tree(Box<tree::OnDisk>),
}

/// Reads the manifest and, where it has one beside it, the state.
fn open(directory: &Path) -> Result<Layout, CheckpointError> {
    let bytes = read_small(&directory.join(MANIFEST)).map_err(|error| match error {
        CheckpointError::Io { source, .. }
            if source.kind() == io::ErrorKind::NotFound && directory.is_dir() =>
        {
            damaged(directory, "it has no manifest.json: it is none, or was not written to its end")
        }
        error => error,
    })?;
    let SealedManifest { crc32, manifest } =
        serde_json::from_slice(&bytes).map_err(|e| damaged(directory, e))?;
    let plain = serde_json::to_vec(&manifest).map_err(|e| damaged(directory, e))?;
    if crc32fast::hash(&plain) != crc32 {
        return Err(damaged(directory, "its manifest.json is damaged"));
    }
    // The version first: a newer manifest may look different.
    let version = manifest.get("version").and_then(serde_json::Value::as_u64);
    match version.and_then(|v| u32::try_from(v).ok()) {
        Some(version) if version > NEWEST => {
            let path = directory.display().to_string();
            return Err(CheckpointError::Newer { path, version });
        }
        Some(tree::VERSION | tree::CHAINED) => {
            let on_disk = serde_json::from_value(manifest).map_err(|e| damaged(directory, e))?;
            return Ok(Layout::Tree(Box::new(on_disk)));
        }
        Some(_) => {}
        None => return Err(damaged(directory, "its manifest has no version")),
    }
    let (on_disk, state) = pages::open(directory, manifest)?;
    Ok(Layout::Pages(Box::new(on_disk), state))
}

/// Starts a new workload from the snapshot in `directory`, under `name` or the
/// name it had. It has an id of its own: the snapshot can be used again.
///
/// # Errors
/// When the snapshot is damaged, or this host can't have it; nothing is left.
pub async fn restore(
    registry: &Registry,
    directory: &Path,
    name: Option<String>,
) -> Result<Status, CheckpointError> {
    let place = directory.to_owned();
    let opened = tokio::task::spawn_blocking(move || open(&place)).await;
    let layout =
        opened.unwrap_or_else(|e| Err(damaged(directory, format!("reading it failed: {e}"))))?;
    match layout {
        Layout::Pages(on_disk, state) => {
            pages::restore(registry, directory, name, *on_disk, state).await
        }
        Layout::Tree(on_disk) => tree::restore(registry, directory, name, *on_disk).await,
    }
}

/// Makes a workload that stands still of what is prepared, when `filled` has given it
/// its streams and says its state.
async fn arrive(
    registry: &Registry,
    manifest: &Manifest,
    mut arriving: Box<dyn Arriving>,
    filled: impl Future<Output = Result<Vec<u8>, CheckpointError>>,
) -> Result<Status, CheckpointError> {
    let loaded = async {
        let state = filled.await?;
        arriving.load(&state).await?;
        arriving.start(true).await?;
        Ok::<(), CheckpointError>(())
    };
    match loaded.await {
        Ok(()) => Ok(registry.create(identity(manifest), arriving.arrived()).await?),
        Err(error) => {
            arriving.discard().await;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests;
