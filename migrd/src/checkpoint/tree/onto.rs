//! Snapshots that build on another: finding that one when the next is written, and all
//! of them when the last is read.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::directory::Place;
use super::super::{
    CheckpointError, Layout, MANIFEST, blocking, damaged, io_error, open, read_small,
};
use super::read::check_images;
use super::{CHAINED, IMAGES, OnDisk, OnDiskFile};
use crate::units::SnapshotId;
use crate::workload::{Chain, Problem};

/// The longest chain that is read.
const LONGEST: u32 = 32;

/// What a manifest says of the snapshot that its own builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct OnDiskParent {
    /// Its directory, relative to the snapshot's own.
    directory: String,
    id: SnapshotId,
    /// Of its manifest, which has those of all its files; in hexadecimal digits.
    manifest_blake3: String,
}

/// What a snapshot that is about to be written builds on.
#[derive(Debug)]
pub(in super::super) struct Onto {
    id: SnapshotId,
    parent: Option<OnDiskParent>,
}

impl Onto {
    /// That of a snapshot in `directory`, which need not be there, on top of the one in
    /// `parent`.
    ///
    /// # Errors
    /// When that is no snapshot that can be built on.
    pub(in super::super) async fn find(
        parent: Option<&Path>,
        directory: &Path,
    ) -> Result<Self, CheckpointError> {
        let id = SnapshotId::random();
        let Some(parent) = parent.map(Path::to_owned) else {
            return Ok(Self { id, parent: None });
        };
        let directory = directory.to_owned();
        let parent = blocking(move || parent_of(&parent, &directory)).await?;
        Ok(Self { id, parent: Some(parent) })
    }

    /// For the workload.
    pub(in super::super) fn chain(&self) -> Chain {
        Chain { id: Some(self.id), after: self.parent.as_ref().map(|parent| parent.id) }
    }

    /// What keeps a workload from it that saves files, or does not.
    pub(in super::super) fn problem(&self, saves_files: bool) -> Option<Problem> {
        (self.parent.is_some() && !saves_files).then(|| {
            let what = "only snapshots of process trees and containers build on others";
            Problem::new("chain-kind", what, "leave --parent out")
        })
    }

    pub(super) fn id(&self) -> SnapshotId {
        self.id
    }

    pub(super) fn parent(&self) -> Option<&OnDiskParent> {
        self.parent.as_ref()
    }

    /// Where the images before are, relative to the new ones; empty: there are none.
    pub(super) fn link(&self) -> String {
        self.parent.as_ref().map_or_else(String::new, OnDiskParent::link)
    }
}

impl OnDiskParent {
    /// One in a directory relative to the snapshot's own.
    #[cfg(test)]
    pub(super) fn of(directory: &str, id: SnapshotId, manifest_blake3: &str) -> Self {
        Self { directory: directory.into(), id, manifest_blake3: manifest_blake3.into() }
    }

    /// As CRIU's images have it.
    pub(super) fn link(&self) -> String {
        format!("../{}/{IMAGES}", self.directory)
    }
}

fn parent_of(parent: &Path, directory: &Path) -> Result<OnDiskParent, CheckpointError> {
    let manifest = read_small(&parent.join(MANIFEST)).map_err(|_| {
        damaged(parent, "it has no manifest.json that can be read, so nothing can build on it")
    })?;
    let id = match open(parent)? {
        Layout::Tree(on_disk) => on_disk.id,
        Layout::Pages(..) => None,
    };
    let id = id.ok_or_else(|| damaged(parent, "it is not one that others can build on"))?;
    let whole = |path: &Path| path.canonicalize().map_err(io_error("find", path));
    let absolute = std::path::absolute(directory).map_err(io_error("find", directory))?;
    let above = whole(absolute.parent().unwrap_or(Path::new("/")))?;
    let own = above.join(absolute.file_name().unwrap_or_default());
    let directory = relative(&own, &whole(parent)?);
    let directory = directory.to_str().map(str::to_owned);
    let directory = directory.ok_or_else(|| damaged(parent, "its path is no text"))?;
    let manifest_blake3 = blake3::hash(&manifest).to_hex().to_string();
    Ok(OnDiskParent { directory, id, manifest_blake3 })
}

/// The way from one directory to another; both are absolute and without links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let mut from = from.components().peekable();
    let mut to = to.components().peekable();
    while from.peek().is_some() && from.peek() == to.peek() {
        from.next();
        to.next();
    }
    let up = from.map(|_| Component::ParentDir);
    up.chain(to).collect()
}

/// The images of a snapshot that another one builds on.
pub(super) struct Older {
    pub(super) images: Place,
    pub(super) files: Vec<OnDiskFile>,
}

/// The snapshots that the one in `directory` builds on, the nearest first, each with all
/// files that it says. Their content is not looked at yet.
///
/// # Errors
/// When one is missing, or is another one by now.
pub(super) fn older(directory: &Path, on_disk: &OnDisk) -> Result<Vec<Older>, CheckpointError> {
    let mut all = Vec::new();
    let (mut place, mut next) = (directory.to_owned(), on_disk.parent.clone());
    while let Some(parent) = next {
        if all.len() as u64 >= u64::from(LONGEST) {
            return Err(damaged(directory, format!("it builds on more than {LONGEST} others")));
        }
        let below = place.join(&parent.directory);
        place = below.canonicalize().unwrap_or_else(|_| plain(&below));
        let wrong = |why: &str| {
            damaged(
                directory,
                format!("it builds on the snapshot in {}, which {why}", place.display()),
            )
        };
        let manifest = read_small(&place.join(MANIFEST));
        let manifest = manifest.map_err(|_| wrong("is not there"))?;
        if blake3::hash(&manifest).to_hex().as_str() != parent.manifest_blake3 {
            return Err(wrong("is another one by now: its manifest.json is not what it was"));
        }
        let Layout::Tree(found) = open(&place)? else { return Err(wrong("is of another kind")) };
        if found.id != Some(parent.id) {
            return Err(wrong("is another one by now"));
        }
        let images = Place::open(&place)?.below(IMAGES)?;
        check_images(&images, &found)?;
        let OnDisk { images: files, parent, .. } = *found;
        all.push(Older { images, files });
        next = parent;
    }
    Ok(all)
}

/// A path of a directory that is not there, without the steps up in it.
fn plain(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut plain, step| {
        match step {
            Component::ParentDir => drop(plain.pop()),
            step => plain.push(step),
        }
        plain
    })
}

/// Whether a manifest of that version may have a parent, or has to.
pub(super) fn fits(on_disk: &OnDisk) -> bool {
    (on_disk.version == CHAINED) == on_disk.parent.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_another_directory_goes_up_first() {
        let way = |from: &str, to: &str| {
            relative(Path::new(from), Path::new(to)).to_str().unwrap().to_owned()
        };
        assert_eq!(way("/snap/2", "/snap/1"), "../1");
        assert_eq!(way("/snap/2", "/other/deep/1"), "../../other/deep/1");
        assert_eq!(way("/snap/1/2", "/snap/1"), "..");
        assert_eq!(plain(Path::new("/snap/3/../2")), Path::new("/snap/2"));
    }
}
