//! A tree is made, and held.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use migr_proto::v1 as proto;

use super::work::mount_key;
use super::{
    Ended, Hold, News, RELEASE_LIMIT, RESTORE_LOG, RESTORED, RESUMING, Work, drive, system_failure,
};
use crate::keeper::cgroup::{self, Cgroup};
use crate::keeper::criu::rpc::{InheritFd, Request};
use crate::keeper::criu::session::inherited;
use crate::keeper::criu::{Failure, Launch, Session};
use crate::keeper::following::Following;
use crate::keeper::lazy_pages::LazyPages;
use crate::keeper::tcp_options::TcpOptions;
use crate::keeper::timers;

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
    /// What memory can follow it does: see [`crate::keeper::lazy_pages`].
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
    pub(in crate::keeper) fn lazy_pages(&self, work: &Work) -> Result<Option<LazyPages>, Failure> {
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
pub(in crate::keeper) fn conclude(
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
    let sockets = TcpOptions::load(&work.images)?;
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
            sockets.apply(&cgroup, init);
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
        lazy_pages.sound(done.is_ok()).map_err(system)?;
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
