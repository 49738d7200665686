//! The bytes of a process tree: its log, and its images.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::images::Images;
use super::keeper::OUTPUT_LOG;
use super::rootfs::{Leaving, ROOTFS_STREAM};
use super::{LOG_STREAM, failed};
use crate::serial_log::LogStream;
use crate::workload::{ChunkSource, OutOfStream, StreamHash, StreamKey, StreamSpec, WorkloadError};

/// What a migration reads: log and images.
pub(super) struct TreeStreams {
    log: LogStream,
    images: Images,
    /// Of a container whose root file system moves with it.
    rootfs: Option<Arc<Leaving>>,
}

impl TreeStreams {
    pub(super) fn new(log: LogStream, images: Images) -> Self {
        Self { log, images, rootfs: None }
    }

    /// The same, with a root file system.
    pub(super) fn with_rootfs(self, rootfs: Option<Arc<Leaving>>) -> Self {
        Self { rootfs, ..self }
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
                ROOTFS_STREAM => match &self.rootfs {
                    Some(rootfs) => rootfs.hash(),
                    None => Err(std::io::ErrorKind::NotFound.into()),
                },
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
            ROOTFS_STREAM => match &self.rootfs {
                Some(rootfs) => rootfs.read(offset, into),
                None => Err(OutOfStream { key, offset, length: into.len() as u64 }),
            },
            _ => self.images.read(key, offset, into),
        }
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        match key {
            LOG_STREAM => self.log.is_zero(key, offset, length),
            ROOTFS_STREAM => match &self.rootfs {
                Some(rootfs) => rootfs.is_zero(offset, length),
                None => Err(OutOfStream { key, offset, length }),
            },
            _ => self.images.is_zero(key, offset, length),
        }
    }

    fn waits(&self, key: StreamKey) -> bool {
        key == ROOTFS_STREAM
    }
}

/// The log of the tree in `directory`.
pub(super) fn log_stream(directory: &Path) -> Result<LogStream, WorkloadError> {
    let log = File::open(directory.join(OUTPUT_LOG)).map_err(failed("open its log"))?;
    Ok(LogStream::new(log, LOG_STREAM))
}
