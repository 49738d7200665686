//! A root file system that arrives, in a directory of migrd's own.
//!
//! Everything that the offer lists is made at once, files without content; content goes
//! into them as it comes. What has changed meanwhile comes in a part of the stream that
//! the list has nothing in: it is kept in a file without a name until the list of
//! changes says where it belongs.

use std::collections::{HashSet, VecDeque};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migr_proto::v1 as proto;
use nix::fcntl::OFlag;
use nix::sys::statvfs::fstatvfs;
use nix::unistd::syncfs;
use prost::Message;

use super::extents::{Extent, Extents, data_of, hash_pages};
use super::list::{List, Rules, What, list_bytes};
use super::make::{Maker, dress_open};
use super::walk::{open_below, open_root};
use super::{
    Devices, LIST_PAGES, MAX_PAGES, ROOTFS_STREAM, RootfsError, VERSION, pages_of, refused,
    root_in, system,
};
use crate::sys::memfd;
use crate::units::PAGE_SIZE;
use crate::workload::storage::waiting;
use crate::workload::{ChunkSink, OutOfStream, Problem, StreamKey, StreamSpec};

/// How many files are kept open to be written.
const OPEN: usize = 32;
/// What is left free on the disk: the journal is there too (bytes).
const RESERVE: u64 = 64 << 20;
/// How often it is looked how much is free, and what came is written back (bytes).
const LOOK: u64 = 64 << 20;
/// What may come beyond three times of what was announced (bytes).
const SPARE: u64 = 1 << 30;
/// What is copied at once (bytes).
const COPY: usize = 1 << 20;

/// One that arrives.
#[derive(Debug)]
pub struct Landing {
    root: OwnedFd,
    /// What comes before it is known where it belongs.
    kept: File,
    list: List,
    rules: Rules,
    extents: Extents,
    open: Mutex<VecDeque<(u32, Arc<File>)>>,
    /// Files that have been written to and not been given their time again.
    bare: Mutex<HashSet<u32>>,
    written: AtomicU64,
    allowed: u64,
    closed: AtomicBool,
    trouble: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rules(spec: &StreamSpec, devices: Devices) -> Result<Rules, RootfsError> {
    let pages = spec.length / PAGE_SIZE;
    if pages <= LIST_PAGES || pages > MAX_PAGES {
        return Err(RootfsError::Odd("its stream has an impossible length".into()));
    }
    Ok(Rules { pages, devices })
}

/// What keeps the root file system that is offered as `spec`, with that list, from
/// being taken into `places`. Makes nothing.
#[must_use]
pub fn problems(
    places: &Path,
    spec: &StreamSpec,
    list: Option<&proto::RootfsList>,
    devices: Devices,
) -> Vec<Problem> {
    let checked = rules(spec, devices).and_then(|rules| {
        let list = list.cloned().ok_or_else(|| RootfsError::Odd("it has no list".into()))?;
        List::from_wire(list, &rules)
    });
    if let Err(error) = checked {
        let remedy = "bring both daemons to the same version";
        return vec![Problem::new("rootfs", error.to_string(), remedy)];
    }
    let free = open_root(places).and_then(|fd| free(&fd));
    match free {
        Ok(free) if free < spec.used.saturating_add(RESERVE) => {
            let (needs, free) = (spec.used.saturating_add(RESERVE).div_ceil(1 << 20), free >> 20);
            vec![Problem::new(
                "destination-rootfs-space",
                format!(
                    "its root file system needs {needs} MiB in {} and {free} MiB are free",
                    places.display()
                ),
                "make room there",
            )]
        }
        Ok(_) => Vec::new(),
        Err(error) => {
            let remedy = "let migrd write in its state directory";
            vec![Problem::new("rootfs", error.to_string(), remedy)]
        }
    }
}

/// What is free on the file system of a directory, in bytes.
fn free(directory: &OwnedFd) -> Result<u64, RootfsError> {
    let found = fstatvfs(directory).map_err(refused("find room for", Path::new("/")))?;
    Ok(found.blocks_available().saturating_mul(found.fragment_size()))
}

impl Landing {
    /// Makes everything that the list says, without content, in `place`, which is made.
    /// Blocks as long as that takes.
    ///
    /// # Errors
    /// When the list can't be right, or this host has no room. What was made of it stays:
    /// [`super::remove`] deletes it.
    pub fn make(
        place: &Path,
        spec: &StreamSpec,
        list: proto::RootfsList,
        devices: Devices,
    ) -> Result<Self, RootfsError> {
        let rules = rules(spec, devices)?;
        let list = List::from_wire(list, &rules)?;
        let mut private = DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(root_in(place)).map_err(system("make", place))?;
        let root = open_root(&root_in(place))?;
        let kept = place.join("kept");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&kept).map_err(system("make", &kept))?;
        std::fs::remove_file(&kept).map_err(system("delete", &kept))?;
        let mut maker = Maker::new(&root);
        for (number, node) in list.all().skip(1) {
            match maker.make(&list, number)? {
                Some(file) => dress_open(&file, node, list.path(number))?,
                None if node.what == What::Directory => {}
                None => maker.dress(&list, number)?,
            }
        }
        // Each after all that is in it.
        for (number, _) in list.all().rev().filter(|(_, node)| node.what == What::Directory) {
            maker.dress(&list, number)?;
        }
        let extents = list.extents();
        Ok(Self {
            root,
            kept: file,
            list,
            rules,
            extents,
            open: Mutex::default(),
            bare: Mutex::default(),
            written: AtomicU64::new(0),
            allowed: spec.used.saturating_mul(3).saturating_add(SPARE),
            closed: AtomicBool::new(false),
            trouble: Mutex::default(),
        })
    }

    /// A file of the offer's list, open to be written.
    fn file(&self, number: u32) -> Result<Arc<File>, RootfsError> {
        let mut open = lock(&self.open);
        if let Some((_, file)) = open.iter().find(|(of, _)| *of == number) {
            return Ok(Arc::clone(file));
        }
        let path = self.list.path(number);
        let opened = open_below(&self.root, path, OFlag::O_RDWR | OFlag::O_NOFOLLOW);
        let file = Arc::new(File::from(opened.map_err(refused("open", path))?));
        lock(&self.bare).insert(number);
        open.push_back((number, Arc::clone(&file)));
        // One that somebody writes to at this moment would lose its time again.
        let unused = |(_, file): &(u32, Arc<File>)| Arc::strong_count(file) == 1;
        if open.len() > OPEN
            && let Some(at) = open.iter().position(unused)
            && let Some((number, file)) = open.remove(at)
        {
            self.dress(number, &file)?;
        }
        Ok(file)
    }

    fn dress(&self, number: u32, file: &File) -> Result<(), RootfsError> {
        if let Some(node) = self.list.get(number) {
            dress_open(&file, node, self.list.path(number))?;
        }
        lock(&self.bare).remove(&number);
        Ok(())
    }

    /// Notes that so much will be written; what speaks against it.
    fn account(&self, length: u64) -> Result<(), RootfsError> {
        let before = self.written.fetch_add(length, Ordering::Relaxed);
        let all = before.saturating_add(length);
        if all > self.allowed {
            let mib = self.allowed >> 20;
            return Err(RootfsError::Grown { what: format!("beyond {mib} MiB") });
        }
        if before / LOOK != all / LOOK {
            // What is written back by now need not be at the end, when everybody waits.
            syncfs(&self.root).map_err(refused("write back", Path::new("/")))?;
        }
        if (before / LOOK != all / LOOK || before == 0) && free(&self.root)? < RESERVE {
            return Err(system("write", Path::new("/"))(io::ErrorKind::StorageFull.into()));
        }
        Ok(())
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), RootfsError> {
        self.account(bytes.len() as u64)?;
        for piece in self.extents.pieces(offset, bytes.len()) {
            let part = &bytes[piece.range.clone()];
            match piece.extent {
                Some(extent) => {
                    let file = self.file(extent.number)?;
                    let path = self.list.path(extent.number);
                    let written = file.write_all_at(&part[..piece.within()], piece.at);
                    written.map_err(system("write", path))?;
                }
                None => self
                    .kept
                    .write_all_at(part, piece.at)
                    .map_err(system("write", Path::new("what is new")))?,
            }
        }
        Ok(())
    }

    fn takes(&self, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let end = offset.checked_add(length);
        let inside = end.is_some_and(|end| end <= self.rules.pages * PAGE_SIZE);
        if inside && !self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(OutOfStream { key: ROOTFS_STREAM, offset, length })
    }

    /// Remembers why something could not be put down.
    fn note(&self, error: &RootfsError) {
        let what = match error {
            RootfsError::System { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "there is no room left on the disk of that host for its root file system: make \
                 room in migrd's state directory there"
                    .to_owned()
            }
            other => other.to_string(),
        };
        tracing::warn!(error = what, "a root file system does not arrive");
        lock(&self.trouble).get_or_insert(what);
    }

    /// What there is at the end, by what has arrived.
    fn last(&self) -> Result<List, RootfsError> {
        let odd = |what: &str| RootfsError::Odd(what.to_owned());
        let failed = || system("read", Path::new("the list of changes"));
        let mut length = [0; 8];
        let read = self.kept.read_exact_at(&mut length, 0);
        read.map_err(|_| odd("what has changed of it has not arrived"))?;
        let length = u64::from_le_bytes(length);
        if length > list_bytes() - 8 {
            return Err(odd("the list of changes is too long"));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.kept.read_exact_at(&mut bytes, 8).map_err(failed())?;
        let changes = proto::RootfsChanges::decode(bytes.as_slice());
        let changes = changes.map_err(|_| odd("the list of changes can't be read"))?;
        if changes.version != VERSION {
            // A stream without one is all zeros.
            return Err(odd("what has changed of it has not arrived, or is of another version"));
        }
        self.list.after(changes, &self.rules)
    }

    fn is_kept(&self, last: &List, extent: &Extent) -> bool {
        !self.stays(last, extent.number)
    }

    /// Whether something is in the end what it was in the offer. Another name of a file
    /// is not when the file is another one.
    fn stays(&self, last: &List, number: u32) -> bool {
        let (before, after) = (self.list.get(number), last.get(number));
        before == after
            && match after.map(|node| &node.what) {
                Some(What::Same(other)) => self.stays(last, *other),
                _ => true,
            }
    }

    /// BLAKE3 over what has arrived, as [`super::Leaving::hash`]. Blocks.
    ///
    /// # Errors
    /// When it can't be right, or not be read.
    pub fn hash(&self) -> Result<[u8; 32], RootfsError> {
        let last = self.last()?;
        let mut hasher = blake3::Hasher::new();
        hash_pages(
            &mut hasher,
            (0, LIST_PAGES),
            |_, _| Ok(false),
            |at, into| read_padded(&self.kept, at, into),
        )
        .map_err(system("read", Path::new("the list of changes")))?;
        for extent in last.extents().all() {
            let path = last.path(extent.number);
            let start = extent.first * PAGE_SIZE;
            let kept = self.is_kept(&last, extent);
            let (file, begin) = if kept {
                (self.kept.try_clone().map_err(system("open", path))?, start)
            } else {
                let opened = open_below(&self.root, path, OFlag::O_RDONLY | OFlag::O_NOFOLLOW);
                (File::from(opened.map_err(refused("open", path))?), 0)
            };
            let place = |at: u64| at - start + begin;
            hash_pages(
                &mut hasher,
                (extent.first, pages_of(extent.size)),
                |at, length| match memfd::is_hole(&file, place(at), place(at) + length) {
                    Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(false),
                    other => other,
                },
                |at, into| read_padded(&file, place(at), into),
            )
            .map_err(system("read", path))?;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Everything has arrived: makes of it what there is at the end, and all of it
    /// durable. Nothing is taken any more. Blocks.
    ///
    /// # Errors
    /// When what came can't be right, or there is no room.
    pub fn complete(&self) -> Result<(), RootfsError> {
        self.closed.store(true, Ordering::Release);
        let last = self.last()?;
        let mut maker = Maker::new(&self.root);
        let mut touched: HashSet<u32> = HashSet::new();
        // What is in a directory has a higher number.
        for (number, before) in self.list.all().rev() {
            let after = last.get(number);
            let both = after.is_some_and(|a| a.what == What::Directory);
            if self.stays(&last, number) || (both && before.what == What::Directory) {
                continue;
            }
            maker.remove(&self.list, number)?;
            lock(&self.bare).remove(&number);
            touched.insert(before.parent);
        }
        for (number, node) in last.all() {
            let before = self.list.get(number);
            if self.stays(&last, number) {
                continue;
            }
            if node.what == What::Directory && before.is_some_and(|b| b.what == What::Directory) {
                touched.insert(number);
                continue;
            }
            let made = maker.make(&last, number)?;
            touched.insert(node.parent);
            match (made, &node.what) {
                (Some(file), What::File { size, first_page }) => {
                    self.copy_kept(&file, *first_page, *size, last.path(number))?;
                    dress_open(&file, node, last.path(number))?;
                }
                (_, What::Directory) => {
                    touched.insert(number);
                }
                _ => maker.dress(&last, number)?,
            }
        }
        let bare: Vec<u32> = lock(&self.bare).drain().collect();
        for number in bare {
            maker.dress(&last, number)?;
        }
        lock(&self.open).clear();
        let directories = last.all().rev().filter(|(_, node)| node.what == What::Directory);
        for (number, _) in directories.filter(|(number, _)| touched.contains(number)) {
            maker.dress(&last, number)?;
        }
        self.kept.set_len(0).map_err(system("empty", Path::new("what is new")))?;
        syncfs(&self.root).map_err(refused("write back", Path::new("/")))
    }

    /// Copies what has come of a file into it.
    fn copy_kept(
        &self,
        file: &File,
        first: u64,
        size: u64,
        path: &Path,
    ) -> Result<(), RootfsError> {
        let start = first * PAGE_SIZE;
        let mut buffer = vec![0; COPY];
        // Nothing is looked for before it: what is there is of others.
        let data = data_of(&self.kept, (start, start + size), path)?;
        for (mut at, end) in data {
            while at < end {
                let length = usize::try_from(end - at).unwrap_or(COPY).min(COPY);
                let part = &mut buffer[..length];
                let copied = self.kept.read_exact_at(part, at);
                let copied = copied.and_then(|()| file.write_all_at(part, at - start));
                copied.map_err(system("write", path))?;
                at += length as u64;
            }
        }
        Ok(())
    }
}

/// Reads at an offset; zeros behind the end.
fn read_padded(file: &File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(length) => done += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    into[done..].fill(0);
    Ok(())
}

impl ChunkSink for Landing {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let length = bytes.len() as u64;
        self.takes(offset, length)?;
        waiting(|| self.put(offset, bytes)).map_err(|error| {
            self.note(&error);
            OutOfStream { key, offset, length }
        })
    }

    /// Each part of it comes once at the most, so there is nothing yet.
    fn zero(&self, _: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        self.takes(offset, length)
    }

    fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }
}

/// Where a root file system is that has arrived, if there is one.
#[must_use]
pub fn arrived(place: &Path) -> Option<PathBuf> {
    Some(root_in(place)).filter(|root| root.is_dir())
}
