//! Images as a source: they are read while CRIU writes them, and what was left in
//! processes is read there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};

use migr_proto::v1 as proto;
use nix::fcntl::OFlag;

use super::frozen::Frozen;
use super::{ALL_WHOLE_BYTES, FIRST_STREAM, Image, Images, ImagesError, system};
use crate::pages::PageBitmap;
use crate::sys::memfd;
use crate::units::PAGE_SIZE;
use crate::workload::{ChunkSource, OutOfStream, StreamKey};

/// The file of a stream.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    /// What of it is in processes instead.
    pub(super) frozen: Option<Arc<Frozen>>,
}

impl Opened {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.frozen {
            Some(frozen) => {
                frozen.read(offset, into, |offset, into| fill(&self.file, offset, into))
            }
            None => fill(&self.file, offset, into),
        }
    }
}

impl Images {
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
        let opened = self.open_source(image.round, &image.name)?;
        self.opened().insert(StreamKey(FIRST_STREAM + number), Arc::new(opened));
        Ok(())
    }

    fn open_source(&self, round: u32, name: &str) -> Result<Opened, ImagesError> {
        let file = self.open_file(round, name, OFlag::O_RDONLY);
        let file = file.map_err(system(format!("open {name}")))?;
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let frozen = frozen.get(name).filter(|_| round == 0).map(Arc::clone);
        Ok(Opened { file, frozen })
    }

    /// A whole file, which is a small one.
    pub(super) fn read_whole(&self, round: u32, name: &str) -> Result<Vec<u8>, ImagesError> {
        let opened = self.open_source(round, name)?;
        let read = || -> io::Result<_> {
            let length = opened.file.metadata()?.len().min(ALL_WHOLE_BYTES);
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
            opened.read(0, &mut bytes)?;
            Ok(bytes)
        };
        read().map_err(system(format!("read {name}")))
    }

    /// Whether it is not longer than was announced.
    ///
    /// # Errors
    /// When it is.
    pub fn fits(&self, image: &Image) -> Result<(), ImagesError> {
        self.allows(image.length)
    }

    /// Whether a file may be of that length.
    pub(super) fn allows(&self, length: u64) -> Result<(), ImagesError> {
        if length <= self.capacity {
            return Ok(());
        }
        let mib = |bytes: u64| format!("{} MiB in one file", bytes >> 20);
        Err(ImagesError::Grown { what: mib(length), allowed: mib(self.capacity) })
    }

    /// From now on parts of the file of that name may be in processes.
    pub(super) fn keep_frozen(&self, name: &str) -> Arc<Frozen> {
        let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(frozen.entry(name.to_owned()).or_default())
    }

    /// Those of `parts` that are not in processes.
    #[must_use]
    pub fn without_frozen(
        &self,
        parts: Vec<(StreamKey, PageBitmap)>,
    ) -> Vec<(StreamKey, PageBitmap)> {
        let without = |(key, mut pages): (StreamKey, PageBitmap)| {
            if let Some(frozen) = self.source(key).and_then(|opened| opened.frozen.clone()) {
                pages.subtract(&frozen.pages(pages.pages()));
            }
            (key, pages)
        };
        parts.into_iter().map(without).filter(|(_, pages)| !pages.is_empty()).collect()
    }

    /// What of the streams of these numbers is in processes: where, and how many bytes.
    #[must_use]
    pub fn stays(&self, streams: &BTreeMap<(u32, String), u32>) -> (Vec<proto::ProcessStay>, u64) {
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = frozen.iter().filter(|(name, _)| streams.contains_key(&(0, (*name).clone())));
        let sent: Vec<_> = sent.map(|(_, frozen)| frozen).collect();
        let bytes = sent.iter().map(|frozen| frozen.bytes()).sum();
        let places = sent.iter().flat_map(|frozen| frozen.places());
        let stay = |(process, range): (u32, std::ops::Range<u64>)| proto::ProcessStay {
            process,
            address: range.start,
            length: range.end - range.start,
        };
        (places.map(stay).collect(), bytes)
    }

    pub(super) fn source(&self, key: StreamKey) -> Option<Arc<Opened>> {
        self.opened().get(&key).map(Arc::clone)
    }

    /// BLAKE3 over the pages of a stream that are not zero, in ascending order: each
    /// page's index (u64, little endian) and then its bytes, as for guest memory.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn hash(&self, key: StreamKey) -> io::Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        let Some(opened) = self.source(key) else { return Ok(*hasher.finalize().as_bytes()) };
        let length = opened.file.metadata()?.len();
        let mut chunk = vec![0; 1 << 20];
        let page_bytes = crate::units::PAGE_BYTES;
        let mut offset = 0;
        while offset < length {
            opened.read(offset, &mut chunk)?;
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
            Some(opened) if opened.frozen.as_ref().is_some_and(|f| f.has(offset, length)) => {
                Ok(false)
            }
            Some(opened) => memfd::is_hole(&opened.file, offset, offset + length),
            None => Ok(true),
        }
    }
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
        let opened = self.source(key).ok_or(out)?;
        opened.read(offset, into).map_err(|_| out)
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        self.inside(key, offset, length)?;
        self.is_hole(key, offset, length).map_err(|_| OutOfStream { key, offset, length })
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}
