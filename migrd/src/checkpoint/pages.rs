//! Snapshots in the chunks and states that also go over the wire: those of VMs, and of
//! process trees before they had a layout of their own.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | version, name, kind, streams, configuration; with a CRC-32 |
//! | `state.bin` | what `Workload::save` gave |
//! | `chunks.bin` | batches, framed as on a lane (`docs/protocol.md`) |

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::chunks::Chunks;
use super::hashed::Hashed;
use super::{
    CHUNKS, CheckpointError, How, MANIFEST, STATE, Written, arrive, blocking, carry, damaged,
    io_error, open_plain, read_small, seal, sync_names, unfit,
};
use crate::migration::destination::Host;
use crate::registry::{FrozenWork, Registry, RegistryError, Saving, Status};
use crate::units::WorkloadId;
use crate::wire::file::{FileError, FileLane};
use crate::workload::{
    Chain, ChunkSink, Kind, Manifest, StreamKey, StreamSpec, Workload, WorkloadError,
};

/// Version of the layout.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
pub(super) struct OnDisk {
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
    /// BLAKE3 of `chunks.bin`; none in the manifests of older versions of migr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chunks_blake3: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct OnDiskStream {
    key: u32,
    name: String,
    length: u64,
}

/// Reads what is beside the manifest.
pub(super) fn open(
    directory: &Path,
    manifest: serde_json::Value,
) -> Result<(OnDisk, Vec<u8>), CheckpointError> {
    let on_disk: OnDisk = serde_json::from_value(manifest).map_err(|e| damaged(directory, e))?;
    let state = read_small(&directory.join(STATE))?;
    if state.len() as u64 != on_disk.state_bytes || crc32fast::hash(&state) != on_disk.state_crc32 {
        return Err(damaged(directory, "its state.bin is damaged"));
    }
    Ok((on_disk, state))
}

/// Writes a snapshot into `directory`, which is empty: what was written, and why the
/// workload does not go on if it does not.
///
/// # Errors
/// When the snapshot was not written; the caller removes what of it is there.
pub(super) async fn write(
    registry: &Registry,
    status: Status,
    directory: &Path,
    how: How,
) -> Result<(Written, Option<RegistryError>), CheckpointError> {
    let name = status.identity.name.clone();
    let place = directory.to_owned();
    let (report, reported) = tokio::sync::oneshot::channel();
    let work: FrozenWork = Box::new(move |workload: &mut dyn Workload| {
        Box::pin(async move {
            let written = write_frozen(&status, workload, &place).await;
            let failed = written.is_err();
            let _ = report.send(written);
            if failed { Err(WorkloadError::new("the snapshot was not written")) } else { Ok(()) }
        })
    });
    let carry = carry(how.process, Chain::default());
    let saving = Saving { carry, files: None, onto: String::new(), ends: how.ends };
    let frozen = registry.checkpoint(&name, saving, work).await;
    match (reported.await, frozen) {
        (Ok(Ok((bytes, pages))), Ok(paused)) => Ok((Written { bytes, pages, paused }, None)),
        (Ok(Ok((bytes, pages))), Err(error)) => {
            Ok((Written { bytes, pages, paused: Duration::ZERO }, Some(error)))
        }
        (Ok(Err(error)), _) => Err(error),
        (Err(_), Err(error)) => Err(error.into()),
        (Err(_), Ok(_)) => Err(RegistryError::ShuttingDown.into()),
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
        let (batches, chunk_bytes, hash) = out.finish()?;
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
            chunks_blake3: Some(hash),
        };
        let manifest = seal(&on_disk).map_err(|e| damaged(&place, e))?;
        write_whole(&place.join(MANIFEST), &manifest)?;
        sync_names(&place)?;
        let bytes = chunk_bytes + (state.len() + manifest.len()) as u64;
        Ok((bytes, pages))
    })
    .await
}

fn to_disk(spec: &StreamSpec) -> OnDiskStream {
    let StreamSpec { key, name, length, used: _ } = spec;
    OnDiskStream { key: key.0, name: name.clone(), length: *length }
}

/// Writes a file that is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let part = path.with_extension("part");
    let write = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&part);
        io_error("write", path)(e)
    })
}

/// Starts a new workload from the snapshot in `directory`, whose manifest was read.
///
/// # Errors
/// When the snapshot is damaged, or this host can't have it; nothing is left.
pub(super) async fn restore(
    registry: &Registry,
    directory: &Path,
    name: Option<String>,
    on_disk: OnDisk,
    state: Vec<u8>,
) -> Result<Status, CheckpointError> {
    let expected = Expected { batches: on_disk.batches, hash: on_disk.chunks_blake3.clone() };
    let manifest = manifest(on_disk, name);
    let engine = registry.engine(manifest.kind).ok_or(RegistryError::NoEngine(manifest.kind))?;
    if let Some(error) = unfit(engine.check(&manifest).await) {
        return Err(error);
    }
    let claim = registry.claim_new(&manifest)?;
    let arriving = engine.prepare(&manifest).await?;
    let sink = arriving.chunks();
    let (path, streams) = (directory.join(CHUNKS), manifest.streams.clone());
    let filled = async {
        let read =
            tokio::task::spawn_blocking(move || load(&path, &streams, sink, &expected)).await;
        read.unwrap_or_else(|e| Err(damaged(directory, format!("reading it failed: {e}"))))?;
        Ok(state)
    };
    let status = arrive(registry, &manifest, arriving, filled).await;
    drop(claim);
    status
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
        follows: false,
    }
}

/// What `chunks.bin` is to be.
struct Expected {
    batches: u64,
    hash: Option<String>,
}

fn load(
    path: &Path,
    streams: &[StreamSpec],
    sink: Arc<dyn ChunkSink>,
    expected: &Expected,
) -> Result<(), CheckpointError> {
    let directory = path.parent().unwrap_or(path);
    let mut file = Hashed::new(open_plain(path)?);
    let applied = FileLane::new(streams, sink).read(&mut file).map_err(|e| match e {
        FileError::Io(e) => io_error("read", path)(e),
        FileError::Batch(e) => damaged(directory, e),
    })?;
    if applied != expected.batches {
        let why = format!("{applied} of {} batches are there", expected.batches);
        return Err(damaged(directory, why));
    }
    let (_, hash) = file.finish();
    if expected.hash.as_ref().is_some_and(|expected| *expected != hash) {
        return Err(damaged(directory, "its chunks.bin is not the one that was written with it"));
    }
    Ok(())
}
