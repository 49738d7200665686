//! Snapshots of process trees, in CRIU's own files.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | version, name, configuration, and of each other file length and BLAKE3; with a CRC-32 |
//! | `images/` | what CRIU wrote, and nothing else |
//! | `state.bin` | a `ProcessState` without its images |
//! | `needs.bin` | a `ProcessNeeds`: the files that it uses |
//! | `chunks.bin` | its log, in batches that are framed as on a lane |
//!
//! A snapshot may build on another, which has what its memory had before ([`onto`]). Its
//! `images` then have a link `parent` to those of the other.
//!
//! CRIU writes into `images.part`, which gets its name when all of it is on disk; the
//! manifest comes last.

mod onto;
mod read;
mod write;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

pub(super) use onto::Onto;
pub(super) use read::restore;
pub(super) use write::write;

use super::directory::Place;
use crate::units::SnapshotId;
use crate::workload::Kind;

/// Version of the layout, and of that of a snapshot that builds on another.
pub(super) const VERSION: u32 = 2;
pub(super) const CHAINED: u32 = 3;
/// What CRIU calls the link to the images before.
const PARENT: &str = "parent";
const IMAGES: &str = "images";
const IMAGES_PART: &str = "images.part";
const NEEDS: &str = "needs.bin";
const MANIFEST_PART: &str = "manifest.json.part";
/// How much is read at once (bytes).
const BUFFER: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
pub(super) struct OnDisk {
    version: u32,
    name: String,
    kind: Kind,
    config: Vec<u8>,
    /// In `chunks.bin`.
    batches: u64,
    /// `state.bin`, `needs.bin`, `chunks.bin`.
    files: Vec<OnDiskFile>,
    /// Those in `images`.
    images: Vec<OnDiskFile>,
    /// By which others that build on it know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<SnapshotId>,
    /// What it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<onto::OnDiskParent>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OnDiskFile {
    name: String,
    bytes: u64,
    /// In hexadecimal digits.
    blake3: String,
}

impl OnDiskFile {
    fn of(name: &str, content: &[u8]) -> Self {
        let blake3 = blake3::hash(content).to_hex().to_string();
        Self { name: name.to_owned(), bytes: content.len() as u64, blake3 }
    }

    fn is(&self, hash: blake3::Hash) -> bool {
        self.blake3 == hash.to_hex().as_str()
    }
}

/// Removes what of a tree's snapshot was begun in `directory`.
pub(super) fn remove(directory: &Path) {
    let Ok(place) = Place::open(directory) else { return };
    for part in [IMAGES_PART, IMAGES] {
        if let Err(error) = place.remove(part) {
            tracing::warn!(%error, "part of a snapshot that failed stays behind");
        }
    }
    for file in [NEEDS, MANIFEST_PART] {
        let _ = std::fs::remove_file(directory.join(file));
    }
}

/// Reads a file to its end, part by part; its length in bytes and its hash.
fn read_through<E: From<io::Error>>(
    mut file: &File,
    mut part: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(u64, blake3::Hash), E> {
    let (mut hasher, mut buffer, mut at) = (blake3::Hasher::new(), vec![0; BUFFER], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((at, hasher.finalize())),
            Ok(length) => {
                let bytes = &buffer[..length];
                hasher.update(bytes);
                part(at, bytes)?;
                at += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
