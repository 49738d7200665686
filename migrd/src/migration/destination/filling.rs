//! Memory that follows: what a workload lacks is asked of its source, what it waits for
//! first, until it has everything.
//!
//! A task for each such workload, from before it is complete until nothing is lacking. It
//! remembers nothing that has to outlive it: what has come is known where the workload is
//! held, and what the source still has at the source.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tracing::Instrument;

use super::Shared;
use crate::migration::journal::{Counterpart, Event, Identity, JournalError};
use crate::migration::link::{LinkError, Peer, Pull, Pulled};
use crate::units::Epoch;
use crate::workload::{Lacks, Piece};

/// How many pieces are asked for in order at a time: about 2 MiB, which is what somebody
/// who waits for a page may have before him on the link.
const IN_ORDER: u32 = 4;
/// How many of those that somebody waits for.
const URGENT: u32 = 2;
/// How long the source has to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// The pause before it is asked again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What is filled.
#[derive(Clone)]
pub(super) struct Filling {
    pub(super) shared: Arc<Shared>,
    pub(super) identity: Identity,
    /// The epoch this host owns it in, or would.
    pub(super) epoch: Epoch,
    pub(super) from: Counterpart,
}

impl Filling {
    /// Begins to bring what it `lacks`.
    pub(super) fn start(self, lacks: Arc<dyn Lacks>) {
        let span = tracing::info_span!("filling", id = %self.from.migration, role = "destination",
            workload = self.identity.name);
        let abort = self.shared.abort.clone();
        let work = async move {
            self.bring(&lacks).await;
            self.note().await;
        };
        tokio::spawn(async move { abort.run_until_cancelled(work).await }.instrument(span));
    }

    /// Nothing of it can lack anything any more: it has ended.
    pub(super) fn over(self) {
        let abort = self.shared.abort.clone();
        tokio::spawn(async move { abort.run_until_cancelled(self.note()).await });
    }

    /// Returns when nothing is lacking, or nobody is left that could lack it.
    async fn bring(&self, lacks: &Arc<dyn Lacks>) {
        let mut workers = JoinSet::new();
        for number in 0..IN_ORDER + URGENT {
            let (filling, lacks) = (self.clone(), Arc::clone(lacks));
            workers.spawn(async move { filling.work(lacks.as_ref(), number < URGENT).await });
        }
        // The first that has nothing more to do speaks for all; one may wait for an answer.
        workers.join_next().await;
    }

    async fn work(&self, lacks: &dyn Lacks, urgent: bool) {
        let source = self.shared.host.peer(&self.from.address);
        loop {
            let piece = match lacks.next(urgent).await {
                Ok(Some(piece)) => piece,
                Ok(None) => return,
                Err(error) => {
                    tracing::info!(%error, "nothing is lacking any more");
                    return;
                }
            };
            let told = match self.pull(source.as_ref(), piece).await {
                Ok(bytes) => lacks.put(piece, bytes).await,
                Err(why) => {
                    tracing::error!(why, "memory of the workload is lost");
                    lacks.lost(&why).await
                }
            };
            if let Err(error) = told {
                // Whoever is told the same by another worker first.
                tracing::info!(%error, "a piece of memory was not taken");
            }
        }
    }

    /// A piece, however long it takes; or why it can't ever be had.
    async fn pull(&self, source: &dyn Peer, piece: Piece) -> Result<Vec<u8>, String> {
        let (migration, host) = (self.from.migration, self.from.host);
        let (workload, epoch) = (self.identity.id, self.epoch);
        let pull = Pull { host, migration, workload, epoch, piece };
        let mut pause = PAUSE.0;
        loop {
            let why = match tokio::time::timeout(ANSWER_WAIT, source.pull(&pull)).await {
                Ok(Ok(Pulled::Bytes(bytes))) if bytes.len() as u64 == piece.len_bytes() => {
                    return Ok(bytes);
                }
                Ok(Ok(Pulled::Bytes(bytes))) => LinkError::Misbehaved {
                    peer: self.from.address.clone(),
                    message: format!("it sent {} bytes of {}", bytes.len(), piece.len_bytes()),
                }
                .to_string(),
                Ok(Ok(Pulled::Lost(why))) => return Err(why),
                Ok(Ok(Pulled::Later(why))) => why,
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {ANSWER_WAIT:?}"),
            };
            tracing::warn!(why, "memory does not come; asking again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Journals that the source is not needed any more, as soon as it is this host's.
    async fn note(&self) {
        let mut pause = PAUSE.0;
        loop {
            let (filling, event) = (self.clone(), Event::Filled(self.from.migration));
            let written = tokio::task::spawn_blocking(move || {
                match filling.shared.journal.record(&filling.identity, &event) {
                    // It lacked nothing before it was owned, or will never be.
                    Err(JournalError::NotAllowed(_)) => filling.may_be_owned(),
                    other => other.map(|_| false),
                }
            });
            match written.await {
                Ok(Ok(false)) => return,
                Ok(Ok(true)) => {}
                Ok(Err(error)) => tracing::error!(%error, "that it is whole can't be journalled"),
                Err(error) => tracing::error!(%error, "the journal's writer panicked"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Whether this host may still come to own it by that migration.
    fn may_be_owned(&self) -> Result<bool, JournalError> {
        let migration = self.from.migration;
        if self.shared.journal.is_discarded(migration)? {
            return Ok(false);
        }
        let record = self.shared.journal.get(self.identity.id)?;
        let sealed = record.as_ref().and_then(|record| record.sealed.as_ref());
        let waits = sealed.is_some_and(|sealed| sealed.from.migration == migration);
        Ok(waits || record.is_none_or(|record| record.epoch < self.epoch))
    }
}
