//! The destination's side of the lanes.
//!
//! Reads the frames of the request's body as they come, without the copy into
//! a message of its own that a generated service makes. Bytes are put in place
//! as soon as the head of their batch was checked, before the checksum at its
//! end is known: a batch with a wrong checksum ends the whole migration, and
//! nothing runs from these bytes before the migration is sealed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use migr_proto::v1::BatchAck;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};

use super::codec::{Apply, BatchHead, Decoder, RunKind};
use super::limits::{self, BatchError, MAX_LANES, Streams};
use super::{LANE_KEY, MIGRATION_KEY, SERVICE, TRANSFER};
use crate::units::MigrationId;
use crate::workload::{ChunkSink, OutOfStream, StreamKey, StreamSpec};

/// Why a migration receives nothing more.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReceiveError {
    /// The source sent something wrong.
    #[error("lane {lane}: {error}")]
    Batch {
        /// On which lane.
        lane: usize,
        /// What was wrong.
        #[source]
        error: BatchError,
    },
    /// The workload did not take bytes that the manifest has.
    #[error("lane {lane}: the workload took no bytes: {error}; check memory and disk space")]
    Sink {
        /// On which lane.
        lane: usize,
        /// What it said.
        #[source]
        error: OutOfStream,
    },
    /// The connection of a lane went.
    #[error("the connection of lane {lane} is lost: {message}")]
    Lost {
        /// Which lane.
        lane: usize,
        /// What the transport said.
        message: String,
    },
    /// This side ended it.
    #[error("the migration is over: {reason}")]
    Closed {
        /// Why.
        reason: String,
    },
    /// The batches that the source says it sent did not come in time.
    #[error("batches are missing: have {have:?}, the source sent {sent:?}")]
    Missing {
        /// Applied, by lane.
        have: Vec<u64>,
        /// Sent, by lane.
        sent: Vec<u64>,
    },
}

#[derive(Debug)]
struct Progress {
    error: Option<ReceiveError>,
    applied: Vec<u64>,
    taken: Vec<bool>,
}

/// What one migration receives over its lanes.
pub struct Receiver {
    streams: Streams,
    sink: Arc<dyn ChunkSink>,
    progress: watch::Sender<Progress>,
    began: Instant,
    active_ms: AtomicU64,
}

impl Receiver {
    /// Takes the bytes of `streams` into `sink`, over `lanes` lanes (at least
    /// 1, at most [`MAX_LANES`]).
    #[must_use]
    pub fn new(streams: &[StreamSpec], sink: Arc<dyn ChunkSink>, lanes: usize) -> Self {
        let lanes = lanes.clamp(1, MAX_LANES);
        let progress = Progress { error: None, applied: vec![0; lanes], taken: vec![false; lanes] };
        Self {
            streams: Streams::new(streams),
            sink,
            progress: watch::Sender::new(progress),
            began: Instant::now(),
            active_ms: AtomicU64::new(0),
        }
    }

    /// Waits until each lane has applied as many batches as `batches` says.
    ///
    /// # Errors
    /// What ended the migration, or [`ReceiveError::Missing`] after `timeout`.
    pub async fn wait_applied(
        &self,
        batches: &[u64],
        timeout: Duration,
    ) -> Result<(), ReceiveError> {
        let mut progress = self.progress.subscribe();
        let missing = |have: Vec<u64>| ReceiveError::Missing { have, sent: batches.to_vec() };
        let have = self.applied();
        if batches.len() != have.len() {
            return Err(missing(have));
        }
        let done = progress.wait_for(|p| {
            p.error.is_some() || p.applied.iter().zip(batches).all(|(have, sent)| have >= sent)
        });
        match tokio::time::timeout(timeout, done).await {
            Ok(Ok(progress)) => progress.error.clone().map_or(Ok(()), Err),
            Ok(Err(_)) | Err(_) => Err(missing(self.applied())),
        }
    }

    /// How many batches each lane has put in place.
    #[must_use]
    pub fn applied(&self) -> Vec<u64> {
        self.progress.borrow().applied.clone()
    }

    /// What ended it, if anything did.
    #[must_use]
    pub fn error(&self) -> Option<ReceiveError> {
        self.progress.borrow().error.clone()
    }

    /// Waits until something ends it.
    pub async fn failed(&self) -> ReceiveError {
        let mut progress = self.progress.subscribe();
        let failed = progress.wait_for(|p| p.error.is_some()).await;
        failed.ok().and_then(|p| p.error.clone()).expect("it is some and its sender lives")
    }

    /// When bytes last came, or when it was made.
    #[must_use]
    pub fn last_activity(&self) -> Instant {
        self.began + Duration::from_millis(self.active_ms.load(Ordering::Relaxed))
    }

    /// Ends every lane. A lane may still be putting the bytes it holds in
    /// place when this returns; it takes no others.
    pub fn close(&self, reason: impl Into<String>) {
        self.fail(ReceiveError::Closed { reason: reason.into() });
    }

    /// Keeps the first error, and gives it.
    fn fail(&self, error: ReceiveError) -> ReceiveError {
        let mut first = error;
        self.progress.send_modify(|p| first = p.error.get_or_insert(first.clone()).clone());
        first
    }

    fn take_lane(&self, lane: usize) -> Result<(), Status> {
        let mut result = Ok(());
        self.progress.send_modify(|p| {
            result = match (&p.error, p.taken.get_mut(lane)) {
                (Some(error), _) => Err(status(error)),
                (None, None) => Err(Status::invalid_argument(format!(
                    "this migration has {} lanes and no lane {lane}",
                    p.applied.len()
                ))),
                (None, Some(true)) => {
                    Err(Status::already_exists(format!("lane {lane} is open or was")))
                }
                (None, Some(free)) => {
                    *free = true;
                    Ok(())
                }
            };
        });
        result
    }

    fn touch(&self) {
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active_ms.store(ms, Ordering::Relaxed);
    }
}

/// How an error that ends a lane is told to its sender.
fn status(error: &ReceiveError) -> Status {
    let code = match error {
        ReceiveError::Batch { error: BatchError::Checksum { .. }, .. } => Code::DataLoss,
        ReceiveError::Batch { error: BatchError::TooLong { .. }, .. } => Code::ResourceExhausted,
        ReceiveError::Batch { .. } => Code::InvalidArgument,
        ReceiveError::Sink { .. } => Code::Internal,
        ReceiveError::Lost { .. } | ReceiveError::Closed { .. } => Code::Aborted,
        ReceiveError::Missing { .. } => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}

/// Puts the batches of one lane in place.
pub(super) struct LaneApply<'a> {
    receiver: &'a Receiver,
    lane: usize,
    next: u64,
    head: Option<BatchHead>,
    /// Index of the run that is being filled, and how much of it is.
    run: usize,
    filled: u64,
    sink_error: Option<OutOfStream>,
}

impl<'a> LaneApply<'a> {
    /// Of lane `lane` of `receiver`.
    pub(super) fn new(receiver: &'a Receiver, lane: usize) -> Self {
        Self { receiver, lane, next: 0, head: None, run: 0, filled: 0, sink_error: None }
    }

    /// How many batches are in place.
    pub(super) fn applied(&self) -> u64 {
        self.next
    }

    /// What `error`, met while decoding, means for the migration.
    pub(super) fn error(&mut self, error: BatchError) -> ReceiveError {
        let lane = self.lane;
        match self.sink_error.take() {
            Some(error) => ReceiveError::Sink { lane, error },
            None => ReceiveError::Batch { lane, error },
        }
    }

    fn sink(&mut self, result: Result<(), OutOfStream>) -> Result<(), BatchError> {
        result.map_err(|error| {
            let StreamKey(stream) = error.key;
            let (offset, length) = (error.offset, error.length);
            self.sink_error = Some(error);
            BatchError::OutOfStream { stream, offset, length }
        })
    }

    /// Applies zero runs up to the next run that needs data.
    fn skip_zero(&mut self) -> Result<(), BatchError> {
        while let Some(run) = self.head.as_ref().and_then(|head| head.runs.get(self.run)) {
            match run.kind {
                RunKind::Data => break,
                RunKind::Zero => {
                    let zeroed = self.receiver.sink.zero(run.stream, run.offset, run.length);
                    self.run += 1;
                    self.sink(zeroed)?;
                }
            }
        }
        Ok(())
    }
}

impl Apply for LaneApply<'_> {
    fn begin(&mut self, head: BatchHead) -> Result<(), BatchError> {
        limits::check_head(&head, self.next, &self.receiver.streams)?;
        self.head = Some(head);
        self.run = 0;
        self.filled = 0;
        self.skip_zero()
    }

    fn data(&mut self, mut bytes: &[u8]) -> Result<(), BatchError> {
        while !bytes.is_empty() {
            let run = self.head.as_ref().and_then(|head| head.runs.get(self.run)).copied();
            let run = run.ok_or(BatchError::Malformed("data without a run"))?;
            let due = usize::try_from(run.length - self.filled).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(due.min(bytes.len()));
            let put = self.receiver.sink.write(run.stream, run.offset + self.filled, now);
            self.sink(put)?;
            self.filled += now.len() as u64;
            if self.filled == run.length {
                self.filled = 0;
                self.run += 1;
                self.skip_zero()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), BatchError> {
        self.next += 1;
        self.receiver.progress.send_modify(|p| p.applied[self.lane] = self.next);
        Ok(())
    }
}

fn ack(applied: u64) -> Bytes {
    let message = BatchAck { applied };
    let mut frame = BytesMut::with_capacity(16);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).expect("a few bytes"));
    message.encode(&mut frame).expect("a growing buffer");
    frame.freeze()
}

/// Receives one lane to its end.
async fn receive(
    receiver: &Receiver,
    lane: usize,
    mut body: Body,
    acks: &mpsc::Sender<Frame<Bytes>>,
) -> Result<(), ReceiveError> {
    let mut apply = LaneApply::new(receiver, lane);
    let mut decoder = Decoder::default();
    loop {
        let frame = tokio::select! {
            biased;
            error = receiver.failed() => return Err(error),
            frame = body.frame() => frame,
        };
        let lost = |message: String| ReceiveError::Lost { lane, message };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|e| lost(e.to_string()))?;
        let Ok(bytes) = frame.into_data() else { continue };
        receiver.touch();
        let had = apply.next;
        decoder.feed(&bytes, &mut apply).map_err(|error| apply.error(error))?;
        if apply.next > had {
            let told = acks.send(Frame::data(ack(apply.next))).await;
            told.map_err(|_| lost("nobody reads acknowledgements".into()))?;
        }
    }
    decoder.finish().map_err(|error| ReceiveError::Batch { lane, error })
}

/// The migrations that receive at the moment.
#[derive(Clone, Default)]
pub struct LaneDirectory(Arc<Mutex<HashMap<MigrationId, Arc<Receiver>>>>);

impl LaneDirectory {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Arc<Receiver>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the lanes of `migration` in. Says no if it is there already.
    #[must_use]
    pub fn insert(&self, migration: MigrationId, receiver: Arc<Receiver>) -> bool {
        match self.lock().entry(migration) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(receiver);
                true
            }
        }
    }

    /// Lets no more lanes of `migration` in; those that are open go on until
    /// [`Receiver::close`].
    pub fn remove(&self, migration: MigrationId) -> Option<Arc<Receiver>> {
        self.lock().remove(&migration)
    }

    fn find(&self, headers: &http::HeaderMap) -> Result<(Arc<Receiver>, usize), Status> {
        let text = |key: &str| headers.get(key).and_then(|value| value.to_str().ok());
        let id = text(MIGRATION_KEY).and_then(|id| id.parse::<MigrationId>().ok());
        let id = id.ok_or_else(|| {
            Status::invalid_argument(format!("metadata {MIGRATION_KEY} must be a UUID"))
        })?;
        let lane = text(LANE_KEY).and_then(|lane| lane.parse::<usize>().ok());
        let lane = lane.ok_or_else(|| {
            Status::invalid_argument(format!("metadata {LANE_KEY} must be a number"))
        })?;
        let receiver = self.lock().get(&id).cloned();
        let receiver = receiver
            .ok_or_else(|| Status::not_found(format!("no migration {id} receives here")))?;
        receiver.take_lane(lane)?;
        Ok((receiver, lane))
    }
}

/// The gRPC service; add it to a tonic server or to its routes.
#[derive(Clone)]
pub struct LaneService {
    directory: LaneDirectory,
}

impl LaneService {
    /// Serves the migrations of `directory`.
    #[must_use]
    pub fn new(directory: LaneDirectory) -> Self {
        Self { directory }
    }

    fn serve(&self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        if request.uri().path() != TRANSFER {
            return Err(Status::unimplemented(format!("{SERVICE} has no such method")));
        }
        let (receiver, lane) = self.directory.find(request.headers())?;
        let (answers, body) = mpsc::channel(16);
        tokio::spawn(async move {
            let ended = receive(&receiver, lane, request.into_body(), &answers).await;
            let status = match ended {
                Ok(()) => Status::ok(""),
                Err(error) => status(&receiver.fail(error)),
            };
            let mut trailers = http::HeaderMap::new();
            if status.add_header(&mut trailers).is_ok() {
                // The one it is for may be gone.
                let _ = answers.send(Frame::trailers(trailers)).await;
            }
        });
        let frames = ReceiverStream::new(body).map(Ok::<_, Infallible>);
        let response = http::Response::builder()
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .body(Body::new(StreamBody::new(frames)))
            .expect("constant headers");
        Ok(response)
    }
}

impl NamedService for LaneService {
    const NAME: &'static str = SERVICE;
}

impl tower::Service<http::Request<Body>> for LaneService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let response = self.serve(request).unwrap_or_else(Status::into_http);
        Box::pin(std::future::ready(Ok(response)))
    }
}
