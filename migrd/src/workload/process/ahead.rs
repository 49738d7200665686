//! Memory of a tree that goes ahead of its stop: CRIU writes in rounds what has
//! changed, while the tree runs but for a moment in each.

use std::sync::Arc;

use migr_proto::v1 as proto;
use tokio::task::JoinHandle;

use super::images::Images;
use super::images::rounds::{Growing, parent_of};
use super::keeper::{Keeper, KeeperError};
use super::leaving::{LOOK, PART_PAGES};
use super::{spare_streams, told};
use crate::pages::{PageBitmap, PageSet};
use crate::workload::{Ahead, StreamKey, WorkloadError};

/// With less memory the rounds cost more than they save (bytes).
const PAYS_BYTES: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// What of a tree went ahead.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// How many were begun.
    begun: u32,
    growing: Growing,
    /// CRIU at work.
    writing: Option<JoinHandle<Result<(), KeeperError>>>,
    /// The last part of the round was handed out.
    over: bool,
}

/// What a tree has, for the choice of a mode.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Size {
    pub(super) processes: u32,
    /// Memory that can go ahead.
    pub(super) private_bytes: u64,
}

impl Rounds {
    /// Whether the memory of a tree of that size can go ahead, with `images` to put it
    /// in.
    pub(super) fn possible(&self, size: Size, images: &Images) -> Ahead {
        if images.streams() < self.growing.streams() + spare_streams(size.processes) {
            return Ahead::Not("it has too many processes for another round".into());
        }
        let (mib, least) = (size.private_bytes / MIB, PAYS_BYTES / MIB);
        let pays = size.private_bytes >= PAYS_BYTES;
        let why = if pays {
            format!("its {mib} MiB of private memory can be sent while it runs")
        } else {
            format!("it has {mib} MiB of private memory: below {least} MiB a stop takes no longer")
        };
        Ahead::Copies { pays, why }
    }

    /// The next part of a round; `None` at its end.
    pub(super) async fn next(
        &mut self,
        keeper: &Arc<Keeper>,
        images: &Images,
        options: proto::ProcessOptions,
    ) -> Result<Option<PageSet>, WorkloadError> {
        if std::mem::take(&mut self.over) {
            return Ok(None);
        }
        if self.writing.is_none() {
            self.begin(keeper.clone(), images, options)?;
        }
        let mut part = PageSet::default();
        loop {
            let written = self.writing.as_ref().is_none_or(JoinHandle::is_finished);
            if written && let Some(writing) = self.writing.take() {
                let failed = |e| WorkloadError::caused("writing its memory ahead failed", e);
                writing.await.map_err(failed)?.map_err(told("write its memory ahead"))?;
            }
            add(&mut part, self.growing.take(images, written)?);
            if written {
                add(&mut part, self.growing.emptied(images)?);
                self.over = true;
                return Ok(Some(part));
            }
            if part.count() >= PART_PAGES {
                return Ok(Some(part));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn begin(
        &mut self,
        keeper: Arc<Keeper>,
        images: &Images,
        options: proto::ProcessOptions,
    ) -> Result<(), WorkloadError> {
        let round = self.begun + 1;
        let directory = images.begin_round(round)?;
        self.begun = round;
        self.growing.enter(round);
        let parent = parent_of(round, round);
        // A task of its own: CRIU must not be left alone when nobody waits for the part.
        self.writing =
            Some(tokio::spawn(async move { keeper.ahead(directory, options, parent).await }));
        Ok(())
    }

    /// What the stop builds on: the directory of the last round, and what was handed
    /// out.
    pub(super) fn into_stop(self) -> (String, Growing) {
        let Self { begun, mut growing, .. } = self;
        growing.enter(0);
        (parent_of(0, begun), growing)
    }

    /// Returns when CRIU is not at work any more.
    pub(super) async fn end(&mut self) {
        if let Some(writing) = self.writing.take()
            && let Ok(Err(error)) = writing.await
        {
            tracing::info!(%error, "the last round of a process tree was not completed");
        }
    }
}

/// Adds pages to a part.
pub(super) fn add(part: &mut PageSet, pages: Vec<(StreamKey, PageBitmap)>) {
    for (key, mut pages) in pages {
        if let Some(before) = part.get(key) {
            pages.union(before);
        }
        part.set(key, pages);
    }
}
