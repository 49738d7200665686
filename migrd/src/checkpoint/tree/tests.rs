//! Snapshots of trees without a tree: what is read back, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migr_proto::v1 as proto;
use prost::Message;

use super::super::directory::Place;
use super::super::{CHUNKS, STATE};
use super::onto::OnDiskParent;
use super::read::{check, fill, streams};
use super::*;
use crate::workload::process::images::Images;

/// CRIU's files, and of what they are.
const FILES: [(&str, usize, u8); 4] = [
    ("core-1.img", 900, 1),
    ("core-2.img", 900, 2),
    ("pages-1.img", 3 << 20, 3),
    ("pages-2.img", (1 << 20) + 17, 4),
];

struct Snapshot {
    directory: tempfile::TempDir,
    on_disk: OnDisk,
}

impl Snapshot {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir(root.join(IMAGES)).unwrap();
        let state = proto::ProcessState { version: 1, processes: 2, ..Default::default() };
        let small = [(STATE, state.encode_to_vec()), (NEEDS, b"needs".to_vec()), (CHUNKS, vec![])];
        let write = |path: PathBuf, name: &str, content: &[u8]| {
            fs::write(path, content).unwrap();
            OnDiskFile::of(name, content)
        };
        let files = small.iter().map(|(name, bytes)| write(root.join(name), name, bytes));
        let files = files.collect();
        let images = FILES.map(|(name, length, fill)| {
            write(root.join(IMAGES).join(name), name, &vec![fill; length])
        });
        let on_disk = OnDisk {
            version: VERSION,
            name: "job".into(),
            kind: Kind::Process,
            config: vec![1],
            batches: 0,
            files,
            images: images.to_vec(),
            id: Some(SnapshotId::random()),
            parent: None,
        };
        Self { directory, on_disk }
    }

    fn image(&self, name: &str) -> PathBuf {
        self.directory.path().join(IMAGES).join(name)
    }

    /// Reads it into `to`, as a restore does; the state.
    fn read(&self, to: &Path) -> Result<proto::ProcessState, String> {
        let found = check(self.directory.path(), &self.on_disk).map_err(|e| e.to_string())?;
        let streams = streams(&self.on_disk, &found);
        let capacity = streams.values().next().map_or(0, |spec| spec.length);
        let count = u32::try_from(streams.len()).unwrap();
        let images = Images::over(Place::open(to).unwrap().descriptor().unwrap(), count, capacity);
        let images = Arc::new(images);
        let state = fill(&found, &self.on_disk, &streams, images.clone());
        let state = state.map_err(|e| e.to_string())?;
        let state = proto::ProcessState::decode(state.as_slice()).unwrap();
        images.arrange(&state.images).map_err(|e| e.to_string())?;
        Ok(state)
    }

    fn refused(&self, words: &[&str]) {
        let to = tempfile::tempdir().unwrap();
        let error = self.read(to.path()).unwrap_err();
        for word in words {
            assert!(error.contains(word), "nothing of {word} in {error}");
        }
    }
}

#[test]
fn what_was_written_is_read_back() {
    let snapshot = Snapshot::new();
    let to = tempfile::tempdir().unwrap();
    let state = snapshot.read(to.path()).unwrap();
    assert_eq!((state.processes, state.images.len()), (2, FILES.len()));
    for (name, length, fill) in FILES {
        assert_eq!(fs::read(to.path().join(name)).unwrap(), vec![fill; length], "{name}");
    }
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), FILES.len(), "nothing else is there");
}

/// A snapshot in `2` that builds on one in `1`, which builds on one in `0`; what was
/// written to each.
fn chain(root: &Path) -> Vec<OnDisk> {
    let mut all: Vec<OnDisk> = Vec::new();
    for number in 0..3_u8 {
        let snapshot = Snapshot::new();
        let place = root.join(number.to_string());
        let mut on_disk = OnDisk { ..snapshot.on_disk };
        for file in &mut on_disk.images {
            let content = vec![number + 1; usize::try_from(file.bytes).unwrap()];
            fs::write(snapshot.directory.path().join(IMAGES).join(&file.name), &content).unwrap();
            *file = OnDiskFile::of(&file.name, &content);
        }
        if let Some(before) = number.checked_sub(1) {
            let manifest = fs::read(root.join(before.to_string()).join("manifest.json")).unwrap();
            on_disk.version = CHAINED;
            let hash = blake3::hash(&manifest).to_hex().to_string();
            let id = all.last().and_then(|on_disk| on_disk.id).unwrap();
            on_disk.parent = Some(OnDiskParent::of(&format!("../{before}"), id, &hash));
            let link = on_disk.parent.as_ref().unwrap().link();
            std::os::unix::fs::symlink(link, snapshot.directory.path().join("images/parent"))
                .unwrap();
        }
        let manifest = super::super::seal(&on_disk).unwrap();
        fs::write(snapshot.directory.path().join("manifest.json"), manifest).unwrap();
        fs::rename(snapshot.directory.keep(), &place).unwrap();
        all.push(on_disk);
    }
    all
}

fn read_chain(root: &Path, newest: &OnDisk, to: &Path) -> Result<proto::ProcessState, String> {
    let found = check(&root.join("2"), newest).map_err(|e| e.to_string())?;
    let streams = streams(newest, &found);
    let capacity = streams.values().next().map_or(0, |spec| spec.length);
    let count = u32::try_from(streams.len()).unwrap();
    let images = Images::over(Place::open(to).unwrap().descriptor().unwrap(), count, capacity);
    let images = Arc::new(images);
    let state = fill(&found, newest, &streams, images.clone()).map_err(|e| e.to_string())?;
    let state = proto::ProcessState::decode(state.as_slice()).unwrap();
    images.arrange(&state.images).map_err(|e| e.to_string())?;
    Ok(state)
}

#[test]
fn a_chain_is_read_as_rounds_from_the_oldest_on() {
    let root = tempfile::tempdir().unwrap();
    let all = chain(root.path());
    // CRIU finds the images before by the link, wherever the snapshots are together.
    let through = root.path().join("2/images/parent/parent/pages-1.img");
    assert_eq!(fs::read(through).unwrap()[0], 1);
    let to = tempfile::tempdir().unwrap();
    let state = read_chain(root.path(), &all[2], to.path()).unwrap();
    assert_eq!(state.images.len(), 3 * FILES.len());
    for (place, content) in [("", 3), ("parent", 2), ("parent/parent", 1), ("round-1", 1)] {
        for (name, length, _) in FILES {
            let there = fs::read(to.path().join(place).join(name)).unwrap();
            assert_eq!(there, vec![content; length], "{place}/{name}");
        }
    }
    // All of it elsewhere is as good.
    let moved = tempfile::tempdir().unwrap();
    for number in ["0", "1", "2"] {
        fs::rename(root.path().join(number), moved.path().join(number)).unwrap();
    }
    let to = tempfile::tempdir().unwrap();
    read_chain(moved.path(), &all[2], to.path()).unwrap();
}

#[test]
fn a_chain_with_a_link_that_is_missing_changed_or_another_is_refused_by_name() {
    let refused = |what: &dyn Fn(&Path), words: &[&str]| {
        let root = tempfile::tempdir().unwrap();
        let all = chain(root.path());
        what(root.path());
        let to = tempfile::tempdir().unwrap();
        let error = read_chain(root.path(), &all[2], to.path()).unwrap_err();
        for word in words {
            assert!(error.contains(word), "nothing of {word} in {error}");
        }
    };
    refused(&|root| fs::remove_dir_all(root.join("1")).unwrap(), &["/1, which is not there"]);
    refused(&|root| fs::remove_dir_all(root.join("0")).unwrap(), &["/0, which is not there"]);
    let other = |root: &Path| {
        let elsewhere = tempfile::tempdir().unwrap();
        chain(elsewhere.path());
        fs::remove_dir_all(root.join("1")).unwrap();
        fs::rename(elsewhere.path().join("1"), root.join("1")).unwrap();
    };
    refused(&other, &["/1, which is another one by now"]);
    for (number, name) in [("0", "pages-1.img"), ("1", "core-2.img")] {
        let flip = |root: &Path| {
            let path = root.join(number).join(IMAGES).join(name);
            let mut bytes = fs::read(&path).unwrap();
            bytes[99] ^= 1;
            fs::write(path, bytes).unwrap();
        };
        refused(&flip, &[name, &format!("/{number} "), "its content is not what was written"]);
        let gone =
            |root: &Path| fs::remove_file(root.join(number).join(IMAGES).join(name)).unwrap();
        refused(&gone, &[name, "is missing"]);
        let more = |root: &Path| fs::write(root.join(number).join("images/more.img"), "x").unwrap();
        refused(&more, &["more.img", "does not belong to it"]);
    }
}

#[test]
fn only_a_snapshot_that_builds_on_another_has_a_link() {
    let snapshot = Snapshot::new();
    std::os::unix::fs::symlink("/", snapshot.directory.path().join("images/parent")).unwrap();
    snapshot.refused(&["images/parent", "does not belong to it"]);
    let mut snapshot = Snapshot::new();
    snapshot.on_disk.version = CHAINED;
    snapshot.refused(&["of another kind than its version"]);
}

#[test]
fn images_that_are_not_those_that_were_written_are_named() {
    for name in ["core-2.img", "pages-1.img"] {
        let damage = |what: &dyn Fn(PathBuf), words: &[&str]| {
            let snapshot = Snapshot::new();
            what(snapshot.image(name));
            snapshot.refused(&[&[name][..], words].concat());
        };
        let flip = |path: PathBuf| {
            let mut bytes = fs::read(&path).unwrap();
            bytes[777] ^= 1;
            fs::write(path, bytes).unwrap();
        };
        damage(&flip, &["its content is not what was written"]);
        let cut = |path: PathBuf| {
            let bytes = fs::read(&path).unwrap();
            fs::write(path, &bytes[1..]).unwrap();
        };
        damage(&cut, &["were written"]);
        damage(&|path| fs::remove_file(path).unwrap(), &["is missing"]);
        let link = |path: PathBuf| {
            let aside = path.with_extension("aside");
            fs::rename(&path, aside.parent().unwrap().parent().unwrap().join("aside")).unwrap();
            std::os::unix::fs::symlink("../aside", path).unwrap();
        };
        damage(&link, &["is a symbolic link"]);
    }
}

#[test]
fn images_that_were_swapped_or_added_are_named() {
    let snapshot = Snapshot::new();
    let aside = snapshot.directory.path().join("aside");
    fs::rename(snapshot.image("core-1.img"), &aside).unwrap();
    fs::rename(snapshot.image("core-2.img"), snapshot.image("core-1.img")).unwrap();
    fs::rename(aside, snapshot.image("core-2.img")).unwrap();
    snapshot.refused(&["images/core-1.img", "its content is not what was written"]);

    let snapshot = Snapshot::new();
    fs::write(snapshot.image("core-3.img"), "more").unwrap();
    snapshot.refused(&["images/core-3.img", "does not belong to it"]);
}

#[test]
fn a_manifest_can_not_name_what_is_no_image() {
    for name in ["../state.img", "parent", "a/b.img", ".img", "core-1.img"] {
        let mut snapshot = Snapshot::new();
        snapshot.on_disk.images.push(OnDiskFile::of(name, b""));
        snapshot.refused(&["its manifest names images that can't be"]);
    }
    let mut snapshot = Snapshot::new();
    snapshot.on_disk.files[0].name = "../state.bin".into();
    snapshot.refused(&["does not name its files"]);
    snapshot.on_disk.kind = Kind::Vm;
    snapshot.refused(&["of another kind"]);
}

#[test]
fn its_own_files_are_checked_too() {
    for name in [STATE, NEEDS] {
        let snapshot = Snapshot::new();
        let path = snapshot.directory.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::write(path, bytes).unwrap();
        snapshot.refused(&[name, "its content is not what was written"]);
    }
    let snapshot = Snapshot::new();
    fs::write(snapshot.directory.path().join(CHUNKS), "x").unwrap();
    snapshot.refused(&[CHUNKS, "has 1 bytes, and 0 were written"]);
}
