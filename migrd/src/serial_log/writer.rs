//! The side of the log that runs in the VMM child.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::page::{Kind, NUMBER_LIMIT, Page};
use crate::units::PAGE_SIZE;

/// Some output of the guest: at most one line, or a part of one.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The bytes, with the line's end if it is there.
    pub bytes: &'a [u8],
    /// `CLOCK_REALTIME` of the first byte of the line, in ns since 1970.
    pub line_unix_ns: u64,
    /// Whether `bytes` begins the line.
    pub starts_line: bool,
}

/// Appends to the log. What cannot be written is counted, and the count is
/// written before the next output that can: a full disk never stops a VM.
#[derive(Debug)]
pub struct Writer {
    file: File,
    /// The page being filled.
    page: Page,
    /// What of it is in the file.
    written: Page,
    /// Bytes of output in `page` that are not in the file yet.
    pending: u64,
    /// Bytes lost that no record in the file accounts for.
    lost: u64,
    /// Bytes lost that a record in `page`, not in the file yet, accounts for.
    noted: u64,
}

impl Writer {
    /// Goes on after the newest page of `file`, which was opened for reading
    /// and writing, not for appending. An empty file is an empty log.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open(file: File) -> io::Result<Self> {
        let newest = Page::newest(&file)?;
        let (number, before) = newest.map_or((0, 0), |n| (n.number + 1, n.after()));
        let page = Page::empty(number, before);
        Ok(Self { file, written: page.clone(), page, pending: 0, lost: 0, noted: 0 })
    }

    /// Bytes lost that the log does not account for yet.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: File) {
        self.file = file;
    }

    /// Appends `pieces`, in order. A reader sees them when this returns.
    pub fn append(&mut self, pieces: &[Piece<'_>]) {
        let mut works = true;
        for piece in pieces.iter().filter(|piece| !piece.bytes.is_empty()) {
            works = works && self.note_lost(piece.line_unix_ns);
            if works {
                let kind = if piece.starts_line { Kind::LineStart } else { Kind::Continuation };
                works = self.put(kind, piece.line_unix_ns, piece.bytes);
            } else {
                self.lost = self.lost.saturating_add(piece.bytes.len() as u64);
            }
        }
        self.write_out();
    }

    fn note_lost(&mut self, unix_ns: u64) -> bool {
        if self.lost == self.noted {
            return true;
        }
        let lost = self.lost.to_le_bytes();
        if self.page.push(Kind::Lost, unix_ns, &lost) == 0 {
            if !self.write_out() || !self.next_page() {
                return false;
            }
            self.page.push(Kind::Lost, unix_ns, &lost);
        }
        self.noted = self.lost;
        true
    }

    /// Whether all of `data` is in `page` or before it; what is not is lost.
    fn put(&mut self, mut kind: Kind, line_unix_ns: u64, mut data: &[u8]) -> bool {
        loop {
            let taken = self.page.push(kind, line_unix_ns, data);
            self.pending += taken as u64;
            data = &data[taken..];
            if data.is_empty() {
                return true;
            }
            if taken > 0 {
                kind = Kind::Continuation;
            }
            if !self.write_out() || !self.next_page() {
                self.lost = self.lost.saturating_add(data.len() as u64);
                return false;
            }
        }
    }

    fn next_page(&mut self) -> bool {
        let number = self.page.number + 1;
        if number >= NUMBER_LIMIT {
            return false;
        }
        self.page = Page::empty(number, self.page.after());
        self.written = self.page.clone();
        true
    }

    /// Brings the file up to `page`, or `page` back to what is in the file.
    fn write_out(&mut self) -> bool {
        if self.page == self.written {
            return true;
        }
        let at = self.page.slot() * PAGE_SIZE;
        let written = self.file.write_all_at(&self.page.encode(), at).is_ok();
        if written {
            self.written = self.page.clone();
            self.lost -= self.noted;
        } else {
            // A write that failed half way left a page nobody can read; where
            // it failed for want of space, its first bytes have their space.
            if self.written.used() > 0 {
                let _ = self.file.write_all_at(&self.written.encode(), at);
            }
            self.page = self.written.clone();
            self.lost = self.lost.saturating_add(self.pending);
        }
        self.pending = 0;
        self.noted = 0;
        written
    }
}
