//! CRIU at work on a tree, and held at the moment where the next word decides which
//! copy of the tree runs.
//!
//! CRIU asks at fixed points whether to go on ("notify scripts" of its RPC). After a
//! dump it asks while every process is still in its hand: *no* lets them run on, *yes*
//! kills them. At a restore it asks when every process is complete and none has run:
//! *no* drops them, *yes* lets them run. A thread of its own waits there for the word.

mod dump;
mod restore;
mod work;

use std::io;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::criu::rpc::Response;
use super::criu::{CriuError, Event, Failure, Session};

pub use dump::dump;
pub(super) use dump::thaw_when_seized;
pub(super) use restore::conclude;
pub use restore::{Place, restore};
pub(super) use work::system_failure;
pub use work::{Work, external_mounts, logs};

/// Name of CRIU's log of a dump.
pub const DUMP_LOG: &str = "dump.log";
/// Name of its log of a restore.
pub const RESTORE_LOG: &str = "restore.log";
/// What the network namespace of a tree is called between a dump and a restore.
pub const NETWORK_KEY: &str = "migr-network";
/// How long CRIU may take to let a complete tree go.
pub(super) const RELEASE_LIMIT: Duration = Duration::from_secs(30);
/// Where CRIU asks after a dump.
pub(super) const DUMPED: &str = "post-dump";
/// Where it asks at a restore, when everything is complete.
pub(super) const RESTORED: &str = "post-restore";
/// Where it asks at a restore right before the processes go.
pub(super) const RESUMING: &str = "pre-resume";

/// What came of it.
#[derive(Debug)]
pub enum News {
    /// A container was started, or not; the process id of its init.
    Started(io::Result<u32>),
    /// The tree may be stopped: CRIU is ready to write it, and waits for a word.
    Ready,
    /// Everything is written; the tree is held.
    Dumped,
    /// The dump has failed; the tree is where it was before, and may go on.
    DumpFailed(Failure),
    /// The word was spoken, and CRIU has done what it says.
    DumpOver,
    /// The tree is complete, and held; the process id of its init.
    Restored(u32),
    /// It could not be made; nothing of it is left.
    RestoreFailed(Failure),
    /// The memory that has changed is written, or is not, and the tree runs.
    AheadOver(Result<(), Failure>),
    /// It is to run now, and its memory follows: [`News::Filled`] says when it is there.
    Filling,
    /// It runs, or is gone, as the word was.
    RestoreOver(Result<(), Failure>),
    /// Memory of it will never be there, for which it is killed now.
    Losing,
    /// All its memory is there; or will never be, and it was killed.
    Filled(Result<(), Failure>),
}

/// The words that a thread waits for.
#[derive(Debug)]
pub struct Hold {
    word: Sender<bool>,
}

impl Hold {
    /// Of a thread that hears it there.
    #[must_use]
    pub(super) fn new(word: Sender<bool>) -> Self {
        Self { word }
    }

    /// Speaks the next; those that nobody waits for count for nothing.
    pub fn say(&self, go_on: bool) {
        // A thread that is gone has had bad news, which it has told.
        let _ = self.word.send(go_on);
    }
}

/// How CRIU's work ended, if not well.
pub(super) enum Ended {
    /// By our own word.
    Refused,
    /// It took too long.
    Slow,
    /// It says that it failed.
    Failed(Response),
    /// It is gone, or says what it may not.
    Broken(CriuError),
}

/// Answers CRIU's questions until it is done. `hear` waits for the next one; `answer`
/// gets the step and the process that it is about, the root of the tree.
pub(super) fn drive(
    session: &mut Session,
    mut hear: impl FnMut(&mut Session) -> Result<Event, CriuError>,
    mut answer: impl FnMut(&str, u32) -> bool,
) -> Result<(), Ended> {
    let (mut refused, mut root) = (false, 0);
    loop {
        match hear(session) {
            Ok(Event::Notify { script, pid }) => {
                let pid = pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
                root = pid.unwrap_or(root);
                let go_on = answer(&script, root);
                refused |= !go_on;
                session.answer(go_on).map_err(Ended::Broken)?;
            }
            Ok(Event::Done(_)) | Err(_) if refused => return Err(Ended::Refused),
            Ok(Event::Done(response)) if response.success => return Ok(()),
            Ok(Event::Done(response)) => return Err(Ended::Failed(response)),
            Err(CriuError::Slow { .. }) => return Err(Ended::Slow),
            Err(error) => return Err(Ended::Broken(error)),
        }
    }
}
