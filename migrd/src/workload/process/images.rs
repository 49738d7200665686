//! The images of one process tree, in a file system in memory that nobody else
//! sees and that goes with its last descriptor.
//!
//! Large files are streams of a migration: at the source they are read while CRIU
//! still writes them, at the destination they are written under the number of
//! their stream and get their names when the state says them. Small files travel
//! in the state.
//!
//! What was written while the tree ran is in a directory of its own for each round
//! ([`rounds`]); the images of the stop are at the top, and build on those.

pub(super) mod frozen;
pub mod page_server;
pub mod rounds;
mod source;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migr_proto::v1::{self as proto, process_image};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::sys::statfs::fstatfs;

use crate::host_memory::HostMemory;
use crate::sys::{memfd, tmpfs};
use crate::units::PAGE_SIZE;
use crate::workload::{ChunkSink, OutOfStream, StreamKey};
use frozen::Frozen;
use source::Opened;

/// What all image files of CRIU's are called.
const SUFFIX: &str = ".img";
/// How the names of those begin that are only ever appended to: memory.
pub(super) const APPENDED: &str = "pages-";
/// A larger file is a stream of its own (bytes).
pub const WHOLE_BYTES: u64 = 128 << 10;
/// What the whole files of a tree may come to (bytes): they are one message.
const ALL_WHOLE_BYTES: u64 = 16 << 20;
/// The longest name of a file.
const NAME_BYTES: usize = 128;
/// The most files of one tree.
pub const FILES: usize = 65_536;
/// How often, and with how much room (bytes), images that grow are stopped from it.
const STOP_TRIES: u32 = 100;
const STOP_ROOM: u64 = 1 << 20;

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
    /// They are where they are to be, and nobody's to send.
    stay: bool,
    open: Mutex<BTreeMap<StreamKey, Arc<Opened>>>,
    /// What of images is in processes, by the name of the file.
    frozen: Mutex<BTreeMap<String, Arc<Frozen>>>,
    /// Why something that arrived could not be put down, the first time.
    trouble: Mutex<Option<String>>,
}

/// One file of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The round in which it was written, from 1; 0: at the stop.
    pub round: u32,
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
    /// None yet; of at most `streams` streams of `capacity` bytes. All of them take at
    /// most what of this host's memory is free now, so that it is them that fail when
    /// there is no more, and not whoever the kernel kills for it.
    ///
    /// # Errors
    /// When the kernel makes no file system in memory.
    pub fn new(streams: u32, capacity: u64) -> Result<Self, ImagesError> {
        let directory = tmpfs::create(room()).map_err(system("make a file system in memory"))?;
        // The mount is not a directory that files can be made in until it is opened.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = openat(&directory, ".", flags, Mode::empty())
            .map_err(|e| system("open a file system in memory")(e.into()))?;
        Ok(Self::over(directory, streams, capacity))
    }

    /// Those in a directory.
    #[must_use]
    pub fn over(directory: OwnedFd, streams: u32, capacity: u64) -> Self {
        let (open, frozen, trouble) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { directory, capacity, streams, stay: false, open, frozen, trouble }
    }

    /// Those that come to be in a directory of somebody else's, and stay there.
    #[must_use]
    pub fn that_stay(directory: OwnedFd) -> Self {
        Self { stay: true, ..Self::over(directory, 0, 0) }
    }

    /// Whether they are where they are to be, and nobody's to send.
    #[must_use]
    pub fn stay(&self) -> bool {
        self.stay
    }

    /// Their directory.
    ///
    /// # Errors
    /// When there is no room for a descriptor.
    pub fn directory(&self) -> Result<OwnedFd, ImagesError> {
        self.directory.try_clone().map_err(system("duplicate a descriptor"))
    }

    fn opened(&self) -> MutexGuard<'_, BTreeMap<StreamKey, Arc<Opened>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_file(&self, round: u32, name: &str, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let path = rounds::path_of(round, name);
        Ok(openat(self.directory.as_fd(), path.as_str(), flags, Mode::from_bits_truncate(0o600))?
            .into())
    }

    /// Has CRIU fail that writes them: there is no room any more. It lets go of the
    /// tree then, which takes it much less time than to go on. Where others have files
    /// it is left alone.
    ///
    /// # Errors
    /// When the kernel refuses, or they grow faster than they can be stopped.
    pub fn stop_growing(&self) -> Result<(), ImagesError> {
        if self.stay {
            return Ok(());
        }
        for _ in 0..STOP_TRIES {
            let found = fstatfs(&self.directory).map_err(|e| system("measure images")(e.into()))?;
            let block = u64::try_from(found.block_size()).unwrap_or(PAGE_SIZE);
            let used = found.blocks().saturating_sub(found.blocks_free()).saturating_mul(block);
            match tmpfs::resize(&self.directory, used.saturating_add(STOP_ROOM)) {
                // More was written meanwhile than there was to be room for.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                other => return other.map_err(system("stop images from growing")),
            }
        }
        Err(ImagesError::Odd("they grow faster than they can be stopped".into()))
    }

    /// The image files of a round that are there now, by name.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn list(&self, round: u32) -> Result<Vec<Image>, ImagesError> {
        self.list_of(round, |_| true)
    }

    /// Those of a name that is `wanted`: nothing is asked of the others.
    fn list_of(
        &self,
        round: u32,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<Image>, ImagesError> {
        let failed = |e: nix::Error| system("list the images")(e.into());
        let again = self.open_directory(round)?;
        let mut directory = Dir::from_fd(again).map_err(failed)?;
        let mut found = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy();
            if !name.ends_with(SUFFIX) || !wanted(&name) {
                continue;
            }
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            let path = rounds::path_of(round, &name);
            let measured = match fstatat(&self.directory, path.as_str(), flags) {
                // CRIU has taken it away again.
                Err(nix::Error::ENOENT) => continue,
                other => other.map_err(|e| system("measure an image")(e.into()))?,
            };
            if SFlag::from_bits_truncate(measured.st_mode & libc::S_IFMT) != SFlag::S_IFREG {
                continue;
            }
            let length = u64::try_from(measured.st_size).unwrap_or(0);
            found.push(Image { round, name: name.into_owned(), length });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The directory of a round, with a position of its own.
    fn open_directory(&self, round: u32) -> Result<OwnedFd, ImagesError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let path = rounds::path_of(round, ".");
        let opened = openat(self.directory.as_fd(), path.as_str(), flags, Mode::empty());
        opened.map_err(|e| system("open the images")(e.into()))
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
        streams: &BTreeMap<(u32, String), u32>,
    ) -> Result<Vec<proto::ProcessImage>, ImagesError> {
        let mut all = 0;
        let mut wire = Vec::new();
        if self.stay {
            return Ok(wire);
        }
        for Image { round, name, length } in images {
            let content = match streams.get(&(*round, name.clone())) {
                Some(number) => process_image::Content::Stream(FIRST_STREAM + number),
                None => {
                    all += length;
                    if all > ALL_WHOLE_BYTES {
                        return Err(ImagesError::Odd("its small images are too many".into()));
                    }
                    process_image::Content::Whole(self.read_whole(*round, name)?.into())
                }
            };
            wire.push(proto::ProcessImage {
                name: name.clone(),
                length: *length,
                content: Some(content),
                round: *round,
            });
        }
        Ok(wire)
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
        self.make_rounds(images)?;
        let mut seen = std::collections::BTreeSet::new();
        for proto::ProcessImage { name, length, content, round } in images {
            if !is_image_name(name) || !seen.insert((round, name)) {
                return Err(odd("a file has a name that it can't have"));
            }
            match content {
                Some(process_image::Content::Whole(bytes)) => {
                    if bytes.len() as u64 != *length {
                        return Err(odd("a file is not as long as it says"));
                    }
                    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                    let file = self.open_file(*round, name, flags);
                    let mut file = file.map_err(system(format!("make {name}")))?;
                    file.write_all(bytes).map_err(system(format!("write {name}")))?;
                }
                Some(process_image::Content::Stream(key)) => {
                    let key = StreamKey(*key);
                    if *length > self.capacity || !self.has(key) {
                        return Err(odd("a file is of a stream that was not announced"));
                    }
                    let file = self.sink(key).map_err(system("open a stream"))?;
                    file.file.set_len(*length).map_err(system("give a stream its length"))?;
                    self.opened().remove(&key);
                    let (from, to) = (stream_name(key), rounds::path_of(*round, name));
                    let directory = self.directory.as_fd();
                    renameat(directory, from.as_str(), directory, to.as_str())
                        .map_err(|e| system("name a stream")(e.into()))?;
                }
                None => return Err(odd("a file has no content")),
            }
        }
        Ok(())
    }

    /// Remembers why something could not be put down.
    fn note(&self, error: &io::Error) {
        let what = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::ENOMEM) => {
                "there is no memory left for the images of its processes: free memory on that \
                 host, or choose another"
                    .to_owned()
            }
            _ => format!("the images of its processes can't be written: {error}"),
        };
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.get_or_insert(what);
    }

    fn has(&self, key: StreamKey) -> bool {
        key.0.checked_sub(FIRST_STREAM).is_some_and(|number| number < self.streams)
    }

    fn inside(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.capacity);
        if self.has(key) && inside { Ok(()) } else { Err(OutOfStream { key, offset, length }) }
    }

    /// The file that a stream arrives in.
    fn sink(&self, key: StreamKey) -> io::Result<Arc<Opened>> {
        let mut open = self.opened();
        if let Some(opened) = open.get(&key) {
            return Ok(Arc::clone(opened));
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT;
        let file = self.open_file(0, &stream_name(key), flags)?;
        let opened = Arc::new(Opened { file, frozen: None });
        open.insert(key, Arc::clone(&opened));
        Ok(opened)
    }
}

/// What images may take of this host's memory, in bytes.
fn room() -> u64 {
    let (total, available) = HostMemory::of_this_host().read();
    // What it takes to see that there is none left.
    let room = available.saturating_sub(total / 64);
    if total == 0 { 1 << 46 } else { room.max(PAGE_SIZE) }
}

/// Whether an image can have that name.
#[must_use]
pub fn is_image_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    name.len() <= NAME_BYTES
        && name.ends_with(SUFFIX)
        && !name.starts_with('.')
        && name.bytes().all(plain)
}

fn stream_name(key: StreamKey) -> String {
    format!("stream-{}", key.0)
}

impl ChunkSink for Images {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let out = OutOfStream { key, offset, length: bytes.len() as u64 };
        self.inside(key, offset, bytes.len() as u64)?;
        let put = self.sink(key).and_then(|opened| opened.file.write_all_at(bytes, offset));
        put.map_err(|error| {
            self.note(&error);
            out
        })
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let out = OutOfStream { key, offset, length };
        self.inside(key, offset, length)?;
        let opened = self.sink(key).map_err(|_| out)?;
        let file = &opened.file;
        // What is not there reads as zeros, and nothing was there before.
        match file.metadata() {
            Ok(found) if found.len() > offset => {
                memfd::punch(file, offset, length).map_err(|_| out)
            }
            Ok(_) => Ok(()),
            Err(_) => Err(out),
        }
    }

    fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests;
