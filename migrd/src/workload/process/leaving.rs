//! A tree on its way out of its processes, into images.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use migr_proto::v1 as proto;

use super::ahead::add;
use super::images::Images;
use super::images::rounds::Growing;
use super::keeper::{Keeper, OUTPUT_LOG};
use super::receiving::Receiving;
use super::{LOG_STREAM, failed, to_wire};
use crate::pages::PageSet;
use crate::serial_log::{Cleared, Reader};
use crate::workload::{ProcessOptions, WorkloadError};

/// What of memory is worth a part of its own while CRIU still writes, in pages:
/// 4 MiB.
pub(super) const PART_PAGES: u64 = 1024;
/// How often to look what CRIU has written.
pub(super) const LOOK: Duration = Duration::from_millis(2);
/// The version of a [`proto::ProcessState`] that this migrd writes.
pub(super) const STATE_VERSION: u32 = 1;

/// A tree on its way out of its processes.
#[derive(Default)]
pub(super) struct Dump {
    growing: Growing,
    /// Memory that CRIU hands over.
    memory: Option<Receiving>,
    /// What of memory is in the processes stays there.
    follows: bool,
    end: Option<proto::KeeperDumped>,
    log_sent: bool,
}

impl Dump {
    /// Of a tree of which `growing` was handed out already.
    pub(super) fn after(growing: Growing, memory: Option<Receiving>, follows: bool) -> Self {
        Self { growing, memory, follows, ..Self::default() }
    }

    /// What of memory is in none of its parts, if it was stopped for that.
    pub(super) fn stays(&self, images: &Images) -> (Vec<proto::ProcessStay>, u64) {
        if self.follows { images.stays(&self.growing.numbers()) } else { (Vec::new(), 0) }
    }

    /// Whether memory was to stay in the processes.
    pub(super) fn follows(&self) -> bool {
        self.follows
    }

    /// Ends it in the middle, as far as that can be done from here.
    pub(super) fn abort(&self) {
        if let Some(memory) = &self.memory {
            memory.abort();
        }
    }

    /// CRIU has written everything, as far as was seen.
    pub(super) fn is_written(&self) -> bool {
        self.end.is_some()
    }

    /// The next part of what has come to be since it was stopped, by the state of its
    /// `keeper`; `None` when that was all.
    pub(super) async fn rest(
        &mut self,
        directory: &Path,
        keeper: &Keeper,
        images: &Images,
    ) -> Result<Option<PageSet>, WorkloadError> {
        let mut states = keeper.states();
        let mut part = PageSet::default();
        while self.end.is_none() {
            self.end = self.look(keeper).await?;
            let taken = self.growing.take(images, self.end.is_some())?;
            add(&mut part, if self.follows { images.without_frozen(taken) } else { taken });
            if part.count() >= PART_PAGES {
                return Ok(Some(part));
            }
            if self.end.is_none() {
                let _ = tokio::time::timeout(LOOK, states.changed()).await;
            }
        }
        if !self.log_sent {
            self.log_sent = true;
            let log = File::open(directory.join(OUTPUT_LOG)).map_err(failed("open its log"))?;
            let mut log = Reader::open(log).map_err(failed("read its log"))?;
            let pages = log.pages_changed_since(&Cleared::default());
            part.set(LOG_STREAM, pages.map_err(failed("read its log"))?);
            return Ok(Some(part));
        }
        Ok(None)
    }

    /// What CRIU has said of its end, if it has.
    async fn look(
        &mut self,
        keeper: &Keeper,
    ) -> Result<Option<proto::KeeperDumped>, WorkloadError> {
        let said = keeper.dumped();
        let over = !matches!(said, Ok(None));
        let received = match self.memory.take_if(|_| over) {
            Some(memory) => memory.end().await,
            None => Ok(()),
        };
        match (said, received) {
            // It is why CRIU has failed.
            (_, Err(Some(error))) => Err(error.into()),
            (Ok(_), Err(None)) => Err(WorkloadError::new("CRIU has not sent all its memory")),
            (said, _) => said.map_err(|e| WorkloadError::new(e.to_string())),
        }
    }

    /// What the destination has to know beside the streams, but for what wrote them.
    pub(super) fn state(
        &self,
        images: &Images,
        options: ProcessOptions,
    ) -> Result<proto::ProcessState, WorkloadError> {
        let end = self.end.clone().ok_or_else(|| WorkloadError::new("it is not written yet"))?;
        let proto::KeeperDumped { error: _, stdio, input, mounts, processes } = end;
        Ok(proto::ProcessState {
            version: STATE_VERSION,
            criu: String::new(),
            images: images.to_wire(&images.list_all()?, &self.growing.numbers())?,
            stdio,
            input,
            mounts,
            processes,
            options: Some(to_wire(options)),
            stays: self.stays(images).0,
        })
    }
}
