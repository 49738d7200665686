//! Writes a tree's snapshot: CRIU its images, while the tree stands still, and this
//! the rest.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::super::chunks::Chunks;
use super::super::directory::Place;
use super::super::{
    CHUNKS, CheckpointError, How, MANIFEST, STATE, Written, blocking, carry, damaged, seal,
    sync_names,
};
use super::{
    CHAINED, IMAGES, IMAGES_PART, MANIFEST_PART, NEEDS, OnDisk, OnDiskFile, Onto, PARENT, VERSION,
    read_through,
};
use crate::registry::{FrozenWork, Registry, RegistryError, Saving, Status};
use crate::units::PAGE_SIZE;
use crate::workload::process::images::is_image_name;
use crate::workload::{Needing, Workload, WorkloadError};

/// How the names of images begin that hold memory.
const MEMORY: &str = "pages-";

/// A snapshot, while it is written.
struct Draft {
    place: Place,
    images: Place,
    status: Status,
    onto: Onto,
}

/// What of a tree is not in CRIU's images.
struct Content {
    state: Vec<u8>,
    needs: Needing,
    batches: u64,
}

/// Bytes and pages of memory in a complete snapshot.
#[derive(Clone, Copy)]
struct Size {
    bytes: u64,
    pages: u64,
}

/// What was done with a tree that stood still.
enum Done {
    /// It may go on: the rest can be done without it.
    Saved(Content),
    /// The snapshot is complete, and it may end.
    Sealed(Size),
}

/// Writes a snapshot of the tree of `status` into `directory`, which is empty. Gives
/// the snapshot's size, and how long the tree stood still or why it does not go on:
/// the snapshot is complete in both cases.
///
/// # Errors
/// When the snapshot was not written; the caller removes what of it is there.
pub(in super::super) async fn write(
    registry: &Registry,
    status: Status,
    directory: &Path,
    how: How,
    onto: Onto,
) -> Result<(Written, Option<RegistryError>), CheckpointError> {
    let place = Place::open(directory)?;
    let images = place.make(IMAGES_PART)?;
    let saving = Saving {
        carry: carry(how.process, onto.chain()),
        files: Some(images.descriptor()?),
        onto: onto.link(),
        ends: how.ends,
    };
    let name = status.identity.name.clone();
    let draft = Arc::new(Draft { place, images, status, onto });
    let (report, reported) = oneshot::channel();
    let (drafting, path) = (draft.clone(), directory.to_owned());
    let work: FrozenWork = Box::new(move |workload: &mut dyn Workload| {
        Box::pin(async move {
            let done = save(drafting, workload, &path, how.ends).await;
            let failed = done.is_err();
            let _ = report.send(done);
            if failed { Err(WorkloadError::new("the snapshot was not written")) } else { Ok(()) }
        })
    });
    let paused = registry.checkpoint(&name, saving, work).await;
    let size = match (reported.await, &paused) {
        (Ok(Ok(Done::Sealed(size))), _) => size,
        (Ok(Ok(Done::Saved(content))), _) => blocking(move || complete(&draft, content)).await?,
        (Ok(Err(error)), _) => return Err(error),
        (Err(_), Ok(_)) => return Err(RegistryError::ShuttingDown.into()),
        (Err(_), Err(_)) => {
            paused?;
            return Err(RegistryError::ShuttingDown.into());
        }
    };
    let Size { bytes, pages } = size;
    let (paused, error) = match paused {
        Ok(paused) => (paused, None),
        Err(error) => (Duration::ZERO, Some(error)),
    };
    Ok((Written { bytes, pages, paused }, error))
}

/// What has to be done while the tree stands still. One that is to end must not
/// before its snapshot would outlive a crash of the host.
async fn save(
    draft: Arc<Draft>,
    workload: &mut dyn Workload,
    directory: &Path,
    ends: bool,
) -> Result<Done, CheckpointError> {
    let needs = workload.needs();
    let mut out = Chunks::create(directory.join(CHUNKS), workload.chunks()).await?;
    while let Some(part) = workload.rest().await? {
        out = out.write(part).await?;
    }
    let state = workload.save().await?;
    blocking(move || {
        let (batches, ..) = out.finish()?;
        let content = Content { state, needs, batches };
        if ends { complete(&draft, content).map(Done::Sealed) } else { Ok(Done::Saved(content)) }
    })
    .await
}

/// Makes everything durable, and a snapshot of it.
fn complete(draft: &Draft, content: Content) -> Result<Size, CheckpointError> {
    let Draft { place, images, status, onto } = draft;
    let Content { state, needs, batches } = content;
    // Reads the files that it uses.
    let needs = needs().written;
    let mut image_files = Vec::new();
    for name in images.names()? {
        if name == PARENT && onto.parent().is_some() {
            continue;
        }
        if !is_image_name(&name) {
            return Err(images.damaged(&name, "is no image of CRIU's"));
        }
        image_files.push(hash(images, &name)?);
    }
    if onto.parent().is_some() && images.link(PARENT)? != onto.link() {
        return Err(images.damaged(PARENT, "does not lead to the images before"));
    }
    images.sync()?;
    place.rename(IMAGES_PART, IMAGES)?;
    place.write(STATE, &state)?;
    place.write(NEEDS, &needs)?;
    let files =
        vec![OnDiskFile::of(STATE, &state), OnDiskFile::of(NEEDS, &needs), hash(place, CHUNKS)?];
    let on_memory = image_files.iter().filter(|file| file.name.starts_with(MEMORY));
    let pages = on_memory.map(|file| file.bytes / PAGE_SIZE).sum();
    let bytes = files.iter().chain(&image_files).map(|file| file.bytes).sum::<u64>();
    let on_disk = OnDisk {
        version: if onto.parent().is_some() { CHAINED } else { VERSION },
        name: status.identity.name.clone(),
        kind: status.identity.kind,
        config: status.identity.config.clone(),
        batches,
        files,
        images: image_files,
        id: Some(onto.id()),
        parent: onto.parent().cloned(),
    };
    let manifest = seal(&on_disk).map_err(|e| damaged(place.path(), e))?;
    place.write(MANIFEST_PART, &manifest)?;
    place.rename(MANIFEST_PART, MANIFEST)?;
    sync_names(place.path())?;
    Ok(Size { bytes: bytes + manifest.len() as u64, pages })
}

/// Looks at a file that was just written, and makes it durable.
fn hash(place: &Place, name: &str) -> Result<OnDiskFile, CheckpointError> {
    let (file, _) = place.plain(name)?;
    let read = read_through(&file, |_, _| Ok::<_, std::io::Error>(()));
    let (bytes, hash) = read.map_err(place.failed("read", name))?;
    file.sync_all().map_err(place.failed("write", name))?;
    Ok(OnDiskFile { name: name.to_owned(), bytes, blake3: hash.to_hex().to_string() })
}
