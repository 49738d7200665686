//! The destination's side of the lanes.
//!
//! Bytes are put in place as soon as the head of their batch was checked,
//! before the checksum at its end is known: a batch with a wrong checksum ends
//! the whole migration, and nothing runs from these bytes before the migration
//! is sealed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::{Code, Status};

use super::codec::{Apply, BatchHead, RunKind};
use super::limits::{self, BatchError, MAX_LANES, Streams};
use crate::workload::{ChunkSink, OutOfStream, StreamKey, StreamSpec};

pub use super::service::{LaneDirectory, LaneService};

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
    #[error("lane {lane}: the workload took no bytes: {}", refused(.trouble.as_deref(), error))]
    Sink {
        /// On which lane.
        lane: usize,
        /// What it said.
        #[source]
        error: OutOfStream,
        /// Why, and what to do, if the workload knows.
        trouble: Option<String>,
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

fn refused(trouble: Option<&str>, error: &OutOfStream) -> String {
    match trouble {
        Some(trouble) => trouble.to_owned(),
        None => format!("{error}; check memory and disk space"),
    }
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
    pub(super) fn fail(&self, error: ReceiveError) -> ReceiveError {
        let mut first = error;
        self.progress.send_modify(|p| first = p.error.get_or_insert(first.clone()).clone());
        first
    }

    pub(super) fn take_lane(&self, lane: usize) -> Result<(), Status> {
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

    pub(super) fn touch(&self) {
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active_ms.store(ms, Ordering::Relaxed);
    }
}

/// How an error that ends a lane is told to its sender.
pub(super) fn status(error: &ReceiveError) -> Status {
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
            Some(error) => {
                ReceiveError::Sink { lane, error, trouble: self.receiver.sink.trouble() }
            }
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
