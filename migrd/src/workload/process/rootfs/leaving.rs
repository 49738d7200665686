//! The root file system of a container that leaves: read where it is, while the
//! container runs and once more when it stands still.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migr_proto::v1 as proto;
use nix::sys::stat::{SFlag, major, minor};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::syncfs;
use prost::Message;

use super::changes::Before;
use super::extents::{Extent, Extents, Piece, data_of, hash_pages};
use super::list::{Node, What, list_bytes};
use super::walk::{Found, Looking, Walk, open_found, open_root, walk};
use super::{
    Devices, LIST_PAGES, MAX_LIST_BYTES, MAX_PAGES, ROOTFS_STREAM, RootfsError, VERSION, pages_of,
    refused, stream_spec,
};
use crate::pages::PageBitmap;
use crate::sys::memfd;
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{OutOfStream, StreamSpec};

/// What is handed out at once while the container runs, about, in pages: 64 MiB.
const PART_PAGES: u64 = 16_384;
/// How many files are kept open to be read.
const OPEN: usize = 32;
/// Room for what is written between the first look and the last, in pages, at least:
/// 1 GiB.
const SPARE_PAGES: u64 = 1 << 18;

/// A root file system on its way.
#[derive(Debug)]
pub struct Leaving {
    root: OwnedFd,
    devices: Devices,
    /// The first look; the place of each thing is its number.
    walk: Walk,
    /// Whether content read before the stop is of any use.
    pub(super) early: bool,
    /// Which files could not be read, or were others by then.
    suspect: Vec<AtomicBool>,
    pages: u64,
    used: u64,
    table: Mutex<Table>,
    open: Mutex<VecDeque<(u64, Arc<File>)>>,
}

/// Where the content of files is.
#[derive(Debug, Default)]
struct Table {
    extents: Extents,
    /// By the first page: which file, and whether it stands still.
    files: HashMap<u64, Content>,
    /// What is at the beginning of the stream.
    list: Vec<u8>,
    /// Of what there is at the end.
    last: Vec<Extent>,
}

#[derive(Clone, Debug)]
struct Content {
    path: PathBuf,
    inode: u64,
    /// Number by the first look.
    number: u32,
    still: bool,
}

/// File systems whose kernel side notes every change, those through memory included.
fn notes_changes(kind: FsType) -> bool {
    // f2fs has no name in libc.
    [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, FsType(0xF2F5_2010)].contains(&kind)
}

fn numbered(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// A thing as a list has it.
fn node(found: &Found, parent: u32, same_as: Option<u32>, first_page: u64) -> Node {
    let what = match found.format() {
        SFlag::S_IFDIR => What::Directory,
        SFlag::S_IFLNK => What::Link(found.target.clone()),
        SFlag::S_IFIFO => What::Pipe,
        SFlag::S_IFSOCK => What::Socket,
        format @ (SFlag::S_IFBLK | SFlag::S_IFCHR) => What::Device {
            block: format == SFlag::S_IFBLK,
            major: u32::try_from(major(found.stat.st_rdev)).unwrap_or(u32::MAX),
            minor: u32::try_from(minor(found.stat.st_rdev)).unwrap_or(u32::MAX),
        },
        _ => match same_as {
            Some(other) => What::Same(other),
            None => What::File { size: found.size(), first_page },
        },
    };
    let has_some = matches!(what, What::Directory | What::File { .. });
    let (seconds, ns) = (found.stat.st_mtime, found.stat.st_mtime_nsec);
    Node {
        parent,
        name: found.name().to_vec(),
        mode: found.stat.st_mode & 0o7777,
        uid: found.stat.st_uid,
        gid: found.stat.st_gid,
        mtime_ns: seconds.saturating_mul(1_000_000_000).saturating_add(ns),
        attributes: if has_some { found.attributes.clone() } else { Vec::new() },
        what,
    }
}

/// Whether it has content of its own.
fn has_content(found: &Found) -> bool {
    found.format() == SFlag::S_IFREG && found.same_as.is_none() && found.size() > 0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leaving {
    /// Looks at the one at `path`. Blocks as long as that takes.
    ///
    /// # Errors
    /// When it has something that does not travel, or can't be looked at.
    pub fn begin(path: &Path, devices: Devices) -> Result<Self, RootfsError> {
        let root = open_root(path)?;
        let kind = fstatfs(&root).map_err(refused("look at", path))?.filesystem_type();
        let looking = Looking { still: false, devices: &devices, known: &|_, _| false };
        let walk = walk(&root, &looking)?;
        let mut table = Table::default();
        let mut next = LIST_PAGES;
        let blocks = |found: &Found| u64::try_from(found.stat.st_blocks).unwrap_or(0) * 512;
        let mut used = 0;
        for (index, found) in walk.found.iter().enumerate() {
            used += if has_content(found) { blocks(found) } else { PAGE_SIZE };
            if has_content(found) {
                next = table.add(next, numbered(index), found, false)?;
            }
        }
        let pages = next.saturating_mul(2).saturating_add(SPARE_PAGES).min(MAX_PAGES);
        let suspect = walk.found.iter().map(|_| AtomicBool::new(false)).collect();
        let (table, open) = (Mutex::new(table), Mutex::default());
        let early = notes_changes(kind);
        let leaving = Self { root, devices, walk, early, suspect, pages, used, table, open };
        let bytes = leaving.list().encoded_len();
        if bytes > MAX_LIST_BYTES {
            return Err(RootfsError::Unfit {
                code: "rootfs-files",
                what: format!("the list of its files has {} MiB", bytes >> 20),
                remedy: "put what has many files on storage that both hosts share, as a mount of \
                         type bind",
            });
        }
        Ok(leaving)
    }

    /// Its stream.
    #[must_use]
    pub fn spec(&self) -> StreamSpec {
        stream_spec(self.pages, self.used)
    }

    /// What there is, for the offer.
    #[must_use]
    pub fn list(&self) -> proto::RootfsList {
        let first: HashMap<u32, u64> =
            lock(&self.table).extents.all().iter().map(|e| (e.number, e.first)).collect();
        let nodes = self.walk.found.iter().enumerate().map(|(index, found)| {
            let first_page = first.get(&numbered(index)).copied().unwrap_or(0);
            let same_as = found.same_as.map(numbered);
            node(found, numbered(found.parent), same_as, first_page).to_wire()
        });
        proto::RootfsList { nodes: nodes.collect() }
    }

    /// The next pages to send while the container runs, from the file `from` on; `None`
    /// when there are no more. Blocks.
    ///
    /// # Errors
    /// When storage fails.
    pub fn ahead(&self, from: &mut usize) -> Result<Option<PageBitmap>, RootfsError> {
        if !self.early {
            return Ok(None);
        }
        if *from == 0 {
            // What is written through memory after this is noted by the kernel; before,
            // a page that was written to already is not noted again.
            syncfs(&self.root).map_err(refused("write back", Path::new("/")))?;
        }
        let extents: Vec<Extent> = lock(&self.table).extents.all()[*from..].to_vec();
        if extents.is_empty() {
            return Ok(None);
        }
        let mut pages = PageBitmap::none(self.pages);
        for extent in extents {
            *from += 1;
            match self.file(extent.first).map(|file| self.data(&extent, &file)) {
                Ok(data) => insert(&mut pages, data?),
                Err(error) => {
                    tracing::debug!(number = extent.number, %error, "a file changes meanwhile");
                    self.doubt(extent.number);
                }
            }
            if pages.count() >= PART_PAGES {
                break;
            }
        }
        Ok(Some(pages))
    }

    fn data(&self, extent: &Extent, file: &File) -> Result<Vec<PageRun>, RootfsError> {
        let path = lock(&self.table).files.get(&extent.first).map(|c| c.path.clone());
        let run = |(start, stop): (u64, u64)| {
            let (first, end) = (start / PAGE_SIZE, pages_of(stop));
            PageRun { first: PageIndex(extent.first + first), count: end - first }
        };
        let found = data_of(file, (0, extent.size), &path.unwrap_or_default())?;
        Ok(found.into_iter().map(run).collect())
    }

    /// Looks again, now that the container stands still: the pages that are still to be
    /// sent. `written` are files that it had open for writing, by their paths in the
    /// root. Blocks as long as that takes.
    ///
    /// # Errors
    /// When what has come up does not travel, or is too much.
    pub fn rest(&self, written: &[PathBuf]) -> Result<PageBitmap, RootfsError> {
        let suspect = |number: u32| {
            self.suspect.get(number as usize).is_some_and(|s| s.load(Ordering::Acquire))
        };
        let before = Before::new(&self.walk, suspect, written, self.early);
        let known = |path: &Path, stat: &nix::sys::stat::FileStat| before.is_same(path, stat);
        let looking = Looking { still: true, devices: &self.devices, known: &known };
        let mut now = walk(&self.root, &looking)?.found;
        for found in &mut now {
            if let Some(was) = before.known(found) {
                found.target.clone_from(&was.target);
                found.attributes.clone_from(&was.attributes);
            }
        }
        let changes = before.compare(&now);
        let fresh = lock(&self.table).note(&self.walk, &now, &changes, self.pages)?;
        let mut pages = PageBitmap::none(self.pages);
        let count = pages_of(lock(&self.table).list.len() as u64);
        pages.insert(PageRun { first: PageIndex(0), count });
        let fresh = if self.early { fresh } else { lock(&self.table).last.clone() };
        for extent in fresh {
            let file = self.file(extent.first);
            let path = lock(&self.table).files.get(&extent.first).map(|c| c.path.clone());
            let path = path.unwrap_or_default();
            let file = file.map_err(super::system("open", &path))?;
            insert(&mut pages, self.data(&extent, &file)?);
        }
        Ok(pages)
    }

    fn doubt(&self, number: u32) {
        if let Some(suspect) = self.suspect.get(number as usize) {
            suspect.store(true, Ordering::Release);
        }
    }

    /// The file whose content begins at that page.
    fn file(&self, first: u64) -> std::io::Result<Arc<File>> {
        if let Some((_, file)) = lock(&self.open).iter().find(|(of, _)| *of == first) {
            return Ok(Arc::clone(file));
        }
        let content = lock(&self.table).files.get(&first).cloned();
        let content = content.ok_or(std::io::ErrorKind::NotFound)?;
        let file = Arc::new(open_found(&self.root, &content.path, content.inode)?);
        let mut open = lock(&self.open);
        if open.len() >= OPEN {
            open.pop_front();
        }
        open.push_back((first, Arc::clone(&file)));
        Ok(file)
    }

    fn pieces(&self, offset: u64, length: usize) -> Vec<Piece> {
        lock(&self.table).extents.pieces(offset, length)
    }

    fn inside(&self, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let end = offset.checked_add(length);
        if end.is_some_and(|end| end <= self.pages * PAGE_SIZE) {
            return Ok(());
        }
        Err(OutOfStream { key: ROOTFS_STREAM, offset, length })
    }

    /// Reads a stretch of the stream.
    ///
    /// # Errors
    /// When it is not of the stream, or of a file that stands still and can't be read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let length = into.len() as u64;
        self.inside(offset, length)?;
        for piece in self.pieces(offset, into.len()) {
            let part = &mut into[piece.range.clone()];
            let Some(extent) = piece.extent else {
                lock(&self.table).read_list(piece.at, part);
                continue;
            };
            let within = piece.within();
            let done = self.file(extent.first).and_then(|file| {
                part[within..].fill(0);
                file.read_exact_at(&mut part[..within], piece.at)
            });
            if let Err(error) = done {
                part.fill(0);
                self.failed(&extent, &error).map_err(|()| OutOfStream {
                    key: ROOTFS_STREAM,
                    offset,
                    length,
                })?;
            }
        }
        Ok(())
    }

    /// Whether there is nothing but zeros in a stretch, as far as holes tell.
    ///
    /// # Errors
    /// As [`Leaving::read`].
    pub fn is_zero(&self, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        self.inside(offset, length)?;
        let out = OutOfStream { key: ROOTFS_STREAM, offset, length };
        for piece in self.pieces(offset, usize::try_from(length).map_err(|_| out)?) {
            let Some(extent) = piece.extent else {
                if piece.at < list_bytes() && lock(&self.table).list.len() as u64 > piece.at {
                    return Ok(false);
                }
                continue;
            };
            let end = piece.at + piece.within() as u64;
            let hole = self.file(extent.first).and_then(|file| {
                match memfd::is_hole(&file, piece.at, end) {
                    Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => Ok(false),
                    other => other,
                }
            });
            match hole {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => self.failed(&extent, &error).map_err(|()| out)?,
            }
        }
        Ok(true)
    }

    /// A file could not be read: of one that stands still that is a failure.
    fn failed(&self, extent: &Extent, error: &std::io::Error) -> Result<(), ()> {
        let content = lock(&self.table).files.get(&extent.first).cloned();
        let Some(Content { path, number, still, .. }) = content else { return Err(()) };
        if still {
            tracing::warn!(path = %path.display(), %error, "a file of a container can't be read");
            return Err(());
        }
        self.doubt(number);
        Ok(())
    }

    /// BLAKE3 over the stream as it is at the end: the list of changes, and the content
    /// of every file that there is. Blocks.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn hash(&self) -> std::io::Result<[u8; 32]> {
        let last = lock(&self.table).last.clone();
        let mut hasher = blake3::Hasher::new();
        let list = [(0, LIST_PAGES)].into_iter();
        for range in list.chain(last.iter().map(|e| (e.first, pages_of(e.size)))) {
            hash_pages(
                &mut hasher,
                range,
                |at, length| self.is_zero(at, length),
                |at, into| self.read(at, into),
            )
            .map_err(std::io::Error::other)?;
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

impl Table {
    /// Gives a file its place; where the next one is.
    fn add(
        &mut self,
        first: u64,
        number: u32,
        found: &Found,
        still: bool,
    ) -> Result<u64, RootfsError> {
        let end = first.saturating_add(pages_of(found.size()));
        if end > MAX_PAGES {
            return Err(RootfsError::Unfit {
                code: "rootfs-size",
                what: "its files have more than 1 TiB together, holes included".into(),
                remedy: "put large files on storage that both hosts share, as a mount of type bind",
            });
        }
        self.extents.push(Extent { first, size: found.size(), number });
        let (path, inode) = (found.path.clone(), found.stat.st_ino);
        self.files.insert(first, Content { path, inode, number, still });
        Ok(end)
    }

    /// Notes what a second look found, and makes the list of it; where the content is
    /// of what is not as it was.
    fn note(
        &mut self,
        before: &Walk,
        now: &[Found],
        changes: &super::changes::Changes,
        pages: u64,
    ) -> Result<Vec<Extent>, RootfsError> {
        let old: HashMap<u32, Extent> =
            self.extents.all().iter().map(|extent| (extent.number, *extent)).collect();
        let mut next = self.extents.all().last().map_or(LIST_PAGES, |e| e.end() / PAGE_SIZE);
        let (mut fresh, mut changed) = (Vec::new(), Vec::new());
        self.last.clear();
        let all = changes.numbers.iter().zip(&changes.changed).zip(&changes.same_as);
        for (found, ((number, is_changed), same_as)) in now.iter().zip(all) {
            let content = found.format() == SFlag::S_IFREG && same_as.is_none() && found.size() > 0;
            let mut first_page = 0;
            if content && *is_changed {
                first_page = next;
                next = self.add(next, *number, found, true)?;
                fresh.push(Extent { first: first_page, size: found.size(), number: *number });
                self.last.extend(fresh.last());
            } else if content && let Some(extent) = old.get(number) {
                self.last.push(*extent);
                if let Some(content) = self.files.get_mut(&extent.first) {
                    content.still = true;
                }
            }
            if *is_changed {
                let parent = changes.numbers.get(found.parent).copied().unwrap_or(0);
                let node = node(found, parent, *same_as, first_page).to_wire();
                changed.push(proto::RootfsChange { number: *number, node: Some(node) });
            }
        }
        if next > pages {
            let mib = ((next - pages) * PAGE_SIZE) >> 20;
            return Err(RootfsError::Grown { what: format!("by {mib} MiB too much") });
        }
        self.last.sort_by_key(|extent| extent.first);
        // New numbers come in order.
        changed.sort_by_key(|change| change.number);
        tracing::debug!(
            before = before.found.len(),
            now = now.len(),
            changed = changed.len(),
            "looked again at a root file system"
        );
        let removed = changes.removed.clone();
        self.write_list(&proto::RootfsChanges { removed, changed, version: VERSION })?;
        Ok(fresh)
    }

    fn write_list(&mut self, changes: &proto::RootfsChanges) -> Result<(), RootfsError> {
        let bytes = changes.encode_to_vec();
        if bytes.len() as u64 + 8 > list_bytes() {
            let what = "too many files of it are others by now".into();
            return Err(RootfsError::Grown { what });
        }
        self.list = [(bytes.len() as u64).to_le_bytes().as_slice(), &bytes].concat();
        Ok(())
    }

    fn read_list(&self, at: u64, into: &mut [u8]) {
        into.fill(0);
        let from = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(bytes) = self.list.get(from..) {
            let length = bytes.len().min(into.len());
            into[..length].copy_from_slice(&bytes[..length]);
        }
    }
}

fn insert(pages: &mut PageBitmap, runs: Vec<PageRun>) {
    runs.into_iter().for_each(|run| pages.insert(run));
}
