//! What anybody may know of a workload without asking its owner, and the way
//! to ask it.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot, watch};

use super::super::{RegistryError, State, Status, Watching};
use super::{Command, Reply};
use crate::migration::phase::Report;
use crate::workload::Terminal;

/// The way to an owner. Cheap to clone.
#[derive(Clone)]
pub(in crate::registry) struct OwnerHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) published: Arc<Published>,
}

/// What anybody may look at without asking the owner.
pub(super) struct Published {
    pub(super) status: watch::Sender<Status>,
    pub(super) terminal: Mutex<Option<Arc<dyn Terminal>>>,
    pub(super) watching: Mutex<Option<Watching>>,
    pub(super) last: Mutex<Option<Arc<Report>>>,
}

pub(super) fn get<T: Clone>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

pub(super) fn put<T>(slot: &Mutex<Option<T>>, value: Option<T>) {
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = value;
}

impl OwnerHandle {
    /// Whether both lead to the same owner.
    pub(in crate::registry) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.published, &other.published)
    }

    pub(in crate::registry) fn status(&self) -> Status {
        self.published.status.borrow().clone()
    }

    pub(in crate::registry) fn follow(&self) -> watch::Receiver<Status> {
        self.published.status.subscribe()
    }

    pub(in crate::registry) fn terminal(&self) -> Option<Arc<dyn Terminal>> {
        get(&self.published.terminal)
    }

    pub(in crate::registry) fn watching(&self) -> Option<Watching> {
        get(&self.published.watching)
    }

    pub(in crate::registry) fn last_report(&self) -> Option<Arc<Report>> {
        get(&self.published.last)
    }

    /// Memory it was promised and has not touched, in bytes.
    pub(in crate::registry) fn untouched(&self) -> u64 {
        let (promised, state) = {
            let status = self.published.status.borrow();
            (status.identity.memory_bytes, status.state)
        };
        if state == State::Stopped {
            return 0;
        }
        self.terminal().map_or(0, |t| promised.saturating_sub(t.populated_bytes()))
    }

    pub(in crate::registry) async fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, RegistryError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(command(reply)).await;
        sent.map_err(|_| RegistryError::ShuttingDown)?;
        answer.await.unwrap_or(Err(RegistryError::ShuttingDown))
    }
}
