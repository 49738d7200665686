//! Every limit of the bulk path, and what breaks it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::codec::{BatchHead, Run, RunKind};
use crate::units::PAGE_SIZE;
use crate::workload::{StreamKey, StreamSpec};

/// The longest encoded batch that is taken, in bytes.
pub const MAX_BATCH_BYTES: usize = 4 << 20;
/// How many bytes of pages a sender puts into a batch.
pub const TARGET_DATA_BYTES: usize = 1 << 20;
/// Runs in a batch.
pub const MAX_RUNS: usize = 1024;
/// Bytes of one encoded run, without tag and length.
pub const MAX_RUN_BYTES: usize = 64;
/// Lanes of a migration.
pub const MAX_LANES: usize = 16;
/// Lanes to open unless there is a reason for another number: where the
/// `lane_throughput` example was tuned (two cores, noisy), four moved random
/// bytes at 0.5 to 0.8 of the rate of a plain TCP copy, one or two at 0.4 to 0.6.
pub const DEFAULT_LANES: u32 = 4;
/// Pages of a stream that travel by the same lane before the next lane's turn.
pub const PAGES_PER_TURN: u64 = 256;
/// Bytes a sender leaves unacknowledged on one lane.
pub const MAX_IN_FLIGHT: usize = 8 << 20;
/// How long a lane may have batches under way without an acknowledgement. A
/// peer that answers pings and takes nothing must not hold the workload.
pub const STALL: Duration = Duration::from_secs(30);
/// Pages a sender queues, unread, for one lane.
pub const MAX_QUEUED_PAGES: usize = 2048;

/// What is wrong with a batch. Nothing of it can be believed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BatchError {
    /// Announced length over [`MAX_BATCH_BYTES`].
    #[error("a batch of {length} bytes is over the limit of {MAX_BATCH_BYTES}")]
    TooLong {
        /// As announced.
        length: u64,
    },
    /// The gRPC compression flag is set.
    #[error("a batch is compressed; lanes carry no compressed batches")]
    Compressed,
    /// More than [`MAX_RUNS`].
    #[error("a batch has more than {MAX_RUNS} runs")]
    TooManyRuns,
    /// Not the fields of a batch in the order the protocol wants.
    #[error("a batch is malformed: {0}")]
    Malformed(&'static str),
    /// Batches were lost, repeated or reordered.
    #[error("batch {got} came where batch {expected} was due")]
    OutOfSequence {
        /// What was due.
        expected: u64,
        /// What came.
        got: u64,
    },
    /// The manifest announced no such stream.
    #[error("a batch is for stream {0}, which the manifest does not have")]
    UnknownStream(u32),
    /// A run leaves its stream.
    #[error("a run of {length} bytes at {offset} leaves stream {stream}")]
    OutOfStream {
        /// The stream.
        stream: u32,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// A run is empty or not of whole pages.
    #[error("a run of {length} bytes at {offset} is not of whole pages")]
    NotPages {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// The data is not as long as the data runs together.
    #[error("the data runs of a batch cover {runs} bytes and it has {data}")]
    DataLength {
        /// What the runs say.
        runs: u64,
        /// What is there.
        data: u64,
    },
    /// The bytes are not those that were sent.
    #[error(
        "the checksum of batch {sequence} is wrong: its bytes are not those that were sent or written"
    )]
    Checksum {
        /// Which batch.
        sequence: u64,
    },
    /// The lane ended within a batch.
    #[error("the lane ended within a batch")]
    Truncated,
}

/// Checks the length that a gRPC message announces, before anything is taken for it.
///
/// # Errors
/// [`BatchError::TooLong`].
pub fn check_length(length: u64) -> Result<usize, BatchError> {
    match usize::try_from(length) {
        Ok(fits) if fits <= MAX_BATCH_BYTES => Ok(fits),
        _ => Err(BatchError::TooLong { length }),
    }
}

fn check_run(run: &Run, streams: &Streams) -> Result<(), BatchError> {
    let Run { stream, offset, length, .. } = *run;
    let size = *streams.0.get(&stream).ok_or(BatchError::UnknownStream(stream.0))?;
    if length == 0 || offset % PAGE_SIZE != 0 || length % PAGE_SIZE != 0 {
        return Err(BatchError::NotPages { offset, length });
    }
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(BatchError::OutOfStream { stream: stream.0, offset, length });
    }
    Ok(())
}

/// Checks everything that is known of a batch before its data.
///
/// # Errors
/// What is wrong with it.
pub fn check_head(head: &BatchHead, expected: u64, streams: &Streams) -> Result<(), BatchError> {
    if head.sequence != expected {
        return Err(BatchError::OutOfSequence { expected, got: head.sequence });
    }
    if head.runs.len() > MAX_RUNS {
        return Err(BatchError::TooManyRuns);
    }
    let mut runs = 0_u64;
    for run in &head.runs {
        check_run(run, streams)?;
        if run.kind == RunKind::Data {
            runs = runs.saturating_add(run.length);
        }
    }
    let data = head.data_length as u64;
    if runs == data { Ok(()) } else { Err(BatchError::DataLength { runs, data }) }
}

/// Lengths of the streams of a manifest, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Streams(BTreeMap<StreamKey, u64>);

impl Streams {
    /// The streams of `specs`.
    #[must_use]
    pub fn new(specs: &[StreamSpec]) -> Self {
        Self(specs.iter().map(|spec| (spec.key, spec.length)).collect())
    }
}
