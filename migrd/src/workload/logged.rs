//! The terminal of a workload: what it has printed, read from its log, and what is
//! typed, which goes to the process that has it.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Footprint, Output, Terminal, WorkloadError};
use crate::serial_log::Reader;

/// The process that has a workload and writes its log.
#[async_trait]
pub trait Writes: Send + Sync + 'static {
    /// As for [`Terminal::input`].
    ///
    /// # Errors
    /// As there.
    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError>;

    /// As for [`Terminal::populated_bytes`].
    fn populated_bytes(&self) -> u64;

    /// As for [`Terminal::footprint`], without the length of the log.
    ///
    /// # Errors
    /// As there.
    async fn footprint(&self) -> Result<Footprint, WorkloadError>;
}

/// The log of one workload, alive or not, and its process.
pub struct Logged<P> {
    /// `None` for a log that cannot be read.
    reader: Option<Mutex<Reader>>,
    /// Changes with every write to the log; closed when nobody writes any more.
    written: watch::Receiver<u64>,
    /// A terminal must not keep what a process has when its workload was dropped.
    process: Weak<P>,
}

fn failed(doing: &str) -> impl Fn(std::io::Error) -> WorkloadError + '_ {
    move |error| WorkloadError::caused(format!("cannot {doing}: {error}"), error)
}

impl<P> Logged<P> {
    /// The one at `path`, which `process` writes to.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn open(
        path: &Path,
        written: watch::Receiver<u64>,
        process: &Arc<P>,
    ) -> Result<Self, WorkloadError> {
        Self::of(path, written, Arc::downgrade(process))
    }

    fn of(
        path: &Path,
        written: watch::Receiver<u64>,
        process: Weak<P>,
    ) -> Result<Self, WorkloadError> {
        let file = File::open(path).map_err(failed("open the log"))?;
        let reader = Reader::open(file).map_err(failed("read the log"))?;
        Ok(Self { reader: Some(Mutex::new(reader)), written, process })
    }

    /// The one at `path`, which nobody writes to any more.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn left_behind(path: &Path) -> Result<Self, WorkloadError> {
        Self::of(path, watch::channel(0).1, Weak::new())
    }

    /// One that cannot be read.
    #[must_use]
    pub fn silent() -> Self {
        Self { reader: None, written: watch::channel(0).1, process: Weak::new() }
    }
}

#[async_trait]
impl<P: Writes> Terminal for Logged<P> {
    fn read(&self, from: u64, max: usize) -> Result<Vec<Output>, WorkloadError> {
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

    fn end(&self) -> u64 {
        let Some(reader) = &self.reader else { return 0 };
        reader.lock().unwrap_or_else(PoisonError::into_inner).output().unwrap_or(0)
    }

    async fn more_than(&self, seen: u64) {
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

    async fn input(&self, bytes: &[u8]) -> Result<(), WorkloadError> {
        let process = self.process.upgrade();
        let process =
            process.ok_or_else(|| WorkloadError::new("it has ended, so nobody reads that"))?;
        process.input(bytes).await
    }

    fn populated_bytes(&self) -> u64 {
        self.process.upgrade().map_or(0, |process| process.populated_bytes())
    }

    async fn footprint(&self) -> Result<Footprint, WorkloadError> {
        let footprint = match self.process.upgrade() {
            Some(process) => process.footprint().await?,
            None => Footprint::default(),
        };
        Ok(Footprint { log_bytes: self.end(), ..footprint })
    }
}
