//! Fills batches with the pages of one lane and sends them, as fast as the
//! peer acknowledges.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::batch::{Encoded, Filler};
use super::limits::{MAX_IN_FLIGHT, STALL};
use crate::units::PageRun;
use crate::workload::storage::waiting;
use crate::workload::{ChunkSource, StreamKey};

/// What one lane counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) batches: AtomicU64,
    pub(super) data_pages: AtomicU64,
    pub(super) zero_pages: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// What a lane is to do next.
pub(super) enum Job {
    Pages(StreamKey, PageRun),
    Flush(oneshot::Sender<()>),
}

/// Why a writer gave up.
pub(super) enum Stopped {
    /// The lane is gone; the reader of acknowledgements says why.
    Lane,
    Source(crate::workload::OutOfStream),
    /// The peer acknowledges nothing, or does not let anything through.
    Stalled,
}

/// Waits for the peer to go on with a lane.
async fn in_time<T, E>(progress: impl Future<Output = Result<T, E>>) -> Result<T, Stopped> {
    match tokio::time::timeout(STALL, progress).await {
        Ok(went) => went.map_err(|_| Stopped::Lane),
        Err(_) => Err(Stopped::Stalled),
    }
}

/// The sending half of a lane.
pub(super) struct Writer {
    source: Arc<dyn ChunkSource>,
    filler: Filler,
    /// Dropped before `frames`: that the lane ended in order is known by it.
    acked: watch::Receiver<u64>,
    frames: mpsc::Sender<Bytes>,
    /// Number and size of the batches that are not acknowledged.
    in_flight: VecDeque<(u64, usize)>,
    counters: Arc<Counters>,
}

impl Writer {
    /// Sends what `source` holds as `frames`; `acked` follows how many batches
    /// the peer has put in place.
    pub(super) fn new(
        source: Arc<dyn ChunkSource>,
        frames: mpsc::Sender<Bytes>,
        acked: watch::Receiver<u64>,
        counters: Arc<Counters>,
    ) -> Self {
        let filler = Filler::new(source.clone());
        Self { source, filler, frames, acked, in_flight: VecDeque::new(), counters }
    }

    /// Does the jobs of `queue` until it ends; each page sent makes room for
    /// another in `room`.
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::UnboundedReceiver<Job>,
        room: &Semaphore,
    ) -> Result<(), Stopped> {
        loop {
            let job = match queue.try_recv() {
                Ok(job) => Some(job),
                Err(_) if self.filler.is_empty() => queue.recv().await,
                Err(_) => {
                    // Lets the one who queues go on before a small batch leaves.
                    tokio::task::yield_now().await;
                    queue.try_recv().ok()
                }
            };
            match job {
                Some(Job::Pages(key, run)) => {
                    self.pages(key, run).await?;
                    room.add_permits(usize::try_from(run.count).expect("at most one turn"));
                }
                Some(Job::Flush(done)) => {
                    self.send_batch().await?;
                    self.settle(0).await?;
                    // Nobody may be waiting any more.
                    let _ = done.send(());
                }
                None if self.filler.is_empty() => return Ok(()),
                None => self.send_batch().await?,
            }
        }
    }

    async fn pages(&mut self, key: StreamKey, run: PageRun) -> Result<(), Stopped> {
        let mut rest = Some(run);
        while let Some(run) = rest {
            let filler = &mut self.filler;
            let added = if self.source.waits(key) {
                waiting(|| filler.add(key, run))
            } else {
                filler.add(key, run)
            };
            rest = added.map_err(Stopped::Source)?;
            if self.filler.is_full() {
                self.send_batch().await?;
            }
        }
        Ok(())
    }

    async fn send_batch(&mut self) -> Result<(), Stopped> {
        if self.filler.is_empty() {
            return Ok(());
        }
        let Encoded { head, data, data_pages, zero_pages } = self.filler.finish();
        let size = head.len() + data.len();
        self.settle(MAX_IN_FLIGHT.saturating_sub(size)).await?;
        let counters = &self.counters;
        let batches = counters.batches.fetch_add(1, Ordering::AcqRel) + 1;
        counters.data_pages.fetch_add(data_pages, Ordering::AcqRel);
        counters.zero_pages.fetch_add(zero_pages, Ordering::AcqRel);
        counters.bytes.fetch_add(size as u64, Ordering::AcqRel);
        self.in_flight.push_back((batches, size));
        for part in [head, data].into_iter().filter(|part| !part.is_empty()) {
            in_time(self.frames.send(part)).await?;
        }
        Ok(())
    }

    /// Waits until at most `most` bytes are not acknowledged.
    async fn settle(&mut self, most: usize) -> Result<(), Stopped> {
        loop {
            let acked = *self.acked.borrow_and_update();
            while self.in_flight.front().is_some_and(|(batch, _)| *batch <= acked) {
                self.in_flight.pop_front();
            }
            if self.in_flight.iter().map(|(_, size)| size).sum::<usize>() <= most {
                return Ok(());
            }
            in_time(self.acked.changed()).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageIndex;
    use crate::workload::fake::{Census, Guest, STREAM};

    /// A lane whose peer takes `taken` frames and never acknowledges one.
    async fn flush_to_a_peer_that_acknowledges_nothing(taken: usize) -> Result<(), Stopped> {
        let guest = Guest::empty(&Arc::new(Census::default()), 4);
        guest.write_page(0, 7);
        let (frames, mut body) = mpsc::channel(1);
        let (_applied, acked) = watch::channel(0);
        let writer = Writer::new(guest, frames, acked, Arc::default());
        let (jobs, queue) = mpsc::unbounded_channel();
        let run = PageRun { first: PageIndex(0), count: 1 };
        assert!(jobs.send(Job::Pages(STREAM, run)).is_ok());
        let (done, _flushed) = oneshot::channel();
        assert!(jobs.send(Job::Flush(done)).is_ok());
        let reading = tokio::spawn(async move {
            for _ in 0..taken {
                body.recv().await;
            }
            std::future::pending::<()>().await;
        });
        let ended = writer.run(queue, &Semaphore::new(0)).await;
        reading.abort();
        ended
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_acknowledges_nothing_is_given_up() {
        for taken in [0, 2] {
            let ended = flush_to_a_peer_that_acknowledges_nothing(taken).await;
            assert!(matches!(ended, Err(Stopped::Stalled)), "{taken} frames taken");
        }
    }
}
