//! The batches of one lane in a file instead of a connection.

use std::io::{self, Write};
use std::sync::Arc;

use super::batch::Filler;
use super::codec::Decoder;
use super::receive::{LaneApply, ReceiveError, Receiver};
use crate::units::PageRun;
use crate::workload::{ChunkSink, ChunkSource, StreamKey, StreamSpec};

/// Writes pages as batches.
pub struct FileSender<W> {
    filler: Filler,
    out: W,
    batches: u64,
    bytes: u64,
}

impl<W: Write> FileSender<W> {
    /// Reads pages from `source` and writes them to `out`.
    pub fn new(out: W, source: Arc<dyn ChunkSource>) -> Self {
        Self { filler: Filler::new(source), out, batches: 0, bytes: 0 }
    }

    /// Writes the pages of one run.
    ///
    /// # Errors
    /// When they can't be read or written.
    pub fn send(&mut self, key: StreamKey, run: PageRun) -> io::Result<()> {
        let mut rest = Some(run);
        while let Some(run) = rest {
            rest = self.filler.add(key, run).map_err(io::Error::other)?;
            if self.filler.is_full() {
                self.write_batch()?;
            }
        }
        Ok(())
    }

    fn write_batch(&mut self) -> io::Result<()> {
        let batch = self.filler.finish();
        self.out.write_all(&batch.head)?;
        self.out.write_all(&batch.data)?;
        self.batches += 1;
        self.bytes += (batch.head.len() + batch.data.len()) as u64;
        Ok(())
    }

    /// Writes what is left; how many batches and bytes that made.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn finish(mut self) -> io::Result<(u64, u64, W)> {
        if !self.filler.is_empty() {
            self.write_batch()?;
        }
        self.out.flush()?;
        Ok((self.batches, self.bytes, self.out))
    }
}

/// Puts the batches of a file in place, as checked as those of a lane.
pub struct FileLane {
    receiver: Receiver,
    decoder: Decoder,
    applied: u64,
}

impl FileLane {
    /// Takes batches of `streams` into `sink`.
    #[must_use]
    pub fn new(streams: &[StreamSpec], sink: Arc<dyn ChunkSink>) -> Self {
        let receiver = Receiver::new(streams, sink, 1);
        Self { receiver, decoder: Decoder::default(), applied: 0 }
    }

    /// Puts everything in place that `reader` gives, and says how many batches
    /// that was.
    ///
    /// # Errors
    /// When it can't be read, or is not a whole number of good batches.
    pub fn read(mut self, mut reader: impl io::Read) -> Result<u64, FileError> {
        let mut buffer = vec![0; 1 << 20];
        let mut apply = LaneApply::new(&self.receiver, 0);
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(FileError::Io(e)),
            };
            self.decoder
                .feed(&buffer[..n], &mut apply)
                .map_err(|error| apply.error(error))
                .map_err(FileError::Batch)?;
        }
        self.applied = apply.applied();
        let ended = self.decoder.finish();
        ended.map_err(|error| FileError::Batch(ReceiveError::Batch { lane: 0, error }))?;
        Ok(self.applied)
    }
}

/// A file of batches could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// What the system said.
    #[error(transparent)]
    Io(io::Error),
    /// What is in it.
    #[error(transparent)]
    Batch(ReceiveError),
}
