//! A file of records: one is appended and synced at a time, and all of them can be checked.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;
use thiserror::Error;

use crate::clocks::Clocks;
use crate::record::{RECORD_BYTES, Record, RecordError};

/// Why a file of records is not what it was written to be, or cannot be written.
#[derive(Debug, Error)]
pub enum RecordsError {
    /// The system refused.
    #[error("cannot {action} the records: {source}; the kernel's log says why")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A record is damaged.
    #[error("record {index} (at byte {offset}) is damaged: {source}", offset = offset(*index))]
    Damaged {
        /// Its place, from 0.
        index: u64,
        /// What is wrong with it.
        source: RecordError,
    },
    /// A record is at another's place.
    #[error("at the place of record {index} is record {got}: some are missing or doubled")]
    OutOfPlace {
        /// The place, from 0.
        index: u64,
        /// What was found there.
        got: u64,
    },
    /// A clock went back between two records of the same run.
    #[error("the {clock} clock went back by {back_ns} ns between records {} and {index}", index - 1)]
    ClockWentBack {
        /// The later record.
        index: u64,
        /// Which clock.
        clock: &'static str,
        /// By how much, in nanoseconds.
        back_ns: u64,
    },
}

/// The byte at which a record begins.
fn offset(index: u64) -> u64 {
    u64::try_from(RECORD_BYTES).unwrap_or(u64::MAX).saturating_mul(index)
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> RecordsError {
    move |source| RecordsError::Io { action, source }
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Records, all good.
    pub records: u64,
    /// How many times a writer was started.
    pub runs: u64,
    /// The longest time between two neighbours of the same run, in ns of the monotonic clock.
    pub largest_gap_ns: u64,
    /// The record after that gap.
    pub largest_gap_before: u64,
    /// Realtime of the first record, in ns since 1970; 0 when there is none.
    pub first_realtime_ns: u64,
    /// Realtime of the last record, in ns since 1970; 0 when there is none.
    pub last_realtime_ns: u64,
    /// Bytes at the end that are less than a record. Only a power cut leaves some: they were
    /// never synced, so no record is missing.
    pub torn_bytes: u64,
}

/// Checks records one by one.
#[derive(Debug, Default)]
pub struct Tally {
    summary: Summary,
    last: Option<Record>,
}

impl Tally {
    /// The next record.
    ///
    /// # Errors
    /// When it is not the one that must follow.
    pub fn push(&mut self, record: Record) -> Result<(), RecordsError> {
        let index = self.summary.records;
        if record.sequence != index {
            return Err(RecordsError::OutOfPlace { index, got: record.sequence });
        }
        match self.last.filter(|last| last.run == record.run) {
            Some(last) => self.neighbours(&last, &record)?,
            None => self.summary.runs += 1,
        }
        if index == 0 {
            self.summary.first_realtime_ns = record.clocks.realtime_ns;
        }
        self.summary.last_realtime_ns = record.clocks.realtime_ns;
        self.summary.records += 1;
        self.last = Some(record);
        Ok(())
    }

    fn neighbours(&mut self, last: &Record, record: &Record) -> Result<(), RecordsError> {
        let index = record.sequence;
        let later = |clock, before: u64, after: u64| {
            after.checked_sub(before).ok_or_else(|| RecordsError::ClockWentBack {
                index,
                clock,
                back_ns: before - after,
            })
        };
        later("realtime", last.clocks.realtime_ns, record.clocks.realtime_ns)?;
        let gap = later("monotonic", last.clocks.monotonic_ns, record.clocks.monotonic_ns)?;
        if gap > self.summary.largest_gap_ns {
            self.summary.largest_gap_ns = gap;
            self.summary.largest_gap_before = index;
        }
        Ok(())
    }
}

/// Reads and checks every record of a file.
///
/// # Errors
/// At the first record that is not as it was written; when the file cannot be read.
pub fn check(path: &Path) -> Result<Summary, RecordsError> {
    let file = File::open(path).map_err(io_error("open"))?;
    // Clean pages leave the cache, so that what is checked comes from the disk.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(|errno| io_error("drop the cache of")(errno.into()))?;
    check_all(file)
}

fn check_all(file: impl Read) -> Result<Summary, RecordsError> {
    let mut reader = BufReader::with_capacity(256 * RECORD_BYTES, file);
    let mut tally = Tally::default();
    loop {
        let mut bytes = Vec::with_capacity(RECORD_BYTES);
        let limit = u64::try_from(RECORD_BYTES).unwrap_or(u64::MAX);
        reader.by_ref().take(limit).read_to_end(&mut bytes).map_err(io_error("read"))?;
        let Ok(record) = <&[u8; RECORD_BYTES]>::try_from(bytes.as_slice()) else {
            tally.summary.torn_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            return Ok(tally.summary);
        };
        let index = tally.summary.records;
        let record =
            Record::decode(record).map_err(|source| RecordsError::Damaged { index, source })?;
        tally.push(record)?;
    }
}

/// Appends records to a file.
#[derive(Debug)]
pub struct Writer {
    file: File,
    next: u64,
    run: u64,
}

impl Writer {
    /// Opens a file, new or with records, which are all checked first. What a power cut left of
    /// an unfinished record is cut off.
    ///
    /// # Errors
    /// When the records that are there are not good, or the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, RecordsError> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(io_error("open"))?;
        let there = check_all(&file)?;
        let end = offset(there.records);
        file.set_len(end).map_err(io_error("cut the end off"))?;
        file.seek(SeekFrom::Start(end)).map_err(io_error("append to"))?;
        let run = Clocks::now().map_err(|errno| io_error("read the time for")(errno.into()))?;
        Ok(Self { file, next: there.records, run: run.realtime_ns })
    }

    /// Appends one record and waits until the disk has it.
    ///
    /// # Errors
    /// When the disk does not take it. The file is then of no more use.
    pub fn append(&mut self) -> Result<(), RecordsError> {
        let clocks = Clocks::now().map_err(|errno| io_error("read the time for")(errno.into()))?;
        let record = Record { sequence: self.next, run: self.run, clocks };
        self.file.write_all(&record.encode()).map_err(io_error("append to"))?;
        self.file.sync_all().map_err(io_error("sync"))?;
        self.next += 1;
        Ok(())
    }

    /// How many records the file has, all of them synced.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests;
