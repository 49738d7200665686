//! Makes a new tree of a snapshot. Its files may be anybody's by now: each is checked
//! as it is read, and read once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use migr_proto::v1::{self as proto, process_image};
use prost::Message;

use super::super::directory::Place;
use super::super::{CHUNKS, CheckpointError, MAX_SMALL, STATE, arrive, blocking, damaged, unfit};
use super::onto::{Older, fits, older};
use super::{IMAGES, NEEDS, OnDisk, OnDiskFile, PARENT, read_through};
use crate::host_memory::HostMemory;
use crate::migration::destination::Host;
use crate::registry::{Registry, RegistryError, Status};
use crate::units::{PAGE_SIZE, WorkloadId};
use crate::wire::file::{FileError, FileLane};
use crate::workload::process::images::{FILES, WHOLE_BYTES, is_image_name};
use crate::workload::process::{MAX_IMAGE_STREAMS, image_spec, log_spec};
use crate::workload::{ChunkSink, Kind, Manifest, Problem, StreamKey, StreamSpec};

/// What all images may come to that are no streams (bytes).
const ALL_WHOLE_BYTES: u64 = 64 << 20;

/// A snapshot that has everything it says, each file as long as it says.
pub(super) struct Found {
    place: Place,
    images: Place,
    /// What it builds on, the nearest first.
    older: Vec<Older>,
    state: proto::ProcessState,
    needs: Vec<u8>,
    log: Vec<u8>,
}

/// Starts a new workload from the snapshot in `directory`, whose manifest was read.
///
/// # Errors
/// When the snapshot is damaged, or this host can't have it; nothing is left.
pub(in super::super) async fn restore(
    registry: &Registry,
    directory: &Path,
    name: Option<String>,
    on_disk: OnDisk,
) -> Result<Status, CheckpointError> {
    let path = directory.to_owned();
    let on_disk = Arc::new(on_disk);
    let checking = on_disk.clone();
    let found = blocking(move || check(&path, &checking)).await?;
    let streams = streams(&on_disk, &found);
    let manifest = manifest(&on_disk, name, &streams, found.needs.clone());
    let engine = registry.engine(manifest.kind).ok_or(RegistryError::NoEngine(manifest.kind))?;
    let mut problems = engine.check(&manifest).await;
    problems.extend(no_room(on_disk.images.iter().chain(found.older_files())));
    if let Some(error) = unfit(problems) {
        return Err(error);
    }
    let claim = registry.claim_new(&manifest)?;
    let arriving = engine.prepare(&manifest).await?;
    let sink = arriving.chunks();
    let filled = blocking(move || fill(&found, &on_disk, &streams, sink));
    let status = arrive(registry, &manifest, arriving, filled).await;
    drop(claim);
    status
}

pub(super) fn check(directory: &Path, on_disk: &OnDisk) -> Result<Found, CheckpointError> {
    let odd = |why: &str| damaged(directory, format!("its manifest {why}"));
    let OnDisk { version: _, name: _, kind, config: _, batches: _, files, images: _, .. } = on_disk;
    if !fits(on_disk) || !matches!(kind, Kind::Process | Kind::Container) {
        return Err(odd("is of another kind than its version"));
    }
    let [state, needs, log] = files.as_slice() else { return Err(odd("does not name its files")) };
    if [&state.name, &needs.name, &log.name] != [STATE, NEEDS, CHUNKS] {
        return Err(odd("does not name its files"));
    }
    let place = Place::open(directory)?;
    let below = place.below(IMAGES)?;
    check_images(&below, on_disk)?;
    let older = older(directory, on_disk)?;
    let state = small(&place, state)?;
    let state = proto::ProcessState::decode(state.as_slice())
        .map_err(|_| place.damaged(STATE, "can't be read"))?;
    let (needs, log) = (small(&place, needs)?, small(&place, log)?);
    Ok(Found { place, images: below, older, state, needs, log })
}

impl Found {
    fn older_files(&self) -> impl Iterator<Item = &OnDiskFile> {
        self.older.iter().flat_map(|older| &older.files)
    }

    /// The images by the round that they become: of the snapshot itself 0, of the oldest
    /// that it builds on 1.
    fn rounds<'a>(
        &'a self,
        on_disk: &'a OnDisk,
    ) -> impl Iterator<Item = (u32, &'a Place, &'a OnDiskFile)> {
        let own = on_disk.images.iter().map(|file| (0, &self.images, file));
        let rounds = (1..).zip(self.older.iter().rev());
        own.chain(rounds.flat_map(|(round, older)| {
            older.files.iter().map(move |file| (round, &older.images, file))
        }))
    }
}

/// Whether the images of a snapshot are those that its manifest names, each as long as it
/// says, and nothing else is with them.
pub(super) fn check_images(place: &Place, on_disk: &OnDisk) -> Result<(), CheckpointError> {
    let OnDisk { images, parent, .. } = on_disk;
    let mut wanted: BTreeSet<&str> = BTreeSet::new();
    let right = images.iter().all(|file| is_image_name(&file.name) && wanted.insert(&file.name));
    if !right || images.len() > FILES {
        return Err(damaged(place.path(), "its manifest names images that can't be"));
    }
    for name in place.names()? {
        // The manifest says where that leads. The link is only CRIU's.
        let is_link = name == PARENT && parent.is_some();
        if !is_link && !wanted.contains(name.as_str()) {
            return Err(place.damaged(&name, "does not belong to it"));
        }
    }
    for file in images {
        let (_, bytes) = place.plain(&file.name)?;
        right_length(place, file, bytes)?;
    }
    Ok(())
}

fn right_length(place: &Place, file: &OnDiskFile, bytes: u64) -> Result<(), CheckpointError> {
    let OnDiskFile { name, bytes: wanted, blake3: _ } = file;
    if bytes == *wanted {
        return Ok(());
    }
    Err(place.damaged(name, &format!("has {bytes} bytes, and {wanted} were written")))
}

fn other_content(place: &Place, name: &str) -> CheckpointError {
    place.damaged(name, "is damaged: its content is not what was written")
}

fn small(place: &Place, file: &OnDiskFile) -> Result<Vec<u8>, CheckpointError> {
    let (opened, bytes) = place.plain(&file.name)?;
    right_length(place, file, bytes)?;
    whole(place, file, &opened, MAX_SMALL)
}

fn whole(
    place: &Place,
    file: &OnDiskFile,
    opened: &File,
    limit: u64,
) -> Result<Vec<u8>, CheckpointError> {
    let mut content = Vec::new();
    let read = opened.take(limit).read_to_end(&mut content);
    read.map_err(place.failed("read", &file.name))?;
    right_length(place, file, content.len() as u64)?;
    if !file.is(blake3::hash(&content)) {
        return Err(other_content(place, &file.name));
    }
    Ok(content)
}

/// Which images become streams, by round and name.
pub(super) type Streams = BTreeMap<(u32, String), StreamSpec>;

/// Which images become streams: the largest.
pub(super) fn streams(on_disk: &OnDisk, found: &Found) -> Streams {
    let all = found.rounds(on_disk).map(|(round, _, file)| (round, file));
    let mut large: Vec<_> = all.filter(|(_, file)| file.bytes > WHOLE_BYTES).collect();
    large.sort_by_key(|(_, file)| std::cmp::Reverse(file.bytes));
    let longest = large.first().map_or(0, |(_, file)| file.bytes);
    let length = longest.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE);
    let named = large.into_iter().zip(0..MAX_IMAGE_STREAMS);
    let spec = |number| image_spec(number, length);
    named.map(|((round, file), number)| ((round, file.name.clone()), spec(number))).collect()
}

fn manifest(on_disk: &OnDisk, name: Option<String>, streams: &Streams, needs: Vec<u8>) -> Manifest {
    let mut images: Vec<_> = streams.values().cloned().collect();
    images.sort_by_key(|spec| spec.key);
    Manifest {
        workload: WorkloadId::random(),
        name: name.unwrap_or_else(|| on_disk.name.clone()),
        kind: on_disk.kind,
        streams: [vec![log_spec()], images].concat(),
        config: on_disk.config.clone(),
        memory_bytes: 0,
        cpus: 0,
        paused: false,
        created_unix_ms: crate::units::unix_ms(),
        needs,
        follows: false,
    }
}

/// The images are in memory until the processes have taken theirs.
fn no_room<'a>(images: impl Iterator<Item = &'a OnDiskFile>) -> Option<Problem> {
    let needed = images.fold(0u64, |sum, file| sum.saturating_add(file.bytes));
    let (_, available) = HostMemory::of_this_host().read();
    let what = format!("its images have {} MiB and {} MiB are free", needed >> 20, available >> 20);
    let remedy = "stop or move something away from this host, or restore it at another";
    (needed > available).then(|| Problem::new("memory", what, remedy))
}

/// Hands the log and the images over; the state that goes with them.
pub(super) fn fill(
    found: &Found,
    on_disk: &OnDisk,
    streams: &Streams,
    sink: Arc<dyn ChunkSink>,
) -> Result<Vec<u8>, CheckpointError> {
    let Found { place, images: _, older: _, state, needs: _, log } = found;
    let applied = FileLane::new(&[log_spec()], sink.clone()).read(log.as_slice());
    let applied = applied.map_err(|error| match error {
        FileError::Io(error) => place.failed("read", CHUNKS)(error),
        FileError::Batch(error) => place.damaged(CHUNKS, &format!("is damaged: {error}")),
    })?;
    if applied != on_disk.batches {
        let why = format!("has {applied} batches, and {} were written", on_disk.batches);
        return Err(place.damaged(CHUNKS, &why));
    }
    let (mut all_whole, mut wire) = (0u64, Vec::new());
    for (round, images, file) in found.rounds(on_disk) {
        let (opened, _) = images.plain(&file.name)?;
        let content = match streams.get(&(round, file.name.clone())) {
            Some(spec) => {
                stream(images, file, &opened, spec.key, sink.as_ref())?;
                process_image::Content::Stream(spec.key.0)
            }
            None => {
                all_whole = all_whole.saturating_add(file.bytes);
                if all_whole > ALL_WHOLE_BYTES {
                    return Err(images.damaged(&file.name, "is one of too many images"));
                }
                process_image::Content::Whole(whole(images, file, &opened, ALL_WHOLE_BYTES)?.into())
            }
        };
        let (name, length) = (file.name.clone(), file.bytes);
        wire.push(proto::ProcessImage { name, length, content: Some(content), round });
    }
    Ok(proto::ProcessState { images: wire, ..state.clone() }.encode_to_vec())
}

/// Copies an image into its stream.
fn stream(
    images: &Place,
    file: &OnDiskFile,
    opened: &File,
    key: StreamKey,
    sink: &dyn ChunkSink,
) -> Result<(), CheckpointError> {
    let read = read_through(opened, |at, bytes| {
        // Longer than it was when its stream was measured.
        sink.write(key, at, bytes).map_err(std::io::Error::other)
    });
    let (bytes, hash) = read.map_err(images.failed("copy", &file.name))?;
    right_length(images, file, bytes)?;
    if file.is(hash) { Ok(()) } else { Err(other_content(images, &file.name)) }
}
