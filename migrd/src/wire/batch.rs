//! Fills batches from a source: one copy from it into the send buffer.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::codec::{Run, RunKind, encode_head};
use super::limits::{MAX_RUNS, TARGET_DATA_BYTES};
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{ChunkSource, OutOfStream, StreamKey};

/// Send buffers of one lane, used again: fresh ones cost a page fault a page.
#[derive(Debug, Default)]
struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    fn take(&self) -> Vec<u8> {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| vec![0; TARGET_DATA_BYTES])
    }
}

/// The filled part of a buffer, which goes back to its pool when it was sent.
struct Lent {
    buffer: Vec<u8>,
    length: usize,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// One batch, ready for the wire.
#[derive(Debug)]
pub(super) struct Encoded {
    pub head: Bytes,
    pub data: Bytes,
    pub data_pages: u64,
    pub zero_pages: u64,
}

/// The pages of `run` from `first` on.
fn rest_from(run: PageRun, first: u64) -> PageRun {
    PageRun { first: PageIndex(first), count: run.first.0 + run.count - first }
}

/// The batch that is being filled.
pub(super) struct Filler {
    source: Arc<dyn ChunkSource>,
    pool: Arc<Pool>,
    buffer: Vec<u8>,
    used: usize,
    runs: Vec<Run>,
    zero_pages: u64,
    sequence: u64,
}

impl Filler {
    pub fn new(source: Arc<dyn ChunkSource>) -> Self {
        let pool = Arc::new(Pool::default());
        let buffer = pool.take();
        Self { source, pool, buffer, used: 0, runs: Vec::new(), zero_pages: 0, sequence: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether nothing more goes in.
    pub fn is_full(&self) -> bool {
        self.used + PAGE_BYTES > self.buffer.len() || self.runs.len() >= MAX_RUNS
    }

    /// Reads as much of `run` as fits and gives back the rest.
    pub fn add(&mut self, key: StreamKey, run: PageRun) -> Result<Option<PageRun>, OutOfStream> {
        if self.source.is_zero(key, run.offset(), run.len_bytes())? {
            self.push(key, RunKind::Zero, run);
            return Ok(None);
        }
        // All that fits at once: a source that is a file takes a system call for each.
        let start = self.used;
        let fits = (self.buffer.len() - start) / PAGE_BYTES;
        let count = usize::try_from(run.count).unwrap_or(usize::MAX).min(fits);
        self.source.read(key, run.offset(), &mut self.buffer[start..start + count * PAGE_BYTES])?;
        for (done, index) in (0..count).zip(run.first.0..) {
            let page = PageRun { first: PageIndex(index), count: 1 };
            if self.runs.len() >= MAX_RUNS {
                return Ok(Some(rest_from(run, index)));
            }
            let at = start + done * PAGE_BYTES;
            let read = at..at + PAGE_BYTES;
            // Looked at in the copy: the guest may write meanwhile.
            if self.buffer[read.clone()].iter().all(|byte| *byte == 0) {
                self.push(key, RunKind::Zero, page);
                continue;
            }
            // Zero pages before it leave a gap.
            if at != self.used {
                self.buffer.copy_within(read, self.used);
            }
            self.used += PAGE_BYTES;
            self.push(key, RunKind::Data, page);
        }
        let end = run.first.0 + run.count;
        let next = run.first.0 + count as u64;
        Ok((next < end).then(|| rest_from(run, next)))
    }

    fn push(&mut self, stream: StreamKey, kind: RunKind, pages: PageRun) {
        if kind == RunKind::Zero {
            self.zero_pages += pages.count;
        }
        let (offset, length) = (pages.offset(), pages.len_bytes());
        match self.runs.last_mut() {
            Some(last)
                if (last.stream, last.kind) == (stream, kind)
                    && last.offset + last.length == offset =>
            {
                last.length += length;
            }
            _ => self.runs.push(Run { stream, offset, length, kind }),
        }
    }

    /// Finishes the batch and begins the next.
    pub fn finish(&mut self) -> Encoded {
        let buffer = std::mem::replace(&mut self.buffer, self.pool.take());
        let used = std::mem::take(&mut self.used);
        let head = encode_head(self.sequence, &self.runs, &buffer[..used]);
        self.sequence += 1;
        self.runs.clear();
        let data = if used == 0 {
            self.buffer = buffer;
            Bytes::new()
        } else {
            Bytes::from_owner(Lent { buffer, length: used, pool: Arc::clone(&self.pool) })
        };
        Encoded {
            head,
            data,
            data_pages: used as u64 / PAGE_SIZE,
            zero_pages: std::mem::take(&mut self.zero_pages),
        }
    }
}
