//! Memory that is put in place when its tree runs already, by `criu lazy-pages`.
//!
//! CRIU leaves out what userfaultfd(2) can bring later, and a tree is complete several
//! times sooner. Where the last descriptor of a userfaultfd is closed the kernel fills
//! what is missing with zeros, and the tree would go on with wrong memory. So the
//! keeper stands between the CRIU that makes the tree and the one that brings its
//! memory, and holds each of these descriptors, too: should the one that brings memory
//! end early, the tree stands still where it lacks something until it is killed, and
//! should the keeper end, the other goes on.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen,
    recv, send, socket,
};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::pipe2;

use super::criu::session::poll_until;
use super::criu::{Failure, Log};
use super::following::Following;
use super::hold::Work;
use crate::sys::fds;
use crate::sys::process::{self, PidFd};

/// What CRIU calls the socket, in its working directory.
const SOCKET: &str = "lazy-pages.socket";
/// Working directory of the one that brings memory, in that of the logs.
const DIRECTORY: &str = "lazy-pages";
/// Name of its log.
const LOG: &str = "lazy-pages.log";
/// Its descriptors: the images, its working directory, where it says that it listens, and
/// a page server.
const IMAGES: RawFd = 3;
const WORK: RawFd = 4;
const READY: RawFd = 5;
const PAGES: RawFd = 6;
/// What CRIU sends when the tree is complete, instead of a process.
const COMPLETE: i32 = 0x5253_5446;

/// Memory on its way into a tree.
#[derive(Debug)]
pub struct LazyPages {
    pager: Pager,
    /// Ends with the CRIU that makes the tree.
    relay: JoinHandle<(Held, io::Result<()>)>,
    maker: Maker,
    directory: OwnedFd,
}

/// The CRIU that makes the tree, as long as it does: it would wait for memory for ever
/// when nobody brings it any more.
#[derive(Clone, Debug, Default)]
struct Maker(Arc<Mutex<Making>>);

#[derive(Debug, Default)]
struct Making {
    criu: Option<PidFd>,
    /// It was ended for want of memory.
    ended: bool,
}

impl Maker {
    fn lock(&self) -> MutexGuard<'_, Making> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, criu: Option<PidFd>) {
        self.lock().criu = criu;
    }

    fn end(&self) {
        let mut making = self.lock();
        let Some(criu) = making.criu.take() else { return };
        making.ended = true;
        if let Err(error) = criu.kill() {
            eprintln!("CRIU can't be ended: {error}");
        }
    }
}

/// What keeps memory that is missing from being zeros.
#[derive(Debug)]
struct Held {
    /// Where CRIU's connection waits, and the descriptors in it.
    listener: OwnedFd,
    criu: Option<OwnedFd>,
    /// The one that brings memory would fail if this were closed before it is done.
    to: Option<OwnedFd>,
    /// Memory that has to come first.
    following: Option<Arc<Following>>,
    /// A userfaultfd for each process.
    memory: Vec<OwnedFd>,
}

/// The process that brings it. Dropped: killed.
#[derive(Debug)]
struct Pager(Child);

impl Drop for Pager {
    fn drop(&mut self) {
        // It has ended if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl LazyPages {
    /// Starts it for the tree that is about to be made of `work`'s images, all of which
    /// are there but for what is `following`.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(work: &Work, following: Option<&Arc<Following>>) -> io::Result<Self> {
        mkdirat(&work.logs, DIRECTORY, Mode::S_IRWXU)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = openat(&work.logs, DIRECTORY, flags, Mode::empty())?;
        let listener = stream()?;
        bind(listener.as_raw_fd(), &address(&work.logs)?)?;
        listen(&listener, Backlog::new(1)?)?;
        let (ready, says_ready) = pipe2(OFlag::O_CLOEXEC)?;
        let (served, pages) = UnixStream::pair()?;
        let pages = following.map(|_| pages.into());
        let pager = Pager(pager(work, &directory, says_ready, pages)?);
        let process = PidFd::open(pager.0.id())?;
        if let Some(following) = following {
            following.serve(served, process.try_clone()?)?;
        }
        let serves = directory.try_clone()?;
        let maker = Maker::default();
        let (watched, depends) = (process.try_clone()?, maker.clone());
        std::thread::Builder::new().name("pager".into()).spawn(move || {
            let mut wait = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
            // Without a limit it waits until there is something to see.
            let _ = poll_until(&mut wait, None);
            depends.end();
        })?;
        let (following, memory) = (following.cloned(), Vec::new());
        let mut held = Held { listener, criu: None, to: None, following, memory };
        let over = maker.clone();
        let relay = std::thread::Builder::new().name("lazy-pages".into()).spawn(move || {
            let relayed = held.relay(&process, ready, &serves, || over.set(None));
            (held, relayed)
        })?;
        Ok(Self { pager, relay, maker, directory })
    }

    /// From now on `criu` is ended when nobody brings memory any more: it makes the tree.
    ///
    /// # Errors
    /// When that is so already.
    pub fn made_by(&mut self, criu: PidFd) -> io::Result<()> {
        // In this order: what ends between the two is seen by one of them.
        self.maker.set(Some(criu));
        self.check()
    }

    /// The tree is complete: that its memory still can follow. The CRIU that has made it
    /// is left alone from now on.
    ///
    /// # Errors
    /// When it can't.
    pub fn complete(&mut self) -> io::Result<()> {
        self.maker.set(None);
        self.check()
    }

    /// That it still can be done, or is done, asked before the tree runs.
    ///
    /// # Errors
    /// When it can't.
    pub fn check(&mut self) -> io::Result<()> {
        match self.pager.0.try_wait()? {
            Some(status) if !status.success() => {
                Err(io::Error::other(how(status, &self.directory)))
            }
            _ => Ok(()),
        }
    }

    /// Whether the tree can have its memory, once the CRIU that was to make it has ended;
    /// `made`: well. Nothing has run yet, and whoever hears of a failure may run another
    /// copy.
    ///
    /// # Errors
    /// Why it can't.
    pub fn sound(&mut self, made: bool) -> io::Result<()> {
        match self.why_ended() {
            Some(error) => Err(error),
            None if made => self.check(),
            None => Ok(()),
        }
    }

    /// Why the CRIU that made the tree was ended, if it was for want of memory.
    fn why_ended(&mut self) -> Option<io::Error> {
        let ended = self.maker.lock().ended;
        ended.then(|| match self.pager.0.wait() {
            Ok(status) => io::Error::other(how(status, &self.directory)),
            Err(error) => error,
        })
    }

    /// Waits until a tree that runs has all its memory.
    ///
    /// # Errors
    /// When it never will have it. `kill` has been called then: it stands still where
    /// something is missing only as long as this is not over.
    pub fn finish(self, kill: impl FnOnce()) -> Result<(), Failure> {
        let Self { mut pager, relay, maker: _, directory } = self;
        let (held, relayed) = match relay.join() {
            Ok((held, relayed)) => (Some(held), relayed),
            Err(_) => (None, Err(io::Error::other("a thread died"))),
        };
        let why = match (relayed, pager.0.wait()) {
            (Ok(()), Ok(status)) if status.success() => return Ok(()),
            (_, Ok(status)) if !status.success() => how(status, &directory),
            (Err(error), _) | (_, Err(error)) => error.to_string(),
            (Ok(()), Ok(status)) => how(status, &directory),
        };
        kill();
        drop(held);
        Err(Failure {
            code: "memory-lost",
            message: format!("its memory could not be put in place, so it was ended: {why}"),
            remedy: "see what has become of the process `criu lazy-pages` of that host",
        })
    }
}

/// How the process that brings memory has ended.
fn how(status: ExitStatus, directory: &OwnedFd) -> String {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let opened = openat(directory, LOG, flags, Mode::empty());
    let log = opened.map_err(io::Error::from).and_then(|fd| Log::read(File::from(fd)));
    let log = log.unwrap_or_default();
    match (log.errors().next(), status.signal()) {
        (_, Some(signal)) => format!("`criu lazy-pages` was ended by signal {signal}"),
        (Some(line), None) => format!("`criu lazy-pages` says {line:?}"),
        (None, None) => format!("`criu lazy-pages` ended with {status}"),
    }
}

fn pager(
    work: &Work,
    directory: &OwnedFd,
    says_ready: OwnedFd,
    pages: Option<OwnedFd>,
) -> io::Result<Child> {
    let path = |number: RawFd| format!("/proc/self/fd/{number}");
    let mut command = Command::new(&work.criu);
    command.args(["--no-default-config", "lazy-pages", "-v2", "--log-file", LOG]);
    command.args(["--images-dir", &path(IMAGES), "--work-dir", &path(WORK)]);
    // Not with --auto-dedup, which frees what was read from the images: it reads a page
    // again when the tree has changed its mappings meanwhile, or has forked.
    if pages.is_some() {
        command.args(["--page-server", "--ps-socket", &PAGES.to_string()]);
    }
    command.args(["--status-fd", &READY.to_string()]);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    let mut fds = vec![
        (work.images.try_clone()?, IMAGES),
        (directory.try_clone()?, WORK),
        (says_ready, READY),
    ];
    fds.extend(pages.map(|pages| (pages, PAGES)));
    process::isolate(&mut command, fds);
    command.spawn()
}

fn stream() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The socket in a directory that may have no path.
fn address(directory: &OwnedFd) -> io::Result<UnixAddr> {
    let directory = format!("/proc/self/fd/{}", directory.as_raw_fd());
    Ok(UnixAddr::new(&Path::new(&directory).join(SOCKET))?)
}

impl Held {
    /// Passes on what CRIU says of the processes it makes, and keeps what it passes on.
    /// `over` is called when CRIU has ended, before the one that brings memory can hear of
    /// that.
    fn relay(
        &mut self,
        pager: &PidFd,
        ready: OwnedFd,
        directory: &OwnedFd,
        over: impl FnOnce(),
    ) -> io::Result<()> {
        let ended = || io::Error::other("`criu lazy-pages` has ended");
        if !comes_before_the_end(&self.listener, pager)? {
            return Err(ended());
        }
        let criu = fds::own(accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?);
        let criu = self.criu.insert(criu);
        if !comes_before_the_end(&ready, pager)? || File::from(ready).read(&mut [0])? == 0 {
            return Err(ended());
        }
        let to = self.to.insert(stream()?);
        connect(to.as_raw_fd(), &address(directory)?)?;
        let mut word = [0; 4];
        while take(criu, &mut word)? {
            let pid = i32::from_ne_bytes(word);
            if let Some(following) = self.following.as_ref().filter(|_| pid == COMPLETE) {
                following.complete(to.try_clone()?, word)?;
                continue;
            }
            send(to.as_raw_fd(), &word, MsgFlags::MSG_NOSIGNAL)?;
            // A zombie, by its number below zero, has no memory.
            if pid == COMPLETE || pid < 0 {
                continue;
            }
            let mut byte = [0];
            let (length, given) = fds::receive(&*criu, &mut byte)?;
            self.memory.extend(given);
            let memory = self.memory.last().filter(|_| length == 1);
            let memory = memory.ok_or_else(|| io::Error::other("CRIU sent no userfaultfd"))?;
            fds::send(&*to, &byte, &[memory.as_fd()])?;
        }
        over();
        Ok(())
    }
}

/// Whether there is something to be had from `fd` before the pager ends.
fn comes_before_the_end(fd: &OwnedFd, pager: &PidFd) -> io::Result<bool> {
    let mut wait =
        [PollFd::new(fd.as_fd(), PollFlags::POLLIN), PollFd::new(pager.as_fd(), PollFlags::POLLIN)];
    poll_until(&mut wait, None)?;
    Ok(wait[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)))
}

/// Fills `into`; false at the end of the connection.
fn take(from: &OwnedFd, into: &mut [u8; 4]) -> io::Result<bool> {
    loop {
        match recv(from.as_raw_fd(), into, MsgFlags::MSG_WAITALL) {
            Ok(0) => return Ok(false),
            Ok(4) => return Ok(true),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            // CRIU was killed.
            Err(Errno::ECONNRESET) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
