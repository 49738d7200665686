//! The log's file as one stream of a migration.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::page::{LENGTH, PAGES};
use crate::units::{PAGE_BYTES, PAGE_SIZE};
use crate::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey, StreamSpec};

/// Reads and writes the file as a stream of [`LENGTH`] bytes. What the file
/// does not reach is zero. A file that cannot be read or written is reported
/// as bytes that the stream does not have.
#[derive(Debug)]
pub struct LogStream {
    file: File,
    key: StreamKey,
}

impl LogStream {
    /// The stream `key` over `file`, opened for reading, and for writing too
    /// at a destination.
    #[must_use]
    pub fn new(file: File, key: StreamKey) -> Self {
        Self { file, key }
    }

    /// How a manifest announces it.
    #[must_use]
    pub fn spec(&self) -> StreamSpec {
        StreamSpec { key: self.key, name: "serial-log".into(), length: LENGTH, used: 0 }
    }

    /// BLAKE3 over the pages that are not zero, in ascending order: each page's
    /// index (u64, little endian) and then its bytes, as for guest memory.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn hash(&self) -> io::Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        let mut page = [0; PAGE_BYTES];
        let pages = self.file.metadata()?.len().div_ceil(PAGE_SIZE).min(PAGES);
        for index in 0..pages {
            read_or_zero(&self.file, index * PAGE_SIZE, &mut page)?;
            if page.iter().any(|b| *b != 0) {
                hasher.update(&index.to_le_bytes());
                hasher.update(&page);
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }

    fn check(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= LENGTH);
        if key == self.key && inside { Ok(()) } else { Err(OutOfStream { key, offset, length }) }
    }
}

fn read_or_zero(file: &File, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        match file.read_at(into, offset) {
            Ok(0) => {
                into.fill(0);
                break;
            }
            Ok(n) => {
                into = &mut into[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let length = length.min(file.metadata()?.len().saturating_sub(offset));
    let (Ok(at), Ok(len)) = (offset.try_into(), length.try_into()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, at, len) {
        // Not every file system can punch holes.
        Err(nix::errno::Errno::EOPNOTSUPP) => write_zeros(file, offset, length),
        other => Ok(other?),
    }
}

fn write_zeros(file: &File, mut offset: u64, length: u64) -> io::Result<()> {
    let end = offset + length;
    while offset < end {
        let here = usize::try_from(end - offset).unwrap_or(PAGE_BYTES).min(PAGE_BYTES);
        file.write_all_at(&[0; PAGE_BYTES][..here], offset)?;
        offset += here as u64;
    }
    Ok(())
}

impl ChunkSource for LogStream {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let length = into.len() as u64;
        self.check(key, offset, length)?;
        read_or_zero(&self.file, offset, into).map_err(|_| OutOfStream { key, offset, length })
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        self.check(key, offset, length)?;
        let mut page = [0; PAGE_BYTES];
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let here = usize::try_from(end - at).unwrap_or(PAGE_BYTES).min(PAGE_BYTES);
            self.read(key, at, &mut page[..here])?;
            if page[..here].iter().any(|b| *b != 0) {
                return Ok(false);
            }
            at += here as u64;
        }
        Ok(true)
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

impl ChunkSink for LogStream {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let length = bytes.len() as u64;
        self.check(key, offset, length)?;
        self.file.write_all_at(bytes, offset).map_err(|_| OutOfStream { key, offset, length })
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        self.check(key, offset, length)?;
        punch(&self.file, offset, length).map_err(|_| OutOfStream { key, offset, length })
    }
}
