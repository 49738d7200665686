//! Where a tree stands, and what other threads tell of it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use migr_proto::v1 as proto;
use vmm_sys_util::eventfd::EventFd;

use crate::keeper::container::CallOff;
use crate::keeper::hold::{Hold, News};

/// Where its tree stands.
#[derive(Debug)]
pub(super) enum Phase {
    Empty,
    /// runc starts its container; who waits for that.
    Starting {
        /// `None`: it was called off.
        call_off: Option<CallOff>,
        waits: Option<u64>,
    },
    Running,
    Paused,
    /// CRIU has it, or is about to.
    Dumping {
        hold: Hold,
        was_paused: bool,
        stage: Stage,
        /// The word was spoken: whether it is to die, and who waits for that.
        word: Option<(bool, u64)>,
        leave_running: bool,
    },
    /// CRIU makes it; who waits for that.
    Restoring {
        hold: Hold,
        waits: u64,
    },
    /// Complete, and held.
    Restored(Hold),
    /// Let go; who waits for that.
    Releasing {
        waits: u64,
        paused: bool,
        /// Its init has ended already; whether it ran is CRIU's to say.
        ended: Option<Option<ExitStatus>>,
    },
    Ended(Option<ExitStatus>),
}

/// How far a dump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// CRIU has begun, and the tree runs; who waits for it to be ready.
    Starting(u64),
    /// CRIU is ready, and the tree runs.
    Ready,
    /// CRIU is ready, and the tree stands still.
    Still,
    /// The tree stands still, and is being written.
    Writing,
    /// It is written.
    Written,
}

impl Stage {
    /// Nothing was done to the tree yet.
    pub(super) fn is_before(self) -> bool {
        matches!(self, Self::Starting(_) | Self::Ready)
    }
}

impl Phase {
    /// The tree lives, and nobody but its user has stopped it.
    pub(super) fn is_free(&self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::Dumping { stage, .. } => stage.is_before(),
            _ => false,
        }
    }

    /// For a message.
    pub(super) fn words(&self) -> &'static str {
        match self {
            Self::Empty => "it was not started",
            Self::Starting { .. } => "it is being started",
            Self::Running => "it runs",
            Self::Paused => "it is paused",
            Self::Dumping { stage, .. } if stage.is_before() => "it is about to be written",
            Self::Dumping { .. } => "it is being written",
            Self::Restoring { .. } => "it is being made",
            Self::Restored(_) => "it is complete and has not run",
            Self::Releasing { .. } => "it is being let go",
            Self::Ended(_) => "it has ended",
        }
    }

    /// As a daemon is told of it; `init` is the tree's.
    pub(super) fn status(&self, init: u32) -> proto::KeeperStatus {
        let phase = match self {
            Self::Empty | Self::Starting { .. } | Self::Restoring { .. } => {
                proto::KeeperPhase::Empty
            }
            Self::Running => proto::KeeperPhase::Running,
            Self::Paused => proto::KeeperPhase::Paused,
            Self::Dumping { stage, was_paused, .. } if stage.is_before() => match was_paused {
                true => proto::KeeperPhase::Paused,
                false => proto::KeeperPhase::Running,
            },
            Self::Dumping { .. } => proto::KeeperPhase::Dumping,
            Self::Restored(_) | Self::Releasing { .. } => proto::KeeperPhase::Restored,
            Self::Ended(_) => proto::KeeperPhase::Ended,
        };
        let ended = match self {
            Self::Ended(status) => *status,
            _ => None,
        };
        proto::KeeperStatus {
            phase: phase.into(),
            pid: init,
            exit_code: ended.and_then(|status| status.code()),
            signal: ended.and_then(|status| status.signal()).unwrap_or(0),
            ..proto::KeeperStatus::default()
        }
    }
}

/// What other threads tell the main one.
#[derive(Debug)]
pub(super) enum Told {
    Work(News),
    /// The same, of the dump of that number.
    Dump(u64, News),
    /// Memory is wanted that the daemon has to bring.
    Wanted,
    /// The init of that number has ended.
    End(u32, Option<ExitStatus>),
}

/// How other threads tell it.
#[derive(Clone, Debug)]
pub(super) struct Teller {
    pub(super) told: Sender<Told>,
    pub(super) bell: Arc<EventFd>,
}

impl Teller {
    /// Wakes it.
    pub(super) fn tell(&self, told: Told) {
        // The receiver lives as long as the process.
        let _ = self.told.send(told);
        let _ = self.bell.write(1);
    }
}
