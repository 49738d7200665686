//! Takes over a tree that somebody else has started: CRIU writes it, and a second one
//! makes it anew in a PID namespace of its own. Both hold what they have until the
//! daemon has decided, as in a move between hosts; until then the original is what
//! goes on after any failure.
//!
//! ```text
//! original  written ── held ───────────────────── killed
//! copy                  └── made ── held ─ word ────┴──── let go
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use migr_proto::v1 as proto;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::cgroup::{self, Cgroup};
use super::criu::rpc::{Options, Request};
use super::criu::session::inherited;
use super::criu::{Event, Failure, Launch, Session};
use super::hold::{
    DUMP_LOG, DUMPED, Ended, Hold, News, RESTORE_LOG, RESTORED, RESUMING, Work, system_failure,
};
use super::{timers, tree};
use crate::sys::process::{PidFd, start_time};

/// CRIU's image of the clocks of processes that are in its own time namespace.
const CLOCKS: &str = "timens-0.img";
/// How long an original that was killed may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

/// The tree as it is.
#[derive(Clone, Copy, Debug)]
pub struct Original {
    /// Its first process.
    pub pid: u32,
    /// When that was started, in clock ticks since the host was.
    pub start_time: u64,
}

/// What a copy is made of, and where.
#[derive(Debug)]
pub struct Adoption {
    /// CRIU's work; its images are for this host only.
    pub work: Work,
    /// What it is a copy of.
    pub original: Original,
    /// What it will be.
    pub config: proto::ProcessConfig,
    /// It is to stand still after its first word.
    pub paused: Arc<AtomicBool>,
}

/// Has CRIU take over a tree, and holds original and copy.
///
/// # Errors
/// When there is no room for a thread.
pub fn adopt(adoption: Adoption, tell: impl Fn(News) + Send + 'static) -> io::Result<Hold> {
    let (word, heard) = channel();
    std::thread::Builder::new().name("adopt".into()).spawn(move || {
        let mut complete = false;
        let result = take_over(&adoption, |init| {
            complete = true;
            tell(News::Restored(init));
            hear(&heard)
        });
        match result {
            Err(failure) if !complete => tell(News::RestoreFailed(failure)),
            other => tell(News::RestoreOver(other)),
        }
    })?;
    Ok(Hold::new(word))
}

fn hear(heard: &Receiver<bool>) -> bool {
    heard.recv().unwrap_or(false)
}

fn take_over(adoption: &Adoption, word: impl FnOnce(u32) -> bool) -> Result<(), Failure> {
    let system = |error: io::Error| system_failure(&error);
    let Adoption { work, original, .. } = adoption;
    let root = PidFd::open(original.pid).map_err(system)?;
    // Named by number until here.
    if start_time(original.pid) != Some(original.start_time) {
        return Err(system_failure(&"the process has ended, and another has its number"));
    }
    let mut dump = write(work, original.pid)?;
    let copied = forget_clocks(work).and_then(|()| {
        copy_beside(adoption, word, || {
            end(&mut dump, true);
            is_dead(&root)
        })
    });
    if copied.is_err() {
        // Harmless if it was told otherwise before.
        end(&mut dump, false);
    }
    copied
}

/// The clocks go on: without their values CRIU makes no time namespace, which the tree
/// would have and its first process not.
fn forget_clocks(work: &Work) -> Result<(), Failure> {
    match unlinkat(&work.images, CLOCKS, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(system_failure(&io::Error::from(error))),
    }
}

/// Has CRIU write the original, and hold it.
fn write(work: &Work, pid: u32) -> Result<Session, Failure> {
    let system = |error: io::Error| system_failure(&error);
    // In the original's own mount namespace CRIU has no mounts to write.
    let mounts = File::open(format!("/proc/{pid}/ns/mnt")).map_err(system)?;
    let within = vec![(OwnedFd::from(mounts), CloneFlags::CLONE_NEWNS)];
    let mut options = work.options(DUMP_LOG);
    options.pid = i32::try_from(pid).ok();
    let started = Session::start_within(Launch::plain(&work.criu), within);
    let mut dump = started.map_err(|e| system_failure(&e))?;
    dump.request(&Request::dump(options)).map_err(|e| system_failure(&e))?;
    match up_to(&mut dump, DUMPED) {
        Ok(_) => Ok(dump),
        Err(ended) => Err(work.failure(DUMP_LOG, ended)),
    }
}

/// Answers *yes* until CRIU asks at `step`, where it is held; the process it told of.
fn up_to(session: &mut Session, step: &str) -> Result<u32, Ended> {
    let mut root = 0;
    loop {
        match session.next().map_err(Ended::Broken)? {
            Event::Notify { script, pid } => {
                root = pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(root);
                if script == step {
                    return Ok(root);
                }
                session.answer(true).map_err(Ended::Broken)?;
            }
            Event::Done(response) => return Err(Ended::Failed(response)),
        }
    }
}

/// Answers the question that CRIU is held at, and waits for its end. Whether that was
/// a good one shows elsewhere: a dump that was not to be "fails".
fn end(session: &mut Session, go_on: bool) {
    let mut answered = session.answer(go_on);
    while answered.is_ok() {
        answered = match session.next() {
            Ok(Event::Notify { .. }) => session.answer(true),
            Ok(Event::Done(_)) | Err(_) => return,
        };
    }
}

/// Waits until a process that was killed has ended.
fn is_dead(process: &PidFd) -> bool {
    let started = Instant::now();
    while started.elapsed() < DEATH {
        let mut wait = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if let Ok(1..) = poll(&mut wait, PollTimeout::from(100u8)) {
            return true;
        }
    }
    false
}

/// Makes the copy below a first process of its own. `word` gets the number of that
/// when the copy is complete and held; after its yes, `replace` does away with the
/// original, and says whether it did.
fn copy_beside(
    adoption: &Adoption,
    word: impl FnOnce(u32) -> bool,
    replace: impl FnOnce() -> bool,
) -> Result<(), Failure> {
    let cgroup = Cgroup::at(&adoption.work.cgroup);
    let init = tree::start_reaper(&adoption.config, &cgroup);
    let init = init.map_err(|error| system_failure(&error))?;
    let mut told = false;
    let copied = copy_below(
        adoption,
        &cgroup,
        init,
        || {
            told = true;
            word(init)
        },
        replace,
    );
    if copied.is_err() {
        let _ = cgroup.kill();
        // Of the end of one that was told of, others hear.
        if !told {
            tree::wait(init);
        }
    }
    copied
}

fn copy_below(
    adoption: &Adoption,
    cgroup: &Cgroup,
    init: u32,
    word: impl FnOnce() -> bool,
    replace: impl FnOnce() -> bool,
) -> Result<(), Failure> {
    let system = |error: io::Error| system_failure(&error);
    let Adoption { work, paused, .. } = adoption;
    let mut copy = begin(work, cgroup, init)?;
    up_to(&mut copy, RESTORED).map_err(|ended| restore_failure(work, ended))?;
    let started = cgroup.processes().and_then(|all| timers::start_again(&all));
    if let Err(error) = started {
        eprintln!("timers of its processes may stand still: {error}");
    }
    // It has to go on when the cgroup is frozen.
    cgroup::take_in(copy.pid()).map_err(system)?;
    if !word() {
        end(&mut copy, false);
        return Err(system_failure(&"it was told not to go on"));
    }
    if !replace() {
        end(&mut copy, false);
        return Err(system_failure(&"the original did not end; it goes on"));
    }
    // The copy is all there is now.
    let resumed = copy.answer(true).map_err(Ended::Broken);
    let resumed = resumed.and_then(|()| up_to(&mut copy, RESUMING));
    resumed.map_err(|ended| restore_failure(work, ended))?;
    cgroup.set_frozen(true).map_err(system)?;
    let done = copy.answer(true).map_err(Ended::Broken).and_then(|()| finish(&mut copy));
    done.map_err(|ended| restore_failure(work, ended))?;
    if paused.load(Ordering::SeqCst) {
        return Ok(());
    }
    cgroup.set_frozen(false).map_err(system)
}

fn restore_failure(work: &Work, ended: Ended) -> Failure {
    // A CRIU in another PID namespace can't reach the directory of logs.
    work.failure_among_images(RESTORE_LOG, ended)
}

/// Starts the CRIU that makes the copy, in the namespaces of its first process.
fn begin(work: &Work, cgroup: &Cgroup, init: u32) -> Result<Session, Failure> {
    let system = |error: io::Error| system_failure(&error);
    let space = |name: &str| File::open(format!("/proc/{init}/ns/{name}")).map(OwnedFd::from);
    let within = vec![
        (space("ipc").map_err(system)?, CloneFlags::CLONE_NEWIPC),
        (space("mnt").map_err(system)?, CloneFlags::CLONE_NEWNS),
    ];
    // What this thread starts from now on is in there; it starts nothing else.
    let pids = space("pid").map_err(system)?;
    setns(&pids, CloneFlags::CLONE_NEWPID).map_err(|e| system(e.into()))?;
    let procs = OpenOptions::new().write(true).open(cgroup.processes_file()).map_err(system)?;
    let fds = [work.images.as_fd()];
    let launch = Launch { criu: &work.criu, inherited: &fds, cgroup_procs: Some(procs.as_fd()) };
    let mut copy = Session::start_within(launch, within).map_err(|e| system_failure(&e))?;
    // In there this process has no number by which CRIU could find its descriptors.
    let options = Options {
        images_dir_fd: -1,
        images_dir: Some(format!("/proc/self/fd/{}", inherited(0))),
        work_dir_fd: None,
        auto_dedup: Some(true),
        ..work.options(RESTORE_LOG)
    };
    copy.request(&Request::restore(options)).map_err(|e| system_failure(&e))?;
    Ok(copy)
}

/// Answers *yes* to the end.
fn finish(session: &mut Session) -> Result<(), Ended> {
    loop {
        match session.next().map_err(Ended::Broken)? {
            Event::Notify { .. } => session.answer(true).map_err(Ended::Broken)?,
            Event::Done(response) if response.success => return Ok(()),
            Event::Done(response) => return Err(Ended::Failed(response)),
        }
    }
}
