//! The daemon's side of the log.

use std::fs::File;
use std::io;

use super::page::{Kind, PAGES, Page, RECORD_HEADER};
use crate::pages::PageBitmap;
use crate::units::{PAGE_SIZE, PageIndex, PageRun};

/// A position in the log. It only ever grows and means the same on every host
/// that the log has moved to: the page's number times 4096, plus how many
/// bytes of the page's records were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(pub u64);

impl Cursor {
    fn new(page: u64, used: usize) -> Self {
        Self(page.saturating_mul(PAGE_SIZE).saturating_add(used as u64))
    }

    fn page(self) -> u64 {
        self.0 / PAGE_SIZE
    }

    fn within(self) -> usize {
        usize::try_from(self.0 % PAGE_SIZE).expect("less than a page")
    }
}

/// A line, a part of one, or a note that output was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The bytes, with the line's end if it was written.
    pub data: Vec<u8>,
    /// `CLOCK_REALTIME` of the first byte of the line, in ns since 1970.
    pub line_unix_ns: u64,
    /// Whether `data` begins the line.
    pub starts_line: bool,
    /// Bytes of output that were lost here; `data` is then empty.
    pub dropped: u64,
    /// Where `data` stands in all the output there ever was, in bytes.
    pub offset: u64,
}

impl Entry {
    /// Drops what is before byte `offset`; whether anything is left.
    fn begin_at(&mut self, offset: u64) -> bool {
        if self.dropped > 0 {
            return self.offset.saturating_add(self.dropped) > offset;
        }
        let skip = usize::try_from(offset.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        if skip > 0 {
            self.data.drain(..skip.min(self.data.len()));
            self.offset = offset;
            self.starts_line = false;
        }
        !self.data.is_empty()
    }
}

/// The state of each slot when it was last taken as clean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleared {
    slots: Vec<Option<Cursor>>,
}

impl Default for Cleared {
    fn default() -> Self {
        Self { slots: vec![None; usize::try_from(PAGES).expect("a few thousand")] }
    }
}

/// Reads the log, while it is written too.
#[derive(Debug)]
pub struct Reader {
    file: File,
    /// Number and use of the newest page seen.
    newest: Option<(u64, usize)>,
}

fn entry(record: &super::page::Record<'_>, skip: usize, offset: u64) -> Entry {
    let lost = record.kind == Kind::Lost;
    Entry {
        data: if lost { Vec::new() } else { record.data[skip..].to_vec() },
        line_unix_ns: record.line_unix_ns,
        starts_line: record.kind == Kind::LineStart && skip == 0,
        dropped: record.lost(),
        offset: offset.saturating_add(skip as u64),
    }
}

impl Reader {
    /// Reads `file`, which was opened for reading.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open(file: File) -> io::Result<Self> {
        let newest = Page::newest(&file)?.map(|page| (page.number, page.used()));
        Ok(Self { file, newest })
    }

    /// Looks for what was written since.
    fn refresh(&mut self) -> io::Result<()> {
        let mut rescan = self.newest.is_none() && self.file.metadata()?.len() > 0;
        while let (Some((number, used)), false) = (self.newest, rescan) {
            match self.read_page(number + 1)? {
                Some(page) if page.number == number + 1 => {
                    self.newest = Some((page.number, page.used()));
                }
                Some(page) if page.number > number => rescan = true,
                Some(_) | None => {
                    if let Some(page) = self.read_page(number)? {
                        rescan = page.number > number;
                        self.newest = Some((number, page.used().max(used)));
                    }
                    break;
                }
            }
        }
        if rescan && let Some(page) = Page::newest(&self.file)? {
            self.newest = Some((page.number, page.used()));
        }
        Ok(())
    }

    /// The good page in the slot of page `number`. Tries again, since the
    /// writer may be at it.
    fn read_page(&self, number: u64) -> io::Result<Option<Page>> {
        for _ in 0..4 {
            if let Some(page) = Page::read(&self.file, number % PAGES)? {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// Where the oldest page that is still kept begins.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn oldest(&mut self) -> io::Result<Cursor> {
        self.refresh()?;
        let newest = self.newest.map_or(0, |(number, _)| number);
        Ok(Cursor::new(newest.saturating_sub(PAGES - 1), 0))
    }

    /// Where the log ends now.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn end(&mut self) -> io::Result<Cursor> {
        self.refresh()?;
        Ok(self.newest.map_or(Cursor(0), |(number, used)| Cursor::new(number, used)))
    }

    /// What follows `cursor`, or the oldest there is if that is gone, and
    /// where to go on. Stops at the first page after `max_bytes` of data; no
    /// entries mean that there is no more yet. Damaged pages are left out.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_from(
        &mut self,
        cursor: Cursor,
        max_bytes: usize,
    ) -> io::Result<(Vec<Entry>, Cursor)> {
        let mut cursor = cursor.max(self.oldest()?);
        let mut entries = Vec::new();
        let mut bytes = 0;
        let Some((newest, _)) = self.newest else { return Ok((entries, cursor)) };
        while cursor.page() <= newest && (bytes < max_bytes || entries.is_empty()) {
            let number = cursor.page();
            if let Some(page) = self.read_page(number)?.filter(|page| page.number == number) {
                let from = cursor.within();
                let mut offset = page.before;
                for record in page.records() {
                    if record.end > from {
                        let skip = from.saturating_sub(record.end - record.data.len());
                        bytes += record.data.len() - skip + RECORD_HEADER;
                        entries.push(entry(&record, skip, offset));
                    }
                    offset = offset.saturating_add(record.output());
                }
                cursor = Cursor::new(number, page.used().max(from));
            }
            if number == newest {
                break;
            }
            cursor = Cursor::new(number + 1, 0);
        }
        Ok((entries, cursor))
    }

    /// Bytes of output so far, those that were lost included.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn output(&mut self) -> io::Result<u64> {
        self.refresh()?;
        let Some((newest, _)) = self.newest else { return Ok(0) };
        Ok(self.read_page(newest)?.map_or(0, |page| page.after()))
    }

    /// The page in which byte `offset` of the output is, or the oldest kept if
    /// that is later: a place to read from to reach the byte.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn find(&mut self, offset: u64) -> io::Result<Cursor> {
        let oldest = self.oldest()?.page();
        let Some((newest, _)) = self.newest else { return Ok(Cursor(0)) };
        let (mut low, mut high) = (oldest, newest);
        // The last page that begins at or before the byte. Of a damaged page
        // nothing is known, so the ones before it are looked at instead.
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            let mut probe = middle;
            let begins = loop {
                match self.read_page(probe)?.filter(|page| page.number == probe) {
                    Some(page) => break Some(page.before),
                    None if probe > low => probe -= 1,
                    None => break None,
                }
            };
            match begins {
                Some(before) if before > offset => high = probe.saturating_sub(1).max(low),
                Some(_) => low = middle,
                None => high = middle - 1,
            }
        }
        Ok(Cursor::new(low, 0))
    }

    /// Output from byte `offset` on, cut so that it begins there; what is not
    /// kept any more is left out.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_output(&mut self, offset: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let mut cursor = self.find(offset)?;
        loop {
            let (mut entries, next) = self.read_from(cursor, max_bytes)?;
            if entries.is_empty() {
                return Ok(entries);
            }
            entries.retain_mut(|entry| entry.begin_at(offset));
            if !entries.is_empty() || next == cursor {
                return Ok(entries);
            }
            cursor = next;
        }
    }

    /// What slot `slot` holds now, as far as the pages' numbers tell.
    fn version(&self, slot: u64) -> Option<Cursor> {
        let (newest, used) = self.newest?;
        let back = (newest % PAGES + PAGES - slot) % PAGES;
        let number = newest.checked_sub(back)?;
        // A page before the newest is written no more.
        Some(Cursor::new(number, if back == 0 { used } else { 0 }))
    }

    /// The slots that differ from what was cleared, as pages of the stream.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn pages_changed_since(&mut self, cleared: &Cleared) -> io::Result<PageBitmap> {
        self.refresh()?;
        let mut changed = PageBitmap::none(PAGES);
        for (slot, was) in (0..PAGES).zip(&cleared.slots) {
            if self.version(slot).is_some_and(|now| Some(now) != *was) {
                changed.insert(PageRun { first: PageIndex(slot), count: 1 });
            }
        }
        Ok(changed)
    }

    /// Takes `pages` as clean; called right before they are read.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn clear(&mut self, cleared: &mut Cleared, pages: &PageBitmap) -> io::Result<()> {
        self.refresh()?;
        for (slot, was) in (0..PAGES).zip(&mut cleared.slots) {
            if pages.contains(PageIndex(slot)) {
                *was = self.version(slot);
            }
        }
        Ok(())
    }
}
