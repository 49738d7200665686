//! The bytes of a VM: each stream in its own place.

use std::sync::Arc;

use super::disks::DiskStreams;
use super::serial_log::LogStream;
use super::{LOG_STREAM, failed};
use crate::pages::PageBitmap;
use crate::sys::mapping::GuestMapping;
use crate::workload::{
    ChunkSink, ChunkSource, OutOfStream, StreamHash, StreamKey, StreamSpec, WorkloadError,
};

/// Memory, log and, where they travel, disks of a VM, as streams.
pub(super) struct VmStreams {
    pub(super) memory: Arc<GuestMapping>,
    pub(super) log: LogStream,
    pub(super) disks: Option<DiskStreams>,
}

impl ChunkSource for VmStreams {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        if key == LOG_STREAM {
            self.log.read(key, offset, into)
        } else if let Some(disks) = self.disks_of(key) {
            disks.read(key, offset, into)
        } else {
            self.memory.read(key, offset, into)
        }
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        if key == LOG_STREAM {
            self.log.is_zero(key, offset, length)
        } else if let Some(disks) = self.disks_of(key) {
            disks.is_zero(key, offset, length)
        } else {
            self.memory.is_zero(key, offset, length)
        }
    }

    fn waits(&self, key: StreamKey) -> bool {
        self.disks_of(key).is_some_and(|disks| disks.waits(key))
    }
}

impl VmStreams {
    /// The disks, if `key` is one of them.
    pub(super) fn disks_of(&self, key: StreamKey) -> Option<&DiskStreams> {
        self.disks.as_ref().filter(|disks| disks.has(key))
    }

    /// The pages of a stream that hold something.
    pub(super) fn populated(&self, key: StreamKey) -> std::io::Result<PageBitmap> {
        match self.disks_of(key) {
            Some(disks) => disks.allocated(key),
            None => self.memory.populated(key),
        }
    }

    /// Hashes every stream of `specs`, which takes a while.
    pub(super) fn hash(&self, specs: &[StreamSpec]) -> Result<Vec<StreamHash>, WorkloadError> {
        let hash_one = |spec: &StreamSpec| {
            let hash = match self.disks_of(spec.key) {
                _ if spec.key == LOG_STREAM => self.log.hash(),
                Some(disks) => disks.hash(spec.key),
                None => self.memory.hash(spec.key),
            };
            let hash = hash.map_err(failed("hash its memory and disks"))?;
            Ok(StreamHash { key: spec.key, hash })
        };
        specs.iter().map(hash_one).collect()
    }
}

impl ChunkSink for VmStreams {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        if key == LOG_STREAM {
            self.log.write(key, offset, bytes)
        } else if let Some(disks) = self.disks_of(key) {
            disks.write(key, offset, bytes)
        } else {
            self.memory.write(key, offset, bytes)
        }
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        if key == LOG_STREAM {
            self.log.zero(key, offset, length)
        } else if let Some(disks) = self.disks_of(key) {
            disks.zero(key, offset, length)
        } else {
            self.memory.zero(key, offset, length)
        }
    }
}
