//! CRIU writes what memory of a tree has changed, and the tree runs on.
//!
//! The tree stands still while CRIU takes hold of its pages, and runs again before they
//! are written. CRIU has to be let finish: killed in the middle it would leave its own
//! code in the processes.

use std::io;

use super::cgroup::Cgroup;
use super::criu::rpc::Request;
use super::criu::{Failure, Launch, Session};
use super::hold::{DUMP_LOG, News, Work, drive, system_failure, thaw_when_seized};

/// Has CRIU write the memory of the tree of `pid`, but for what has not changed since
/// the images of its parent.
///
/// # Errors
/// When there is no room for a thread.
pub fn write(work: Work, pid: u32, tell: impl Fn(News) + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("ahead".into()).spawn(move || {
        tell(News::AheadOver(written(&work, pid)));
    })?;
    Ok(())
}

fn written(work: &Work, pid: u32) -> Result<(), Failure> {
    let cgroup = Cgroup::at(&work.cgroup);
    let mut options = work.dump_options(pid)?;
    options.track_mem = Some(true);
    // What is replaced is of no use any more, and would have to be kept in memory.
    options.auto_dedup = Some(!work.parent.is_empty());
    let started = Session::start(Launch::plain(&work.criu));
    let mut session = started.map_err(|e| system_failure(&e))?;
    // Processes that start others all the time would be hard to get hold of.
    cgroup.freeze_tree(pid).map_err(|e| not_still(&e))?;
    let criu = session.pid();
    let asked = session.request(&Request::pre_dump(options));
    let done = std::thread::scope(|scope| {
        let seized = scope.spawn(|| thaw_when_seized(&cgroup, criu));
        let done = match asked {
            Ok(()) => drive(&mut session, Session::next, |_, _| true)
                .map_err(|e| work.failure(DUMP_LOG, e)),
            Err(error) => Err(system_failure(&error)),
        };
        // It waits for another request, and thaws at its end at the latest.
        drop(session);
        let _ = seized.join();
        done
    });
    cgroup.set_frozen(false).map_err(|e| system_failure(&e))?;
    done
}

fn not_still(error: &io::Error) -> Failure {
    Failure { code: "not_still", message: error.to_string(), remedy: "then try again" }
}
