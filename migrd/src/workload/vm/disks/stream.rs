//! The bytes of disks, as streams of a migration.
//!
//! A stream is as long as its disk, filled up with zeros to a whole page. What
//! the image's file has no blocks for is a hole: it is not sent. Storage may
//! take its time, so a thread of the runtime is handed on before it is waited
//! for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::config::index_of;
use super::error::DiskError;
use crate::pages::PageBitmap;
use crate::sys::memfd;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};
use crate::workload::storage::waiting;
use crate::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey};

/// Bytes read at once to see whether they are zero.
const LOOK_BYTES: usize = 64 << 10;

/// What happens to the bytes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// They are read.
    Read,
    /// They arrive.
    Fill,
    /// They arrive and are there already: they must be the same.
    Compare,
}

/// One disk.
#[derive(Debug)]
struct DiskFile {
    file: File,
    path: PathBuf,
    bytes: u64,
    used_as: Use,
    /// Pages that were found to have blocks, or that arrived.
    known: Mutex<PageBitmap>,
    /// What arrived is not what was there.
    differs: AtomicBool,
}

/// The disks of a VM.
#[derive(Debug, Default)]
pub struct DiskStreams {
    disks: Vec<DiskFile>,
    /// Nothing more may arrive.
    closed: AtomicBool,
}

impl DiskFile {
    fn known(&self) -> MutexGuard<'_, PageBitmap> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much of a range the file has; the rest are the zeros after its end.
    fn within(&self, offset: u64, length: u64) -> u64 {
        length.min(self.bytes.saturating_sub(offset))
    }

    /// The first stretch with blocks at or after `from` and before `end`.
    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
        match memfd::next_data(&self.file, from, end) {
            // Neither block devices nor every file system know holes.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                Ok((from < end).then_some((from, end)))
            }
            other => other,
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let within = self.within(offset, into.len() as u64);
        let within = usize::try_from(within).map_err(io::Error::other)?;
        let (bytes, beyond) = into.split_at_mut(within);
        beyond.fill(0);
        self.file.read_exact_at(bytes, offset)
    }

    fn is_zero(&self, offset: u64, length: u64) -> io::Result<bool> {
        let end = offset + self.within(offset, length);
        let mut buffer = vec![0; LOOK_BYTES];
        let mut from = offset;
        while let Some((start, stop)) = self.next_data(from, end)? {
            from = start.max(from);
            while from < stop {
                let here = usize::try_from(stop - from).unwrap_or(LOOK_BYTES).min(LOOK_BYTES);
                self.read(from, &mut buffer[..here])?;
                if buffer[..here].iter().any(|b| *b != 0) {
                    return Ok(false);
                }
                from += here as u64;
            }
        }
        Ok(true)
    }

    fn allocated(&self) -> io::Result<PageBitmap> {
        let mut known = self.known();
        // Blocks that were found once stay, so only the gaps are looked at.
        let mut gaps = PageBitmap::all(known.pages());
        gaps.subtract(&known);
        for gap in gaps.runs() {
            let mut from = gap.offset();
            let end = from + self.within(from, gap.len_bytes());
            while let Some((start, stop)) = self.next_data(from, end)? {
                let (first, last) = (start / PAGE_SIZE, stop.div_ceil(PAGE_SIZE));
                known.insert(PageRun { first: PageIndex(first), count: last - first });
                from = stop;
            }
        }
        Ok(known.clone())
    }

    fn arrived(&self, offset: u64, length: u64) {
        let first = offset / PAGE_SIZE;
        let count = (offset + length).div_ceil(PAGE_SIZE) - first;
        self.known().insert(PageRun { first: PageIndex(first), count });
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let within = self.within(offset, bytes.len() as u64);
        let inside = &bytes[..usize::try_from(within).map_err(io::Error::other)?];
        match self.used_as {
            Use::Read => return Err(io::ErrorKind::PermissionDenied.into()),
            Use::Fill => self.file.write_all_at(inside, offset)?,
            Use::Compare => {
                let mut ours = vec![0; bytes.len()];
                self.read(offset, &mut ours)?;
                if ours != bytes {
                    self.differs.store(true, Ordering::Relaxed);
                }
            }
        }
        self.arrived(offset, bytes.len() as u64);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let within = self.within(offset, length);
        match self.used_as {
            Use::Read => return Err(io::ErrorKind::PermissionDenied.into()),
            Use::Fill => self.punch(offset, within)?,
            Use::Compare => {
                if !self.is_zero(offset, length)? {
                    self.differs.store(true, Ordering::Relaxed);
                }
            }
        }
        self.arrived(offset, length);
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        // Most of it was never written, and then there is nothing to do.
        if length == 0 || self.next_data(offset, offset + length)?.is_none() {
            return Ok(());
        }
        match memfd::punch(&self.file, offset, length) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                let (mut from, end) = (offset, offset + length);
                while from < end {
                    let here = usize::try_from(end - from).unwrap_or(PAGE_BYTES).min(PAGE_BYTES);
                    self.file.write_all_at(&[0; PAGE_BYTES][..here], from)?;
                    from += here as u64;
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Whether what was there already is what has arrived: pages that did not
    /// come are holes at the source.
    fn is_same(&self) -> io::Result<bool> {
        let mut rest = PageBitmap::all(self.known().pages());
        rest.subtract(&self.known());
        for run in rest.runs() {
            if !self.is_zero(run.offset(), run.len_bytes())? {
                return Ok(false);
            }
        }
        Ok(!self.differs.load(Ordering::Relaxed))
    }
}

impl DiskStreams {
    /// Adds the next disk: an open file of `bytes` bytes.
    pub fn push(&mut self, file: File, path: PathBuf, bytes: u64, used_as: Use) {
        let known = Mutex::new(PageBitmap::none(bytes.div_ceil(PAGE_SIZE)));
        let differs = AtomicBool::new(false);
        self.disks.push(DiskFile { file, path, bytes, used_as, known, differs });
    }

    /// Whether `key` is one of them.
    #[must_use]
    pub fn has(&self, key: StreamKey) -> bool {
        self.disk(key).is_some()
    }

    fn disk(&self, key: StreamKey) -> Option<&DiskFile> {
        self.disks.get(index_of(key)?)
    }

    /// The disk of a range that it has.
    fn range(&self, key: StreamKey, offset: u64, length: u64) -> Result<&DiskFile, OutOfStream> {
        let out = OutOfStream { key, offset, length };
        let disk = self.disk(key).ok_or(out)?;
        let end = offset.checked_add(length).ok_or(out)?;
        if end <= disk.bytes.next_multiple_of(PAGE_SIZE) { Ok(disk) } else { Err(out) }
    }

    /// Does something with a range; a file that fails is told as bytes that the
    /// stream does not have.
    fn on<T>(
        &self,
        (key, offset, length): (StreamKey, u64, u64),
        work: impl FnOnce(&DiskFile) -> io::Result<T>,
    ) -> Result<T, OutOfStream> {
        let disk = self.range(key, offset, length)?;
        work(disk).map_err(|error| {
            tracing::warn!(path = %disk.path.display(), offset, length, %error, "a disk failed");
            OutOfStream { key, offset, length }
        })
    }

    /// The pages of a disk that have blocks in its file.
    ///
    /// # Errors
    /// What lseek(2) says.
    pub fn allocated(&self, key: StreamKey) -> io::Result<PageBitmap> {
        self.disk(key).map_or_else(|| Ok(PageBitmap::none(0)), DiskFile::allocated)
    }

    /// BLAKE3 over the pages that are not zero, in ascending order: each page's
    /// index (u64, little endian) and then its bytes, as for guest memory.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn hash(&self, key: StreamKey) -> io::Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        let Some(disk) = self.disk(key) else { return Ok(*hasher.finalize().as_bytes()) };
        let mut page = vec![0; PAGE_BYTES];
        for run in disk.allocated()?.runs() {
            for index in run.first.0..run.first.0 + run.count {
                disk.read(PageIndex(index).offset(), &mut page)?;
                if page.iter().any(|b| *b != 0) {
                    hasher.update(&index.to_le_bytes());
                    hasher.update(&page);
                }
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Makes durable what has arrived so far.
    ///
    /// # Errors
    /// The first disk that does not take it.
    pub fn sync(&self) -> Result<(), DiskError> {
        for disk in self.disks.iter().filter(|disk| disk.used_as == Use::Fill) {
            disk.file.sync_data().map_err(|source| DiskError::Io {
                what: "write back",
                path: disk.path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Everything has arrived: takes nothing more, makes it durable, and sees
    /// that what was there before is the same.
    ///
    /// # Errors
    /// The first disk of which that is not so.
    pub fn close(&self) -> Result<(), DiskError> {
        self.closed.store(true, Ordering::Release);
        self.sync()?;
        for disk in self.disks.iter().filter(|disk| disk.used_as == Use::Compare) {
            let path = disk.path.clone();
            match disk.is_same() {
                Ok(true) => {}
                Ok(false) => return Err(DiskError::Differs { path }),
                Err(source) => return Err(DiskError::Io { what: "compare", path, source }),
            }
        }
        Ok(())
    }

    /// Lets go of the locks that the files may have.
    pub fn unlock(&self) {
        for disk in &self.disks {
            if let Err(error) = disk.file.unlock() {
                tracing::warn!(path = %disk.path.display(), %error, "it stays locked");
            }
        }
    }
}

impl ChunkSource for DiskStreams {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let length = into.len() as u64;
        self.on((key, offset, length), |disk| disk.read(offset, into))
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        self.on((key, offset, length), |disk| disk.is_zero(offset, length))
    }

    fn waits(&self, key: StreamKey) -> bool {
        self.has(key)
    }
}

impl ChunkSink for DiskStreams {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let length = bytes.len() as u64;
        if self.closed.load(Ordering::Acquire) {
            return Err(OutOfStream { key, offset, length });
        }
        waiting(|| self.on((key, offset, length), |disk| disk.write(offset, bytes)))
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        if self.closed.load(Ordering::Acquire) {
            return Err(OutOfStream { key, offset, length });
        }
        waiting(|| self.on((key, offset, length), |disk| disk.zero(offset, length)))
    }
}
