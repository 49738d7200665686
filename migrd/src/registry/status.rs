//! How workloads stand, and why something asked of one was not done.

use std::sync::Arc;

use tokio::sync::watch;

use crate::migration::journal::{Identity, JournalError, Ownership, WorkloadRecord};
use crate::migration::link::Blocker;
use crate::migration::mode::NoSuchMode;
use crate::migration::phase::{Progress, Report};
use crate::units::{Epoch, MigrationId};
use crate::workload::{Kind, RunState, WorkloadError};

/// How a workload stands on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// An operator paused it.
    Paused,
    /// It ended.
    Stopped,
    /// On its way out or in.
    Migrating,
    /// Handed over or arrived, and the other host has not said the last word.
    InDoubt,
    /// It runs elsewhere.
    Gone,
}

/// What is known of a workload at this moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Who it is.
    pub identity: Identity,
    /// The epoch of its record.
    pub epoch: Epoch,
    /// How it stands.
    pub state: State,
    /// Why, in words; empty where the state says it all.
    pub reason: String,
    /// The other host, where there is one.
    pub peer: String,
    /// The migration under way.
    pub migration: Option<MigrationId>,
}

/// A migration that was started.
#[derive(Clone)]
pub struct Watching {
    /// The migration.
    pub id: MigrationId,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// Its report, once.
    pub result: watch::Receiver<Option<Arc<Report>>>,
}

/// What was asked of a workload could not be done. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No such name.
    #[error("no workload is named {0}; see `migctl list`")]
    Unknown(String),
    /// It is on its way, or being made.
    #[error(
        "{0} is not here yet: it is arriving, or being started or restored; wait for that (`migctl list`)"
    )]
    NotHereYet(String),
    /// Somebody stopped it before it ran.
    #[error("the start of {0} was called off by `migctl stop`; nothing of it is left")]
    CalledOff(String),
    /// The name is used.
    #[error("a workload named {0} is here already; choose another name or remove it")]
    NameTaken(String),
    /// The name can't be one.
    #[error(
        "{0:?} can't be a name: use letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit"
    )]
    BadName(String),
    /// A migration is under way.
    #[error("{name} is being migrated ({migration}); wait for it, or `migctl cancel {name}` first")]
    Busy {
        /// The workload.
        name: String,
        /// The migration.
        migration: MigrationId,
    },
    /// It stands in another way than the call needs.
    #[error("{name} is {state}, so it can't be {call}{hint}")]
    WrongState {
        /// The workload.
        name: String,
        /// How it stands.
        state: String,
        /// What was to be done to it.
        call: &'static str,
        /// What to do instead.
        hint: String,
    },
    /// It was asked to end, and has not.
    #[error(
        "{name} was asked to end and has not after {seconds} s: wait longer with --timeout, or \
         end it with `migctl stop {name} --force`"
    )]
    StillRuns {
        /// The workload.
        name: String,
        /// How long it was waited for, in seconds.
        seconds: f64,
    },
    /// It has moved while it was waited for.
    #[error("{name} was asked to end and has moved to {to} meanwhile: see there")]
    Left {
        /// The workload.
        name: String,
        /// Where it is.
        to: String,
    },
    /// No migration is under way.
    #[error("no migration of {0} is under way")]
    NotMigrating(String),
    /// It is past the point of no return.
    #[error(
        "the migration of {0} is past the point of no return and can't be cancelled; its result follows"
    )]
    TooLate(String),
    /// It can't move in the mode that was asked for.
    #[error(transparent)]
    NoSuchMode(#[from] NoSuchMode),
    /// Not enough memory.
    #[error("{}; {}", .0.message, .0.remedy)]
    NoRoom(Blocker),
    /// Another workload has its address.
    #[error("{}; {}", .0.message, .0.remedy)]
    AddressTaken(Blocker),
    /// This host has no engine for that kind.
    #[error("this host can't run workloads of kind {0:?}")]
    NoEngine(Kind),
    /// The workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The daemon is going down.
    #[error("migrd is shutting down; try again when it is back")]
    ShuttingDown,
}

pub(super) fn state_of(record: &WorkloadRecord, run: &RunState) -> (State, String) {
    match (&record.ownership, run) {
        (Ownership::Gone(_) | Ownership::Removed(_) | Ownership::Never, _) => {
            (State::Gone, String::new())
        }
        (Ownership::Released(_), _) => (State::InDoubt, String::new()),
        (Ownership::Owned, RunState::Running) => (State::Running, String::new()),
        (Ownership::Owned, RunState::Paused) => (State::Paused, String::new()),
        (Ownership::Owned, RunState::Ended(reason)) => {
            // What is found after a restart of the daemon knows less.
            (State::Stopped, record.ended.clone().unwrap_or_else(|| reason.clone()))
        }
    }
}
