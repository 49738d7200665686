//! One page of the log: its bytes, checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::units::{PAGE_BYTES, PAGE_SIZE};

/// How many pages the log keeps.
pub const PAGES: u64 = 4096;

/// Length of the log as a stream, in bytes: the most its file can take.
pub const LENGTH: u64 = PAGES * PAGE_SIZE;

/// Numbers from here on are refused, so that a position in the log always fits
/// 64 bits: 2^50 pages are 4 exbibytes of console output.
pub(super) const NUMBER_LIMIT: u64 = 1 << 50;

const MAGIC: [u8; 4] = *b"MSL1";
pub(super) const PAGE_HEADER: usize = 32;
pub(super) const RECORD_HEADER: usize = 12;
/// Bytes for records in a page.
pub(super) const SPACE: usize = PAGE_BYTES - PAGE_HEADER;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Goes on with the line of the record before it.
    Continuation,
    /// Its first byte is a line's first.
    LineStart,
    /// Output was lost here.
    Lost,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Continuation => 0,
            Self::LineStart => 1,
            Self::Lost => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Continuation),
            1 => Some(Self::LineStart),
            2 => Some(Self::Lost),
            _ => None,
        }
    }
}

/// One record, borrowed from its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub kind: Kind,
    pub line_unix_ns: u64,
    pub data: &'a [u8],
    /// Where its data ends, counted from the first record of the page.
    pub end: usize,
}

/// The records of one page and the page's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub number: u64,
    /// Bytes of output before this page, those that were lost included.
    pub before: u64,
    records: Vec<u8>,
    /// Where the last record begins, for a page that is being written.
    last: Option<usize>,
}

impl Record<'_> {
    /// Bytes that were lost here; 0 for a record of output.
    pub fn lost(&self) -> u64 {
        match self.kind {
            Kind::Lost => self.data.try_into().map_or(0, u64::from_le_bytes),
            Kind::Continuation | Kind::LineStart => 0,
        }
    }

    /// Bytes of output it stands for.
    pub fn output(&self) -> u64 {
        match self.kind {
            Kind::Lost => self.lost(),
            Kind::Continuation | Kind::LineStart => self.data.len() as u64,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn record_at(records: &[u8], at: usize) -> Option<Record<'_>> {
    let kind = Kind::from_code(*records.get(at + 2)?)?;
    let length = usize::from(u16_at(records, at)?);
    let end = at + RECORD_HEADER + length;
    let data = records.get(at + RECORD_HEADER..end)?;
    let whole = kind != Kind::Lost || length == 8;
    (whole && *records.get(at + 3)? == 0).then_some(())?;
    Some(Record { kind, line_unix_ns: u64_at(records, at + 4)?, data, end })
}

impl Page {
    /// A page without records, after `before` bytes of output.
    pub fn empty(number: u64, before: u64) -> Self {
        Self { number, before, records: Vec::with_capacity(SPACE), last: None }
    }

    /// Bytes of output up to its end, those that were lost included.
    pub fn after(&self) -> u64 {
        self.records().fold(self.before, |sum, record| sum.saturating_add(record.output()))
    }

    /// What `bytes`, found in slot `slot`, say; nothing if anything is wrong with them.
    pub fn parse(bytes: &[u8], slot: u64) -> Option<Self> {
        if bytes.get(..4)? != MAGIC || bytes.get(18..24)?.iter().any(|b| *b != 0) {
            return None;
        }
        let crc = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
        let number = u64_at(bytes, 8)?;
        let end = PAGE_HEADER + usize::from(u16_at(bytes, 16)?);
        let covered = bytes.get(8..end)?;
        if crc32fast::hash(covered) != crc || number >= NUMBER_LIMIT || number % PAGES != slot {
            return None;
        }
        let (before, records) = (u64_at(bytes, 24)?, bytes.get(PAGE_HEADER..end)?.to_vec());
        let page = Self { number, before, records, last: None };
        let parsed = page.records().last().map_or(0, |r| r.end);
        (parsed == page.records.len()).then_some(page)
    }

    /// The page in slot `slot` of `file`, if there is a good one.
    pub fn read(file: &File, slot: u64) -> io::Result<Option<Self>> {
        let mut bytes = [0; PAGE_BYTES];
        let mut have = 0;
        while have < PAGE_BYTES {
            match file.read_at(&mut bytes[have..], slot * PAGE_SIZE + have as u64) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Self::parse(&bytes[..have], slot))
    }

    /// The newest good page of `file`.
    pub fn newest(file: &File) -> io::Result<Option<Self>> {
        let slots = file.metadata()?.len().div_ceil(PAGE_SIZE).min(PAGES);
        let mut newest: Option<Self> = None;
        for slot in 0..slots {
            if let Some(page) = Self::read(file, slot)?
                && newest.as_ref().is_none_or(|n| page.number > n.number)
            {
                newest = Some(page);
            }
        }
        Ok(newest)
    }

    /// Its bytes as they stand in the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PAGE_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.number.to_le_bytes());
        let used = u16::try_from(self.records.len()).expect("less than a page");
        bytes.extend_from_slice(&used.to_le_bytes());
        bytes.resize(24, 0);
        bytes.extend_from_slice(&self.before.to_le_bytes());
        bytes.extend_from_slice(&self.records);
        let crc = crc32fast::hash(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Its slot in the file.
    pub fn slot(&self) -> u64 {
        self.number % PAGES
    }

    /// Bytes its records take.
    pub fn used(&self) -> usize {
        self.records.len()
    }

    /// Its records, up to the first that is not one.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let record = record_at(&self.records, at)?;
            at = record.end;
            Some(record)
        })
    }

    /// How many bytes of such a record still fit: into the last record if it
    /// can grow, else into a new one.
    fn room(&self, grows: bool) -> usize {
        let header = if grows { 0 } else { RECORD_HEADER };
        (SPACE - self.records.len()).saturating_sub(header)
    }

    fn grows(&self, kind: Kind, line_unix_ns: u64) -> Option<usize> {
        let at = self.last?;
        let last = record_at(&self.records, at)?;
        let same = last.kind != Kind::Lost && last.line_unix_ns == line_unix_ns;
        (kind == Kind::Continuation && same).then_some(at)
    }

    /// Appends what fits of `data` and says how much that was.
    pub fn push(&mut self, kind: Kind, line_unix_ns: u64, data: &[u8]) -> usize {
        let grows = self.grows(kind, line_unix_ns);
        let taken = data.len().min(self.room(grows.is_some()));
        if taken == 0 || (kind == Kind::Lost && taken < data.len()) {
            return 0;
        }
        let at = grows.unwrap_or(self.records.len());
        if grows.is_none() {
            self.records.extend_from_slice(&[0, 0, kind.code(), 0]);
            self.records.extend_from_slice(&line_unix_ns.to_le_bytes());
        }
        self.records.extend_from_slice(&data[..taken]);
        let length = u16::try_from(self.records.len() - at - RECORD_HEADER).expect("in a page");
        self.records[at..at + 2].copy_from_slice(&length.to_le_bytes());
        self.last = Some(at);
        taken
    }
}
