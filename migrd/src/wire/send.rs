//! The source's side of the lanes.
//!
//! Each lane is a connection of its own with two tasks: one reads pages and
//! writes batches, one reads acknowledgements. Which lane a page takes depends
//! on nothing but its place, so its copies stay in order. The first failure of
//! any lane is the failure of all.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use migr_proto::v1::{Batch, BatchAck};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, Streaming};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::{Service, ServiceExt};

use super::batch::{Encoded, Filler};
use super::limits::{MAX_IN_FLIGHT, MAX_LANES, MAX_QUEUED_PAGES, PAGES_PER_TURN, STALL};
use super::{LANE_KEY, MIGRATION_KEY, TRANSFER, client_settings, deepest};
use crate::migration::link::{LaneTotals, LinkError, PageLanes};
use crate::units::{MigrationId, PageIndex, PageRun};
use crate::workload::{ChunkSource, StreamKey};

type Failure = watch::Sender<Option<LinkError>>;

/// What one lane counts.
#[derive(Debug, Default)]
struct Counters {
    batches: AtomicU64,
    data_pages: AtomicU64,
    zero_pages: AtomicU64,
    bytes: AtomicU64,
}

enum Job {
    Pages(StreamKey, PageRun),
    Flush(oneshot::Sender<()>),
}

struct Lane {
    jobs: mpsc::UnboundedSender<Job>,
    room: Arc<Semaphore>,
    counters: Arc<Counters>,
}

/// Open lanes to one destination.
pub struct SendLanes {
    lanes: Vec<Lane>,
    failure: Arc<Failure>,
    tasks: JoinSet<()>,
}

fn lost(peer: &str, error: &(dyn std::error::Error + 'static)) -> LinkError {
    LinkError::Lost { peer: peer.into(), cause: deepest(error) }
}

/// What a status says of the link. The codes that a transport makes up when
/// the connection goes stand for a lost link, all others for a peer's refusal.
fn refusal(peer: &str, status: Status) -> LinkError {
    let transport = std::error::Error::source(&status).is_some();
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal if transport => {
            lost(peer, &status)
        }
        _ => LinkError::Rejected { peer: peer.into(), message: status.message().into() },
    }
}

fn fail(failure: &Failure, error: LinkError) {
    failure.send_if_modified(|first| {
        let new = first.is_none();
        first.get_or_insert(error);
        new
    });
}

impl SendLanes {
    /// Opens `lanes` connections to `endpoint` (at least 1, at most
    /// [`MAX_LANES`]) and one lane on each, to send what `source` holds.
    ///
    /// # Errors
    /// When the peer cannot be reached or refuses a lane.
    pub async fn connect(
        endpoint: Endpoint,
        migration: MigrationId,
        lanes: usize,
        source: Arc<dyn ChunkSource>,
    ) -> Result<Self, LinkError> {
        let endpoint = client_settings(endpoint);
        let peer = endpoint.uri().authority().map_or_else(String::new, ToString::to_string);
        let mut all = Self {
            lanes: Vec::new(),
            failure: Arc::new(watch::Sender::new(None)),
            tasks: JoinSet::new(),
        };
        for number in 0..lanes.clamp(1, MAX_LANES) {
            let channel = endpoint.connect().await.map_err(|e| lost(&peer, &e))?;
            let (frames, body) = mpsc::channel(2);
            let acks = open(channel, migration, number, body, &peer).await?;
            all.start(peer.clone(), frames, acks, Arc::clone(&source));
        }
        Ok(all)
    }

    fn start(
        &mut self,
        peer: String,
        frames: mpsc::Sender<Bytes>,
        acks: Streaming<BatchAck>,
        source: Arc<dyn ChunkSource>,
    ) {
        let (jobs, queue) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(MAX_QUEUED_PAGES));
        let counters = Arc::new(Counters::default());
        let (applied, acked) = watch::channel(0);
        let failure = Arc::clone(&self.failure);
        let lane_peer = peer.clone();
        let sent = Arc::clone(&counters);
        self.tasks.spawn(async move {
            if let Err(error) = read_acks(acks, &applied, &sent, &peer).await {
                fail(&failure, error);
            }
        });
        let writer = Writer {
            filler: Filler::new(source),
            frames,
            acked,
            in_flight: VecDeque::new(),
            counters: Arc::clone(&counters),
        };
        let failure = Arc::clone(&self.failure);
        let room_of_writer = Arc::clone(&room);
        self.tasks.spawn(async move {
            match writer.run(queue, &room_of_writer).await {
                Ok(()) | Err(Stopped::Lane) => {}
                Err(Stopped::Source(error)) => fail(&failure, error.into()),
                Err(Stopped::Stalled) => {
                    let cause = format!("it took no pages for {STALL:?}");
                    fail(&failure, LinkError::Lost { peer: lane_peer, cause });
                }
            }
        });
        self.lanes.push(Lane { jobs, room, counters });
    }

    /// Flushes and ends every lane in order.
    ///
    /// # Errors
    /// When any lane has failed.
    pub async fn close(mut self) -> Result<LaneTotals, LinkError> {
        let totals = self.flush().await?;
        self.lanes.clear();
        while self.tasks.join_next().await.is_some() {}
        match self.failure.borrow().clone() {
            Some(error) => Err(error),
            None => Ok(totals),
        }
    }

    fn totals(&self) -> LaneTotals {
        let sum = |of: fn(&Counters) -> &AtomicU64| {
            self.lanes.iter().map(|lane| of(&lane.counters).load(Ordering::Acquire)).sum()
        };
        let batches = self.lanes.iter().map(|lane| lane.counters.batches.load(Ordering::Acquire));
        LaneTotals {
            batches: batches.collect(),
            data_pages: sum(|c| &c.data_pages),
            zero_pages: sum(|c| &c.zero_pages),
            bytes_on_wire: sum(|c| &c.bytes),
        }
    }

    /// Waits for `work`, or for the failure that makes it pointless. Work that
    /// gives nothing was given up by its lane, whose failure is then on its way.
    async fn unless_failed<T>(
        failure: &Failure,
        work: impl Future<Output = Option<T>>,
    ) -> Result<T, LinkError> {
        let mut watch = failure.subscribe();
        let work = async {
            match work.await {
                Some(done) => done,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            failed = watch.wait_for(Option::is_some) => {
                Err(failed.ok().and_then(|error| (*error).clone()).expect("it is some and its sender lives"))
            }
            done = work => Ok(done),
        }
    }
}

#[async_trait]
impl PageLanes for SendLanes {
    async fn send(&mut self, key: StreamKey, run: PageRun) -> Result<(), LinkError> {
        let end = run.first.0.saturating_add(run.count);
        let mut first = run.first.0;
        while first < end {
            let turn = first / PAGES_PER_TURN;
            let count = (PAGES_PER_TURN - first % PAGES_PER_TURN).min(end - first);
            let lanes = self.lanes.len() as u64;
            let lane = usize::try_from((turn + u64::from(key.0)) % lanes).expect("few lanes");
            let lane = &self.lanes[lane];
            let pages = u32::try_from(count).expect("at most one turn");
            Self::unless_failed(&self.failure, async {
                lane.room.acquire_many(pages).await.ok()?.forget();
                lane.jobs.send(Job::Pages(key, PageRun { first: PageIndex(first), count })).ok()
            })
            .await?;
            first += count;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<LaneTotals, LinkError> {
        let mut waiting = Vec::new();
        for lane in &self.lanes {
            let (done, wait) = oneshot::channel();
            // A lane that takes no more jobs drops this one, and `wait` says so.
            let _ = lane.jobs.send(Job::Flush(done));
            waiting.push(wait);
        }
        for wait in waiting {
            Self::unless_failed(&self.failure, async { wait.await.ok() }).await?;
        }
        Ok(self.totals())
    }
}

/// Opens one lane: sends the request's head and waits for the answer's.
async fn open(
    mut channel: Channel,
    migration: MigrationId,
    lane: usize,
    body: mpsc::Receiver<Bytes>,
    peer: &str,
) -> Result<Streaming<BatchAck>, LinkError> {
    let frames = ReceiverStream::new(body).map(|bytes| Ok::<_, Infallible>(Frame::data(bytes)));
    let body = StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync();
    let request = http::Request::post(TRANSFER)
        .version(http::Version::HTTP_2)
        .header(http::header::TE, "trailers")
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(MIGRATION_KEY, migration.to_string())
        .header(LANE_KEY, lane.to_string())
        .body(tonic::body::Body::new(body))
        .expect("constant names and printable values");
    let ready = channel.ready().await.map_err(|e| lost(peer, &e))?;
    let response = ready.call(request).await.map_err(|e| lost(peer, &e))?;
    if let Some(status) = Status::from_header_map(response.headers()) {
        return Err(refusal(peer, status));
    }
    let status = response.status();
    let decoder = tonic_prost::ProstCodec::<Batch, BatchAck>::default().decoder();
    Ok(Streaming::new_response(decoder, response.into_body(), status, None, Some(1024)))
}

async fn read_acks(
    mut acks: Streaming<BatchAck>,
    applied: &watch::Sender<u64>,
    sent: &Counters,
    peer: &str,
) -> Result<(), LinkError> {
    let misbehaved = |message: String| Err(LinkError::Misbehaved { peer: peer.into(), message });
    while let Some(ack) = acks.message().await.map_err(|status| refusal(peer, status))? {
        let (was, sent) = (*applied.borrow(), sent.batches.load(Ordering::Acquire));
        if ack.applied < was || ack.applied > sent {
            return misbehaved(format!(
                "it acknowledged {} batches after {was}, of {sent} sent",
                ack.applied
            ));
        }
        applied.send_replace(ack.applied);
    }
    // The writer holds the other end until the lane is closed in order.
    if applied.is_closed() { Ok(()) } else { misbehaved("it ended a lane that was in use".into()) }
}

/// Why a writer gave up.
enum Stopped {
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

struct Writer {
    filler: Filler,
    /// Dropped before `frames`: that the lane ended in order is known by it.
    acked: watch::Receiver<u64>,
    frames: mpsc::Sender<Bytes>,
    /// Number and size of the batches that are not acknowledged.
    in_flight: VecDeque<(u64, usize)>,
    counters: Arc<Counters>,
}

impl Writer {
    async fn run(
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
            rest = self.filler.add(key, run).map_err(Stopped::Source)?;
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
    use crate::workload::fake::{Census, Guest, STREAM};

    /// A lane whose peer takes `taken` frames and never acknowledges one.
    async fn flush_to_a_peer_that_acknowledges_nothing(taken: usize) -> Result<(), Stopped> {
        let guest = Guest::empty(&Arc::new(Census::default()), 4);
        guest.write_page(0, 7);
        let (frames, mut body) = mpsc::channel(1);
        let (_applied, acked) = watch::channel(0);
        let writer = Writer {
            filler: Filler::new(guest),
            frames,
            acked,
            in_flight: VecDeque::new(),
            counters: Arc::default(),
        };
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
