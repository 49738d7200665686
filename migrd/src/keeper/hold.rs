//! CRIU at work on a tree, and held at the moment where the next word decides which
//! copy of the tree runs.
//!
//! CRIU asks at fixed points whether to go on ("notify scripts" of its RPC). After a
//! dump it asks while every process is still in its hand: *no* lets them run on, *yes*
//! kills them. At a restore it asks when every process is complete and none has run:
//! *no* drops them, *yes* lets them run. A thread of its own waits there for the word.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use migr_proto::v1 as proto;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::cgroup::{self, Cgroup};
use super::connections;
use super::criu::rpc::{
    CgroupMode, InheritFd, NetworkLock, Options, PageServerInfo, Request, Response,
};
use super::criu::session::inherited;
use super::criu::{CriuError, Event, Failure, Launch, Log, Session};
use super::following::Following;
use super::lazy_pages::LazyPages;
use super::{mounts, timers};
use crate::sys::tmpfs;

/// Name of CRIU's log of a dump.
pub const DUMP_LOG: &str = "dump.log";
/// Name of its log of a restore.
pub const RESTORE_LOG: &str = "restore.log";
/// What the network namespace of a tree is called between a dump and a restore.
pub const NETWORK_KEY: &str = "migr-network";
/// CRIU's log level: what failed, and the steps before it.
const LOG_LEVEL: i32 = 4;
/// What CRIU's logs may come to (bytes).
const LOGS_BYTES: u64 = 1 << 30;
/// How long CRIU may take to have every process of a tree in its hand.
const SEIZE_LIMIT: Duration = Duration::from_secs(20);
/// How long CRIU may take to let a complete tree go.
pub(super) const RELEASE_LIMIT: Duration = Duration::from_secs(30);
/// Where CRIU asks before a dump, when it has looked at everything but the tree.
const READY: &str = "pre-dump";
/// Where CRIU asks after a dump.
pub(super) const DUMPED: &str = "post-dump";
/// Where it asks at a restore, when everything is complete.
pub(super) const RESTORED: &str = "post-restore";
/// Where it asks at a restore right before the processes go.
pub(super) const RESUMING: &str = "pre-resume";

/// What came of it.
#[derive(Debug)]
pub enum News {
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

/// What both ways have in common.
#[derive(Debug)]
pub struct Work {
    /// CRIU.
    pub criu: PathBuf,
    /// Directory of the images.
    pub images: OwnedFd,
    /// Directory of CRIU's logs. Not that of the images, which may be the user's, or
    /// full, and the log says so.
    pub logs: OwnedFd,
    /// The cgroup of the tree.
    pub cgroup: PathBuf,
    /// What the user lets CRIU do.
    pub options: proto::ProcessOptions,
    /// The network namespace of the tree, if it has one.
    pub network: Option<OwnedFd>,
    /// Mount points that CRIU does not look into.
    pub mounts: Vec<String>,
    /// What else is outside of it, as CRIU's `--external` has it; for a dump.
    pub external: Vec<String>,
    /// What its network namespace is called between a dump and a restore.
    pub network_key: &'static str,
    /// A page server that memory goes to; none: into images.
    pub page_server: Option<OwnedFd>,
    /// Directory of the images that a dump builds on, relative to that of its own; empty:
    /// it has everything.
    pub parent: String,
    /// What the tree writes to its memory after a dump is told to a later one.
    pub track: bool,
}

impl Work {
    pub(super) fn options(&self, log: &str) -> Options {
        use std::os::fd::AsRawFd;
        let proto::ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } =
            self.options;
        let ghost = u32::try_from(ghost_limit_bytes).unwrap_or(u32::MAX);
        Options {
            images_dir_fd: self.images.as_raw_fd(),
            work_dir_fd: Some(self.logs.as_raw_fd()),
            log_level: Some(LOG_LEVEL),
            log_file: Some(log.to_owned()),
            notify_scripts: Some(true),
            manage_cgroups_mode: Some(CgroupMode::Ignore.into()),
            // The tree's network is cut off by its namespace, from outside.
            network_lock: Some(NetworkLock::Skip.into()),
            tcp_established: Some(!drop_connections),
            tcp_close: Some(drop_connections),
            file_locks: Some(file_locks),
            link_remap: Some(link_remap),
            ghost_limit: (ghost > 0).then_some(ghost),
            ext_sharing: Some(true),
            ext_masters: Some(true),
            ..Options::default()
        }
    }

    /// How the tree of `pid` is written.
    pub(super) fn dump_options(&self, pid: u32) -> Result<Options, Failure> {
        let mut options = self.options(DUMP_LOG);
        options.pid = i32::try_from(pid).ok();
        let named = self.mounts.iter().enumerate();
        options.external =
            named.map(|(index, path)| format!("mnt[{path}]:{}", mount_key(index))).collect();
        if let Some(network) = &self.network {
            let inode = inode(network).map_err(|e| system_failure(&e))?;
            options.external.push(format!("net[{inode}]:{}", self.network_key));
        }
        options.external.extend(self.external.iter().cloned());
        if !self.parent.is_empty() {
            options.parent_img = Some(self.parent.clone());
        }
        if self.track || !self.parent.is_empty() {
            options.track_mem = Some(true);
        }
        Ok(options)
    }

    /// What CRIU's answer and its log say of a failure.
    pub(super) fn failure(&self, log: &str, ended: Ended) -> Failure {
        explain(ended, || read_log(&self.logs, log))
    }

    /// The same of a CRIU whose log is among the images.
    pub(super) fn failure_among_images(&self, log: &str, ended: Ended) -> Failure {
        explain(ended, || read_log(&self.images, log))
    }
}

fn explain(ended: Ended, log: impl FnOnce() -> Log) -> Failure {
    match ended {
        Ended::Failed(response) => Failure::explain(&response, &log()),
        Ended::Broken(error) => system_failure(&error),
        Ended::Refused => system_failure(&"it was told not to go on"),
        Ended::Slow => Failure {
            code: "slow",
            message: "CRIU does not come to an end".into(),
            remedy: "see what that host is busy with: its storage, its memory",
        },
    }
}

fn read_log(directory: &OwnedFd, name: &str) -> Log {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let opened = openat(directory, name, flags, Mode::empty());
    let read = opened.map_err(io::Error::from).and_then(|fd| Log::read(File::from(fd)));
    read.unwrap_or_default()
}

/// A directory for CRIU's logs, in memory.
///
/// # Errors
/// When the kernel makes none.
pub fn logs() -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(&tmpfs::create(LOGS_BYTES)?, ".", flags, Mode::empty())?)
}

/// What a mount is called between a dump and a restore.
fn mount_key(index: usize) -> String {
    format!("migr-mount-{index}")
}

/// A failure that is not CRIU's.
pub(super) fn system_failure(error: &impl std::fmt::Display) -> Failure {
    let remedy = "see what the keeper's log has to say";
    Failure { code: "system", message: error.to_string(), remedy }
}

/// Has CRIU write the tree of `pid`, and holds it. It waits for two words: that all of
/// the tree's processes stand still by their cgroup, and then, what becomes of them.
pub fn dump(work: Work, pid: u32, tell: impl Fn(News) + Send + 'static) -> io::Result<Hold> {
    let (word, heard) = channel();
    std::thread::Builder::new().name("dump".into()).spawn(move || {
        match dump_held(&work, pid, &heard, &tell) {
            Ok(()) => tell(News::DumpOver),
            Err(failure) => tell(News::DumpFailed(failure)),
        }
    })?;
    Ok(Hold { word })
}

fn dump_held(
    work: &Work,
    pid: u32,
    heard: &Receiver<bool>,
    tell: &impl Fn(News),
) -> Result<(), Failure> {
    let cgroup = Cgroup::at(&work.cgroup);
    let mut options = work.dump_options(pid)?;
    let handed: Vec<_> = work.page_server.iter().map(AsFd::as_fd).collect();
    options.ps = work.page_server.as_ref().map(|_| PageServerInfo { fd: Some(inherited(0)) });
    let started = Session::start(Launch { inherited: &handed, ..Launch::plain(&work.criu) });
    let mut session = started.map_err(|e| system_failure(&e))?;
    session.request(&Request::dump(options)).map_err(|e| system_failure(&e))?;
    let criu = session.pid();
    let held = std::thread::scope(|scope| {
        let mut seized = None;
        let held = drive(&mut session, Session::next, |script, _| match script {
            READY => {
                tell(News::Ready);
                let stopped = heard.recv().unwrap_or(false);
                // CRIU makes the processes work for it, which those of a frozen cgroup
                // can't. It has to hold every one of them before they are let go by the
                // cgroup.
                seized = stopped.then(|| scope.spawn(|| thaw_when_seized(&cgroup, criu)));
                stopped
            }
            DUMPED => {
                // Should CRIU die, the processes stand still all the same.
                if cgroup.set_frozen(true).is_err() {
                    return false;
                }
                tell(News::Dumped);
                heard.recv().unwrap_or(false)
            }
            _ => true,
        });
        // It ends when CRIU does, at the latest.
        drop(session);
        if let Some(seized) = seized {
            let _ = seized.join();
        }
        held
    });
    if held.is_err() {
        match connections::release(&cgroup) {
            Ok(0) => {}
            Ok(count) => eprintln!("CRIU had left {count} TCP connections silent"),
            Err(error) => eprintln!("TCP connections may stay silent: {error}"),
        }
    }
    match held {
        // A dump that was not to be "fails".
        Ok(()) | Err(Ended::Refused) => Ok(()),
        Err(ended) => Err(work.failure(DUMP_LOG, ended)),
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

/// Thaws the cgroup as soon as CRIU has every process, and after some time in every
/// case: it fails then, and says why.
pub(super) fn thaw_when_seized(cgroup: &Cgroup, criu: u32) {
    let started = Instant::now();
    loop {
        let all = cgroup.threads().unwrap_or_default();
        let seized = !all.is_empty() && all.iter().all(|thread| is_held(*thread, criu));
        let over = !Path::new(&format!("/proc/{criu}")).exists();
        if seized || over || started.elapsed() > SEIZE_LIMIT {
            let _ = cgroup.set_frozen(false);
            return;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Whether CRIU traces a thread: itself, or its child, which it has for a pre-dump.
fn is_held(thread: u32, criu: u32) -> bool {
    let tracer = status_number(thread, "TracerPid:").filter(|tracer| *tracer > 0);
    tracer.is_some_and(|tracer| {
        tracer == criu || status_number(tracer, "PPid:").is_some_and(|parent| parent == criu)
    })
}

fn status_number(pid: u32, name: &str) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

fn inode(fd: &OwnedFd) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::File::from(fd.try_clone()?).metadata()?.ino())
}

/// Where a tree is made.
#[derive(Debug)]
pub struct Place {
    /// A mount point that has `/` below it.
    pub root: PathBuf,
    /// Standard input, and output and error, of the tree.
    pub stdin: OwnedFd,
    /// Standard output and error.
    pub stdout: OwnedFd,
    /// How the dump named them.
    pub stdio: Vec<proto::ProcessStdio>,
    /// It is to stand still after its first word.
    pub paused: Arc<AtomicBool>,
    /// How long CRIU may take to make it.
    pub limit: Option<Duration>,
    /// What memory can follow it does: see [`super::lazy_pages`].
    pub lazy: bool,
    /// Memory that is still at its source.
    pub following: Option<Arc<Following>>,
}

impl Place {
    /// Starts what brings memory that follows, if it is to. Without it everything is
    /// put in place before, if everything is here.
    ///
    /// # Errors
    /// When it can't be started, and some is not here.
    pub(super) fn lazy_pages(&self, work: &Work) -> Result<Option<LazyPages>, Failure> {
        if !self.lazy {
            return Ok(None);
        }
        let started = LazyPages::start(work, self.following.as_ref());
        match started.inspect_err(|e| eprintln!("`criu lazy-pages` can't be started: {e}")) {
            Err(error) if self.following.is_some() => Err(system_failure(&error)),
            started => Ok(started.ok()),
        }
    }
}

/// Has CRIU make a tree from images, and holds it.
///
/// # Errors
/// When there is no room for a thread.
pub fn restore(work: Work, place: Place, tell: impl Fn(News) + Send + 'static) -> io::Result<Hold> {
    let (word, heard) = channel();
    std::thread::Builder::new().name("restore".into()).spawn(move || {
        restore_held(&work, &place, &heard, &tell);
    })?;
    Ok(Hold { word })
}

fn restore_held(work: &Work, place: &Place, heard: &Receiver<bool>, tell: &impl Fn(News)) {
    let lazy_pages = match place.lazy_pages(work) {
        Ok(lazy_pages) => lazy_pages,
        Err(failure) => return tell(News::RestoreFailed(failure)),
    };
    conclude(work, lazy_pages, tell, |lazy, told| {
        restore_to_the_word(work, place, lazy, |init| {
            told(init);
            heard.recv().unwrap_or(false)
        })
    });
}

/// Has a tree made, and tells what came of it and of its memory. `make` gets what brings
/// memory if that follows, tells when the tree is complete, and says whether it was let go.
pub(super) fn conclude(
    work: &Work,
    mut lazy_pages: Option<LazyPages>,
    tell: &impl Fn(News),
    make: impl FnOnce(Option<&mut LazyPages>, &mut dyn FnMut(u32)) -> Result<bool, Failure>,
) {
    let mut complete = false;
    let result = make(lazy_pages.as_mut(), &mut |init| {
        complete = true;
        tell(News::Restored(init));
    });
    match result {
        Err(failure) if !complete => tell(News::RestoreFailed(failure)),
        Err(failure) => tell(News::RestoreOver(Err(failure))),
        Ok(runs) => {
            let follows = lazy_pages.filter(|_| runs);
            if follows.is_some() {
                tell(News::Filling);
            }
            tell(News::RestoreOver(Ok(())));
            if let Some(lazy_pages) = follows {
                tell(News::Filled(lazy_pages.finish(|| {
                    // Before its end is heard of, which is to have a reason.
                    tell(News::Losing);
                    if let Err(error) = Cgroup::at(&work.cgroup).kill() {
                        eprintln!("processes that lack memory stay behind: {error}");
                    }
                })));
            }
        }
    }
}

fn restore_to_the_word(
    work: &Work,
    place: &Place,
    mut lazy_pages: Option<&mut LazyPages>,
    mut word: impl FnMut(u32) -> bool,
) -> Result<bool, Failure> {
    let system = |error: io::Error| system_failure(&error);
    let cgroup = Cgroup::at(&work.cgroup);
    let mut options = work.options(RESTORE_LOG);
    options.rst_sibling = Some(true);
    options.auto_dedup = Some(true);
    options.lazy_pages = lazy_pages.as_ref().map(|_| true);
    options.root = Some(place.root.display().to_string());
    let named = work.mounts.iter().enumerate();
    options.external =
        named.map(|(index, path)| format!("mnt[{}]:{path}", mount_key(index))).collect();
    let mut handed = BTreeMap::new();
    for end in &place.stdio {
        let fd = if end.fd == 0 { &place.stdin } else { &place.stdout };
        handed.insert(end.pipe.clone(), fd.as_fd());
    }
    if let Some(network) = &work.network {
        handed.insert(work.network_key.to_owned(), network.as_fd());
    }
    let fds: Vec<_> = handed.values().copied().collect();
    let keys = handed.into_keys().enumerate();
    options.inherit_fd = keys.map(|(index, key)| InheritFd { key, fd: inherited(index) }).collect();
    // What CRIU makes stays in the cgroup that CRIU is in.
    let procs = OpenOptions::new().write(true).open(cgroup.processes_file()).map_err(system)?;
    let launch = Launch { criu: &work.criu, inherited: &fds, cgroup_procs: Some(procs.as_fd()) };
    let mut session = Session::start(launch).map_err(|e| system_failure(&e))?;
    session.request(&Request::restore(options)).map_err(|e| system_failure(&e))?;
    let criu = session.pid();
    if let Some(lazy_pages) = &mut lazy_pages {
        session.handle().and_then(|maker| lazy_pages.made_by(maker)).map_err(system)?;
    }
    let (mut wanted, mut stuck) = (false, None);
    let deadline = Cell::new(place.limit.map(|limit| Instant::now() + limit));
    let hear = |session: &mut Session| match deadline.get() {
        Some(deadline) => session.next_within(deadline.saturating_duration_since(Instant::now())),
        None => session.next(),
    };
    let done = drive(&mut session, hear, |script, init| match script {
        RESTORED => {
            let started = cgroup.processes().and_then(|all| timers::start_again(&all));
            if let Err(error) = started {
                eprintln!("timers of its processes may stand still: {error}");
            }
            // CRIU is in the cgroup, too, and has to go on when that is frozen.
            let ready = lazy_pages.as_mut().map_or(Ok(()), |lazy_pages| lazy_pages.complete());
            match ready.and_then(|()| cgroup::take_in(criu)) {
                Ok(()) => wanted = word(init),
                Err(error) => stuck = Some(error),
            }
            // It may have been held for long.
            if wanted && let Some(Err(error)) = lazy_pages.as_mut().map(|lazy| lazy.check()) {
                stuck = Some(error);
            }
            deadline.set(Some(Instant::now() + RELEASE_LIMIT));
            wanted && stuck.is_none()
        }
        // Should CRIU fail from here on, nothing has run yet: whoever hears of the
        // failure may run another copy.
        RESUMING => cgroup.set_frozen(true).is_ok(),
        _ => true,
    });
    if done.is_err() {
        // What CRIU lets go of when it ends, as it does now, must not run.
        let _ = cgroup.set_frozen(true);
        drop(session);
    }
    if let Some(error) = stuck {
        return Err(system(error));
    }
    if let Some(lazy_pages) = lazy_pages {
        if let Some(error) = lazy_pages.why_ended() {
            return Err(system(error));
        }
        // Until here nothing has run, and whoever hears of a failure may run another copy.
        if done.is_ok() {
            lazy_pages.check().map_err(system)?;
        }
    }
    match done {
        Ok(()) if !place.paused.load(Ordering::SeqCst) => {
            cgroup.set_frozen(false).map(|()| true).map_err(system)
        }
        Ok(()) => Ok(true),
        Err(Ended::Refused) if !wanted => Ok(false),
        Err(ended) => Err(work.failure(RESTORE_LOG, ended)),
    }
}

/// The mounts of a tree that CRIU does not look into.
///
/// # Errors
/// When its init is gone.
pub fn external_mounts(init: u32) -> io::Result<Vec<String>> {
    Ok(mounts::external(&mounts::of(&init.to_string())?))
}
