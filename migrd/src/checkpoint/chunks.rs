//! The file of chunks of a snapshot, written part by part.

use std::fs::{File, OpenOptions};
use std::io::BufWriter;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::hashed::Hashed;
use super::{CheckpointError, blocking, io_error};
use crate::pages::PageSet;
use crate::wire::file::FileSender;
use crate::workload::ChunkSource;

/// The file of chunks, while it is written.
pub(super) struct Chunks {
    path: PathBuf,
    out: FileSender<Hashed<BufWriter<File>>>,
}

impl Chunks {
    pub(super) async fn create(
        path: PathBuf,
        chunks: Arc<dyn ChunkSource>,
    ) -> Result<Self, CheckpointError> {
        blocking(move || {
            // Memory of a workload is nobody else's to read.
            let mut options = OpenOptions::new();
            let made = options.write(true).create_new(true).mode(0o600).open(&path);
            let out = Hashed::new(BufWriter::new(made.map_err(io_error("write", &path))?));
            Ok(Self { path, out: FileSender::new(out, chunks) })
        })
        .await
    }

    pub(super) async fn write(self, pages: PageSet) -> Result<Self, CheckpointError> {
        let Self { path, mut out } = self;
        blocking(move || {
            for (key, bitmap) in pages.iter() {
                for run in bitmap.runs() {
                    out.send(key, run).map_err(io_error("write", &path))?;
                }
            }
            Ok(Self { path, out })
        })
        .await
    }

    /// Makes it durable; how many batches and bytes are in it, and its hash.
    pub(super) fn finish(self) -> Result<(u64, u64, String), CheckpointError> {
        let Self { path, out } = self;
        let (batches, bytes, file) = out.finish().map_err(io_error("write", &path))?;
        let (file, hash) = file.finish();
        let file = file.into_inner().map_err(|e| io_error("write", &path)(e.into_error()))?;
        file.sync_all().map_err(io_error("write", &path))?;
        Ok((batches, bytes, hash))
    }
}
