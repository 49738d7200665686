//! Snapshot directories: a workload on disk, in the chunks and states that
//! also go over the wire.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | version, name, kind, streams, configuration; with a CRC-32 |
//! | `state.bin` | what `Workload::save` gave |
//! | `chunks.bin` | batches, framed as on a lane (`docs/protocol.md`) |
//!
//! The manifest is written last, under its final name: a directory without one
//! is not a snapshot.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::migration::destination::{Host, identity};
use crate::registry::{Registry, RegistryError, Status};
use crate::units::WorkloadId;
use crate::wire::file::{FileError, FileLane};
use crate::workload::{
    Carry, Kind, Manifest, Problem, ProcessOptions, StreamKey, StreamSpec, Workload, WorkloadError,
};

mod chunks;
mod plan;

pub use plan::plan;

use chunks::Chunks;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.bin";
const CHUNKS: &str = "chunks.bin";
/// Version of the directory's layout.
const VERSION: u32 = 1;
/// The longest manifest and state that are read, in bytes.
const MAX_SMALL: u64 = 64 << 20;

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
    /// It was written by a newer migr.
    #[error(
        "{path} is of snapshot version {version}, this migrd knows up to {VERSION}; use a newer migrd"
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

#[derive(Serialize, Deserialize)]
struct OnDisk {
    version: u32,
    name: String,
    kind: Kind,
    memory_bytes: u64,
    cpus: u32,
    streams: Vec<OnDiskStream>,
    config: Vec<u8>,
    state_bytes: u64,
    state_crc32: u32,
    batches: u64,
}

#[derive(Serialize, Deserialize)]
struct OnDiskStream {
    key: u32,
    name: String,
    length: u64,
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.display().to_string();
    move |source| CheckpointError::Io { what, path, source }
}

fn and_more(more: usize) -> String {
    if more == 0 {
        return String::new();
    }
    format!(" ({more} more: see `migctl checkpoint --dry-run`)")
}

/// Without its disks: they are no part of a snapshot.
fn carry(process: ProcessOptions) -> Carry {
    Carry { disks: false, process }
}

/// Writes a snapshot of the workload `name` to `directory`, which is made. The
/// workload stands still meanwhile and goes on. `process` is what may be done to
/// a process tree for that.
///
/// # Errors
/// When it is not here, or can't be written; nothing is then left.
pub async fn write(
    registry: &Registry,
    name: &str,
    directory: &Path,
    process: ProcessOptions,
) -> Result<Written, CheckpointError> {
    let status = registry.find(name)?;
    let mut found = registry.problems(name, carry(process)).await?.into_iter();
    if let Some(first) = found.next() {
        return Err(CheckpointError::Refused { first, more: found.len() });
    }
    let made = make(directory)?;
    let place = directory.to_owned();
    let (report, reported) = tokio::sync::oneshot::channel();
    let work: crate::registry::FrozenWork = Box::new(move |workload: &mut dyn Workload| {
        Box::pin(async move {
            let written = write_frozen(&status, workload, &place).await;
            let failed = written.is_err();
            let _ = report.send(written);
            if failed { Err(WorkloadError::new("the snapshot was not written")) } else { Ok(()) }
        })
    });
    let frozen = registry.checkpoint(name, carry(process), work).await;
    let written = match (reported.await, frozen) {
        (Ok(Ok((bytes, pages))), Ok(paused)) => Ok(Written { bytes, pages, paused }),
        (Ok(Err(error)), _) => Err(error),
        (_, Err(error)) => Err(error.into()),
        (Err(_), Ok(_)) => Err(RegistryError::ShuttingDown.into()),
    };
    if written.is_err() {
        made.unmake(directory);
    }
    written
}

/// What of the directory was there before.
struct Made {
    directory: bool,
}

impl Made {
    fn unmake(&self, directory: &Path) {
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

async fn write_frozen(
    status: &Status,
    workload: &mut dyn Workload,
    directory: &Path,
) -> Result<(u64, u64), CheckpointError> {
    let (streams, chunks) = (workload.streams(), workload.chunks());
    let mut out = Chunks::create(directory.join(CHUNKS), chunks).await?;
    let mut pages = 0;
    while let Some(part) = workload.rest().await? {
        pages += part.count();
        out = out.write(part).await?;
    }
    let state = workload.save().await?;
    let (place, status) = (directory.to_owned(), status.clone());
    blocking(move || {
        let (batches, chunk_bytes) = out.finish()?;
        write_whole(&place.join(STATE), &state)?;
        let identity = &status.identity;
        let on_disk = OnDisk {
            version: VERSION,
            name: identity.name.clone(),
            kind: identity.kind,
            memory_bytes: identity.memory_bytes,
            cpus: identity.cpus,
            streams: streams.iter().map(to_disk).collect(),
            config: identity.config.clone(),
            state_bytes: state.len() as u64,
            state_crc32: crc32fast::hash(&state),
            batches,
        };
        let manifest = seal(&on_disk).map_err(|e| damaged(&place, e))?;
        write_whole(&place.join(MANIFEST), &manifest)?;
        sync_names(&place)?;
        let bytes = chunk_bytes + (state.len() + manifest.len()) as u64;
        Ok((bytes, pages))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, CheckpointError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(WorkloadError::caused("the work on the snapshot failed", error).into()),
    }
}

fn to_disk(spec: &StreamSpec) -> OnDiskStream {
    let StreamSpec { key, name, length, used: _ } = spec;
    OnDiskStream { key: key.0, name: name.clone(), length: *length }
}

/// Writes a file that is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let part = path.with_extension("part");
    let write = || {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&part);
        io_error("write", path)(e)
    })
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

fn damaged(directory: &Path, why: impl ToString) -> CheckpointError {
    CheckpointError::Damaged { path: directory.display().to_string(), why: why.to_string() }
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

fn seal(on_disk: &OnDisk) -> serde_json::Result<Vec<u8>> {
    let manifest = serde_json::to_value(on_disk)?;
    let crc32 = crc32fast::hash(&serde_json::to_vec(&manifest)?);
    serde_json::to_vec_pretty(&SealedManifest { crc32, manifest })
}

/// Reads manifest and state.
fn open(directory: &Path) -> Result<(OnDisk, Vec<u8>), CheckpointError> {
    let bytes = read_small(&directory.join(MANIFEST))?;
    let SealedManifest { crc32, manifest } =
        serde_json::from_slice(&bytes).map_err(|e| damaged(directory, e))?;
    let plain = serde_json::to_vec(&manifest).map_err(|e| damaged(directory, e))?;
    if crc32fast::hash(&plain) != crc32 {
        return Err(damaged(directory, "its manifest.json is damaged"));
    }
    // The version first: a newer manifest may look different.
    let version = manifest.get("version").and_then(serde_json::Value::as_u64);
    match version.and_then(|v| u32::try_from(v).ok()) {
        Some(version) if version > VERSION => {
            let path = directory.display().to_string();
            return Err(CheckpointError::Newer { path, version });
        }
        Some(_) => {}
        None => return Err(damaged(directory, "its manifest has no version")),
    }
    let on_disk: OnDisk = serde_json::from_value(manifest).map_err(|e| damaged(directory, e))?;
    let state = read_small(&directory.join(STATE))?;
    if state.len() as u64 != on_disk.state_bytes || crc32fast::hash(&state) != on_disk.state_crc32 {
        return Err(damaged(directory, "its state.bin is damaged"));
    }
    Ok((on_disk, state))
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
    let (on_disk, state) =
        opened.unwrap_or_else(|e| Err(damaged(directory, format!("reading it failed: {e}"))))?;
    let batches = on_disk.batches;
    let manifest = manifest(on_disk, name);
    let engine = registry.engine(manifest.kind).ok_or(RegistryError::NoEngine(manifest.kind))?;
    if let Some(problem) = engine.check(&manifest).await.into_iter().next() {
        return Err(WorkloadError::new(problem.message).into());
    }
    let claim = registry.claim_new(&manifest)?;
    let mut arriving = engine.prepare(&manifest).await?;
    let loaded = async {
        let sink = arriving.chunks();
        let (path, streams) = (directory.join(CHUNKS), manifest.streams.clone());
        let read = tokio::task::spawn_blocking(move || load(&path, &streams, sink, batches)).await;
        read.unwrap_or_else(|e| Err(damaged(directory, format!("reading it failed: {e}"))))?;
        arriving.load(&state).await?;
        arriving.start(true).await?;
        Ok::<(), CheckpointError>(())
    };
    let status = match loaded.await {
        Ok(()) => registry.create(identity(&manifest), arriving.arrived()).await,
        Err(error) => {
            arriving.discard().await;
            return Err(error);
        }
    };
    drop(claim);
    Ok(status?)
}

fn manifest(on_disk: OnDisk, name: Option<String>) -> Manifest {
    let from_disk = |s: OnDiskStream| StreamSpec {
        key: StreamKey(s.key),
        name: s.name,
        length: s.length,
        used: 0,
    };
    Manifest {
        workload: WorkloadId::random(),
        name: name.unwrap_or(on_disk.name),
        kind: on_disk.kind,
        streams: on_disk.streams.into_iter().map(from_disk).collect(),
        config: on_disk.config,
        memory_bytes: on_disk.memory_bytes,
        cpus: on_disk.cpus,
        paused: false,
        created_unix_ms: crate::units::unix_ms(),
        needs: Vec::new(),
    }
}

fn load(
    path: &Path,
    streams: &[StreamSpec],
    sink: Arc<dyn crate::workload::ChunkSink>,
    batches: u64,
) -> Result<(), CheckpointError> {
    let directory = path.parent().unwrap_or(path);
    let file = open_plain(path)?;
    let applied = FileLane::new(streams, sink).read(file).map_err(|e| match e {
        FileError::Io(e) => io_error("read", path)(e),
        FileError::Batch(e) => damaged(directory, e),
    })?;
    if applied != batches {
        return Err(damaged(directory, format!("{applied} of {batches} batches are there")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
