//! What a workload that has ended has to move.

use super::{ChunkSource, OutOfStream, StreamKey};

/// Its streams: none.
#[derive(Debug)]
pub struct NoStreams;

impl ChunkSource for NoStreams {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        Err(OutOfStream { key, offset, length: into.len() as u64 })
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        Err(OutOfStream { key, offset, length })
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}
