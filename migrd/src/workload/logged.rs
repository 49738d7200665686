//! What a workload has printed, read from its log.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use super::{Output, WorkloadError};
use crate::serial_log::Reader;

/// The log of one workload, alive or not.
pub struct Logged {
    /// `None` for a log that cannot be read.
    reader: Option<Mutex<Reader>>,
    /// Changes with every write to the log; closed when nobody writes any more.
    written: watch::Receiver<u64>,
}

fn failed(doing: &str) -> impl Fn(std::io::Error) -> WorkloadError + '_ {
    move |error| WorkloadError::caused(format!("cannot {doing}: {error}"), error)
}

impl Logged {
    /// The one at `path`, which is written to.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn open(path: &Path, written: watch::Receiver<u64>) -> Result<Self, WorkloadError> {
        let file = File::open(path).map_err(failed("open the log"))?;
        let reader = Reader::open(file).map_err(failed("read the log"))?;
        Ok(Self { reader: Some(Mutex::new(reader)), written })
    }

    /// The one at `path`, which nobody writes to any more.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn left_behind(path: &Path) -> Result<Self, WorkloadError> {
        Self::open(path, watch::channel(0).1)
    }

    /// One that cannot be read.
    #[must_use]
    pub fn silent() -> Self {
        Self { reader: None, written: watch::channel(0).1 }
    }

    /// As for [`super::Terminal::read`].
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(&self, from: u64, max: usize) -> Result<Vec<Output>, WorkloadError> {
        let Some(reader) = &self.reader else { return Ok(Vec::new()) };
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = reader.read_output(from, max).map_err(failed("read the log"))?;
        Ok(entries
            .into_iter()
            .filter(|entry| !entry.data.is_empty())
            .map(|entry| Output {
                offset: entry.offset,
                data: entry.data,
                line_unix_ns: i64::try_from(entry.line_unix_ns).unwrap_or(i64::MAX),
                starts_line: entry.starts_line,
            })
            .collect())
    }

    /// Output so far, in bytes.
    #[must_use]
    pub fn end(&self) -> u64 {
        let Some(reader) = &self.reader else { return 0 };
        reader.lock().unwrap_or_else(PoisonError::into_inner).output().unwrap_or(0)
    }

    /// Resolves when there may be more than `seen` bytes.
    pub async fn more_than(&self, seen: u64) {
        let mut written = self.written.clone();
        loop {
            written.mark_unchanged();
            if self.end() > seen {
                return;
            }
            if written.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}
