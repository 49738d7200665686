//! The source's side of the lanes.
//!
//! Each lane is a connection of its own with two tasks: one reads pages and
//! writes batches, one reads acknowledgements. Which lane a page takes depends
//! on nothing but its place, so its copies stay in order. The first failure of
//! any lane is the failure of all.

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

use super::limits::{MAX_LANES, MAX_QUEUED_PAGES, PAGES_PER_TURN, STALL};
use super::writer::{Counters, Job, Stopped, Writer};
use super::{LANE_KEY, MIGRATION_KEY, TRANSFER, client_settings, deepest};
use crate::migration::link::{LaneTotals, LinkError, PageLanes};
use crate::units::{MigrationId, PageIndex, PageRun};
use crate::workload::{ChunkSource, StreamKey};

type Failure = watch::Sender<Option<LinkError>>;

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
        let writer = Writer::new(source, frames, acked, Arc::clone(&counters));
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
