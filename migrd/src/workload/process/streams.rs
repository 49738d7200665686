//! The bytes of a process tree: its log, and its images.

use std::fs::File;
use std::path::Path;

use super::images::Images;
use super::keeper::OUTPUT_LOG;
use super::{LOG_STREAM, failed};
use crate::serial_log::LogStream;
use crate::workload::{ChunkSource, OutOfStream, StreamHash, StreamKey, StreamSpec, WorkloadError};

/// What a migration reads: log and images.
pub(super) struct TreeStreams {
    log: LogStream,
    images: Images,
}

impl TreeStreams {
    pub(super) fn new(log: LogStream, images: Images) -> Self {
        Self { log, images }
    }

    pub(super) fn images(&self) -> &Images {
        &self.images
    }

    pub(super) fn log(&self) -> &LogStream {
        &self.log
    }

    /// Hashes every stream of `specs`, which takes a while.
    pub(super) fn hash(&self, specs: &[StreamSpec]) -> Result<Vec<StreamHash>, WorkloadError> {
        let hash_one = |spec: &StreamSpec| {
            let hash = match spec.key {
                LOG_STREAM => self.log.hash(),
                key => self.images.hash(key),
            };
            let hash = hash.map_err(failed("hash its images"))?;
            Ok(StreamHash { key: spec.key, hash })
        };
        specs.iter().map(hash_one).collect()
    }
}

impl ChunkSource for TreeStreams {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        match key {
            LOG_STREAM => self.log.read(key, offset, into),
            _ => self.images.read(key, offset, into),
        }
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        match key {
            LOG_STREAM => self.log.is_zero(key, offset, length),
            _ => self.images.is_zero(key, offset, length),
        }
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

/// The log of the tree in `directory`.
pub(super) fn log_stream(directory: &Path) -> Result<LogStream, WorkloadError> {
    let log = File::open(directory.join(OUTPUT_LOG)).map_err(failed("open its log"))?;
    Ok(LogStream::new(log, LOG_STREAM))
}
