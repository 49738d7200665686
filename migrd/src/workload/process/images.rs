//! The images of one process tree, in a file system in memory that nobody else
//! sees and that goes with its last descriptor.
//!
//! Large files are streams of a migration: at the source they are read while CRIU
//! still writes them, at the destination they are written under the number of
//! their stream and get their names when the state says them. Small files travel
//! in the state.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migr_proto::v1::{self as proto, process_image};
use nix::dir::Dir;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;

use crate::pages::PageBitmap;
use crate::sys::{memfd, tmpfs};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey};

/// What all image files of CRIU's are called.
const SUFFIX: &str = ".img";
/// How the names of those begin that are only ever appended to: memory.
const APPENDED: &str = "pages-";
/// A larger file is a stream of its own (bytes).
const WHOLE_BYTES: u64 = 128 << 10;
/// What the whole files of a tree may come to (bytes): they are one message.
const ALL_WHOLE_BYTES: u64 = 16 << 20;
/// The longest name of a file.
const NAME_BYTES: usize = 128;
/// The most files of one tree.
const FILES: usize = 65_536;

/// Where the streams of images begin.
pub const FIRST_STREAM: u32 = 128;

/// The images of a tree.
#[derive(Debug)]
pub struct Images {
    directory: OwnedFd,
    /// How long a stream can be, in bytes.
    capacity: u64,
    /// How many streams there can be.
    streams: u32,
    open: Mutex<BTreeMap<StreamKey, Arc<File>>>,
}

/// One file of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
}

/// The images are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// The system.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// More than was announced.
    #[error(
        "it has grown while it was about to move: its images need {what}, and {allowed} were \
         announced; try again"
    )]
    Grown {
        /// What they need.
        what: String,
        /// What was announced.
        allowed: String,
    },
    /// A peer's state.
    #[error("the state of the processes is not usable: {0}")]
    Odd(String),
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> ImagesError {
    let what = what.into();
    move |source| ImagesError::System { what, source }
}

impl Images {
    /// None yet; of at most `streams` streams of `capacity` bytes.
    ///
    /// # Errors
    /// When the kernel makes no file system in memory.
    pub fn new(streams: u32, capacity: u64) -> Result<Self, ImagesError> {
        let directory = tmpfs::create().map_err(system("make a file system in memory"))?;
        // The mount is not a directory that files can be made in until it is opened.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = openat(&directory, ".", flags, Mode::empty())
            .map_err(|e| system("open a file system in memory")(e.into()))?;
        Ok(Self::over(directory, streams, capacity))
    }

    /// Those in a directory.
    #[must_use]
    pub fn over(directory: OwnedFd, streams: u32, capacity: u64) -> Self {
        Self { directory, capacity, streams, open: Mutex::default() }
    }

    /// Their directory.
    ///
    /// # Errors
    /// When there is no room for a descriptor.
    pub fn directory(&self) -> Result<OwnedFd, ImagesError> {
        self.directory.try_clone().map_err(system("duplicate a descriptor"))
    }

    fn opened(&self) -> MutexGuard<'_, BTreeMap<StreamKey, Arc<File>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_file(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        Ok(openat(self.directory.as_fd(), name, flags, Mode::from_bits_truncate(0o600))?.into())
    }

    /// The image files that are there now, by name.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn list(&self) -> Result<Vec<Image>, ImagesError> {
        let failed = |e: nix::Error| system("list the images")(e.into());
        let again = self.open_directory()?;
        let mut directory = Dir::from_fd(again).map_err(failed)?;
        let mut found = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.ends_with(SUFFIX) {
                continue;
            }
            let file = self.open_file(&name, OFlag::O_RDONLY).map_err(system("open an image"))?;
            let length = file.metadata().map_err(system("measure an image"))?.len();
            found.push(Image { name, length });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The directory with a position of its own.
    fn open_directory(&self) -> Result<OwnedFd, ImagesError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = openat(self.directory.as_fd(), ".", flags, Mode::empty());
        opened.map_err(|e| system("open the images")(e.into()))
    }

    /// Makes a file of this source's a stream.
    ///
    /// # Errors
    /// When it is too long, or there are too many.
    pub fn announce(&self, number: u32, image: &Image) -> Result<(), ImagesError> {
        if number >= self.streams {
            let (what, allowed) = (format!("{} files", number + 1), self.streams.to_string());
            return Err(ImagesError::Grown { what, allowed });
        }
        self.fits(image)?;
        let file = self.open_file(&image.name, OFlag::O_RDONLY);
        let file = file.map_err(system(format!("open {}", image.name)))?;
        self.opened().insert(StreamKey(FIRST_STREAM + number), Arc::new(file));
        Ok(())
    }

    /// Whether it is not longer than was announced.
    ///
    /// # Errors
    /// When it is.
    pub fn fits(&self, image: &Image) -> Result<(), ImagesError> {
        if image.length <= self.capacity {
            return Ok(());
        }
        let mib = |bytes: u64| format!("{} MiB in one file", bytes >> 20);
        Err(ImagesError::Grown { what: mib(image.length), allowed: mib(self.capacity) })
    }

    /// How many pages a stream can have.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.capacity / PAGE_SIZE
    }

    /// The files as a state has them: small ones whole, the others by the number of
    /// their stream.
    ///
    /// # Errors
    /// When one can't be read, or they are too many.
    pub fn to_wire(
        &self,
        images: &[Image],
        streams: &BTreeMap<String, u32>,
    ) -> Result<Vec<proto::ProcessImage>, ImagesError> {
        let mut all = 0;
        let mut wire = Vec::new();
        for Image { name, length } in images {
            let content = match streams.get(name) {
                Some(number) => process_image::Content::Stream(FIRST_STREAM + number),
                None => {
                    all += length;
                    if all > ALL_WHOLE_BYTES {
                        return Err(ImagesError::Odd("its small images are too many".into()));
                    }
                    process_image::Content::Whole(self.read_whole(name)?.into())
                }
            };
            wire.push(proto::ProcessImage {
                name: name.clone(),
                length: *length,
                content: Some(content),
            });
        }
        Ok(wire)
    }

    fn read_whole(&self, name: &str) -> Result<Vec<u8>, ImagesError> {
        let mut bytes = Vec::new();
        let file = self.open_file(name, OFlag::O_RDONLY).map_err(system(format!("open {name}")))?;
        let read = file.take(ALL_WHOLE_BYTES).read_to_end(&mut bytes);
        read.map_err(system(format!("read {name}")))?;
        Ok(bytes)
    }

    /// Gives what has arrived the names and lengths that the state says, and adds
    /// what the state has whole.
    ///
    /// # Errors
    /// When the state can't be right. A peer wrote it.
    pub fn arrange(&self, images: &[proto::ProcessImage]) -> Result<(), ImagesError> {
        let odd = |what: &str| ImagesError::Odd(what.to_owned());
        if images.len() > FILES {
            return Err(odd("it has too many files"));
        }
        let mut seen = std::collections::BTreeSet::new();
        for proto::ProcessImage { name, length, content } in images {
            if !valid_name(name) || !seen.insert(name) {
                return Err(odd("a file has a name that it can't have"));
            }
            match content {
                Some(process_image::Content::Whole(bytes)) => {
                    if bytes.len() as u64 != *length {
                        return Err(odd("a file is not as long as it says"));
                    }
                    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                    let file = self.open_file(name, flags);
                    let mut file = file.map_err(system(format!("make {name}")))?;
                    file.write_all(bytes).map_err(system(format!("write {name}")))?;
                }
                Some(process_image::Content::Stream(key)) => {
                    let key = StreamKey(*key);
                    if *length > self.capacity || !self.has(key) {
                        return Err(odd("a file is of a stream that was not announced"));
                    }
                    let file = self.sink(key).map_err(system("open a stream"))?;
                    file.set_len(*length).map_err(system("give a stream its length"))?;
                    self.opened().remove(&key);
                    let (from, to) = (stream_name(key), name.as_str());
                    renameat(self.directory.as_fd(), from.as_str(), self.directory.as_fd(), to)
                        .map_err(|e| system("name a stream")(e.into()))?;
                }
                None => return Err(odd("a file has no content")),
            }
        }
        Ok(())
    }

    fn has(&self, key: StreamKey) -> bool {
        key.0.checked_sub(FIRST_STREAM).is_some_and(|number| number < self.streams)
    }

    fn inside(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.capacity);
        if self.has(key) && inside { Ok(()) } else { Err(OutOfStream { key, offset, length }) }
    }

    /// The file that a stream arrives in.
    fn sink(&self, key: StreamKey) -> io::Result<Arc<File>> {
        let mut open = self.opened();
        if let Some(file) = open.get(&key) {
            return Ok(Arc::clone(file));
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT;
        let file = Arc::new(self.open_file(&stream_name(key), flags)?);
        open.insert(key, Arc::clone(&file));
        Ok(file)
    }

    fn source(&self, key: StreamKey) -> Option<Arc<File>> {
        self.opened().get(&key).map(Arc::clone)
    }

    /// BLAKE3 over the pages of a stream that are not zero, in ascending order: each
    /// page's index (u64, little endian) and then its bytes, as for guest memory.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn hash(&self, key: StreamKey) -> io::Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        let Some(file) = self.source(key) else { return Ok(*hasher.finalize().as_bytes()) };
        let length = file.metadata()?.len();
        let mut chunk = vec![0; 1 << 20];
        let page_bytes = crate::units::PAGE_BYTES;
        let mut offset = 0;
        while offset < length {
            fill(&file, offset, &mut chunk)?;
            for (index, page) in (offset / PAGE_SIZE..).zip(chunk.chunks(page_bytes)) {
                if page.iter().any(|b| *b != 0) {
                    hasher.update(&index.to_le_bytes());
                    hasher.update(page);
                }
            }
            offset += chunk.len() as u64;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Whether anything of a file is there: a hole says no.
    ///
    /// # Errors
    /// When it can't be looked at.
    pub fn is_hole(&self, key: StreamKey, offset: u64, length: u64) -> io::Result<bool> {
        match self.source(key) {
            Some(file) => memfd::is_hole(&file, offset, offset + length),
            None => Ok(true),
        }
    }
}

fn valid_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    name.len() <= NAME_BYTES
        && name.ends_with(SUFFIX)
        && !name.starts_with('.')
        && name.bytes().all(plain)
}

fn stream_name(key: StreamKey) -> String {
    format!("stream-{}", key.0)
}

/// Reads at `offset`; zeros beyond the end.
fn fill(file: &File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(length) => done += length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    into[done..].fill(0);
    Ok(())
}

impl ChunkSource for Images {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let length = into.len() as u64;
        self.inside(key, offset, length)?;
        let out = OutOfStream { key, offset, length };
        let file = self.source(key).ok_or(out)?;
        fill(&file, offset, into).map_err(|_| out)
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        self.inside(key, offset, length)?;
        self.is_hole(key, offset, length).map_err(|_| OutOfStream { key, offset, length })
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

impl ChunkSink for Images {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let out = OutOfStream { key, offset, length: bytes.len() as u64 };
        self.inside(key, offset, bytes.len() as u64)?;
        let file = self.sink(key).map_err(|_| out)?;
        file.write_all_at(bytes, offset).map_err(|_| out)
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let out = OutOfStream { key, offset, length };
        self.inside(key, offset, length)?;
        let file = self.sink(key).map_err(|_| out)?;
        // What is not there reads as zeros, and nothing was there before.
        match file.metadata() {
            Ok(found) if found.len() > offset => {
                memfd::punch(&file, offset, length).map_err(|_| out)
            }
            Ok(_) => Ok(()),
            Err(_) => Err(out),
        }
    }
}

/// What of growing files was not handed out yet.
#[derive(Debug, Default)]
pub struct Growing {
    /// Number and pages handed out, by name.
    known: BTreeMap<String, (u32, u64)>,
}

impl Growing {
    /// The pages that have become complete since the last call; the last, begun,
    /// ones too when it is `all`.
    ///
    /// # Errors
    /// When there is more than was announced.
    pub fn take(
        &mut self,
        images: &Images,
        all: bool,
    ) -> Result<Vec<(StreamKey, PageBitmap)>, ImagesError> {
        let mut parts = Vec::new();
        for image in images.list()?.iter().filter(|image| image.length > WHOLE_BYTES) {
            // Of others CRIU may write the beginning last.
            if !all && !image.name.starts_with(APPENDED) {
                continue;
            }
            images.fits(image)?;
            let next = u32::try_from(self.known.len()).unwrap_or(u32::MAX);
            if !self.known.contains_key(&image.name) {
                images.announce(next, image)?;
            }
            let (number, given) = self.known.entry(image.name.clone()).or_insert((next, 0));
            let pages =
                if all { image.length.div_ceil(PAGE_SIZE) } else { image.length / PAGE_SIZE };
            if pages > *given {
                let mut bitmap = PageBitmap::none(images.pages());
                bitmap.insert(PageRun { first: PageIndex(*given), count: pages - *given });
                parts.push((StreamKey(FIRST_STREAM + *number), bitmap));
                *given = pages;
            }
        }
        Ok(parts)
    }

    /// The number of each file's stream.
    #[must_use]
    pub fn numbers(&self) -> BTreeMap<String, u32> {
        self.known.iter().map(|(name, (number, _))| (name.clone(), *number)).collect()
    }
}

#[cfg(test)]
mod tests;
