//! Where files are in the stream, and what a stretch of it is made of.

use std::ops::Range;

use super::{pages_of, system};
use crate::sys::memfd;
use crate::units::{PAGE_BYTES, PAGE_SIZE};

/// How much is hashed at once (bytes).
const CHUNK: usize = 1 << 20;

/// A file in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Its first page.
    pub(super) first: u64,
    /// Its length in bytes; not 0.
    pub(super) size: u64,
    /// Number of the file.
    pub(super) number: u32,
}

impl Extent {
    fn start(&self) -> u64 {
        self.first * PAGE_SIZE
    }

    /// Behind its last page.
    pub(super) fn end(&self) -> u64 {
        (self.first + pages_of(self.size)) * PAGE_SIZE
    }
}

/// Part of a stretch: of a file, or of none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) extent: Option<Extent>,
    /// Where it begins: in the file if it is of one, else in the stream.
    pub(super) at: u64,
    /// Where it is in the stretch.
    pub(super) range: Range<usize>,
}

impl Piece {
    /// How much of it is before the end of its file; the rest are zeros.
    pub(super) fn within(&self) -> usize {
        let length = self.range.len();
        match self.extent {
            Some(extent) => usize::try_from(extent.size.saturating_sub(self.at))
                .map_or(length, |l| l.min(length)),
            None => length,
        }
    }
}

/// The files of a stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Extents(Vec<Extent>);

impl Extents {
    /// Of files that do not overlap.
    pub(super) fn new(mut all: Vec<Extent>) -> Self {
        all.sort_by_key(|extent| extent.first);
        Self(all)
    }

    pub(super) fn all(&self) -> &[Extent] {
        &self.0
    }

    /// Adds a file that comes after all others.
    pub(super) fn push(&mut self, last: Extent) {
        self.0.push(last);
    }

    /// What the `length` bytes of the stream from `offset` on are made of.
    pub(super) fn pieces(&self, offset: u64, length: usize) -> Vec<Piece> {
        let end = offset.saturating_add(length as u64);
        let mut next = self.0.partition_point(|extent| extent.end() <= offset);
        let (mut at, mut pieces) = (offset, Vec::new());
        while at < end {
            let here = self.0.get(next).copied();
            let (extent, stop) = match here {
                Some(extent) if extent.start() <= at => (Some(extent), extent.end()),
                Some(later) => (None, later.start()),
                None => (None, end),
            };
            let stop = stop.min(end);
            let place = |at: u64| usize::try_from(at - offset).unwrap_or(length);
            pieces.push(Piece {
                extent,
                at: extent.map_or(at, |extent| at - extent.start()),
                range: place(at)..place(stop),
            });
            if extent.is_some_and(|extent| stop == extent.end()) {
                next += 1;
            }
            at = stop;
        }
        pieces
    }
}

/// BLAKE3 over those of `pages` (first and count) that are not zero: each page's index
/// (u64, little endian) and then its bytes, as for guest memory. `read` fills a buffer
/// from an offset of the stream; `is_hole` says that there is nothing in a range.
pub(super) fn hash_pages<E>(
    hasher: &mut blake3::Hasher,
    (first, count): (u64, u64),
    mut is_hole: impl FnMut(u64, u64) -> Result<bool, E>,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut chunk = vec![0; CHUNK];
    let (mut at, end) = (first * PAGE_SIZE, (first + count) * PAGE_SIZE);
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        if !is_hole(at, length as u64)? {
            read(at, &mut chunk[..length])?;
            for (index, page) in (at / PAGE_SIZE..).zip(chunk[..length].chunks(PAGE_BYTES)) {
                if page.iter().any(|byte| *byte != 0) {
                    hasher.update(&index.to_le_bytes());
                    hasher.update(page);
                }
            }
        }
        at += length as u64;
    }
    Ok(())
}

/// The stretches of a file between two offsets in it that hold something. `path` is for
/// what is said when that can't be seen.
pub(super) fn data_of(
    file: &std::fs::File,
    (from, size): (u64, u64),
    path: &std::path::Path,
) -> Result<Vec<(u64, u64)>, super::RootfsError> {
    let mut found = Vec::new();
    let mut at = from;
    while at < size {
        match memfd::next_data(file, at, size) {
            Ok(Some((start, stop))) => {
                found.push((start, stop));
                at = stop.max(at + 1);
            }
            Ok(None) => break,
            // Not every file system knows holes.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                found.push((at, size));
                break;
            }
            Err(error) => return Err(system("look for holes in", path)(error)),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_is_made_of_files_and_of_what_is_between_them() {
        let extent = |first, size, number| Extent { first, size, number };
        let (a, b) = (extent(2, 4097, 1), extent(4, 10, 2));
        let extents = Extents::new(vec![b, a]);
        let of = |offset, length| {
            let pieces = extents.pieces(offset, length);
            let told = |p: Piece| (p.extent.map(|e| e.number), p.at, p.range.len(), p.within());
            pieces.into_iter().map(told).collect::<Vec<_>>()
        };
        assert_eq!(of(0, 8192), [(None, 0, 8192, 8192)]);
        assert_eq!(
            of(4096, 5 * 4096),
            [
                (None, 4096, 4096, 4096),
                (Some(1), 0, 8192, 4097),
                (Some(2), 0, 4096, 10),
                (None, 5 * 4096, 4096, 4096),
            ]
        );
        assert_eq!(of(3 * 4096 + 5, 10), [(Some(1), 4101, 10, 0)]);
        assert_eq!(of(2 * 4096, 0), []);
    }
}
