//! One `criu swrk` process: started, asked, held at its steps, and ended.
//!
//! ```text
//! start ──request──▶ busy ──next──▶ Done            (it may be asked again)
//!                     ▲  └──next──▶ Notify ─┐ held
//!                     └──────answer─────────┘
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::Pid;
use prost::Message;

use super::rpc::{Request, RequestType, Response};
use crate::sys::process::{self, PidFd};

/// The number of the socket in the CRIU process.
const SOCKET: RawFd = 3;
/// How many descriptors CRIU can be handed.
const INHERITED_MAX: usize = process::CROSSING_MAX - 1;
/// The longest answer of CRIU's (bytes). The longest part of one is a message of
/// at most 4 KiB.
const RESPONSE_BYTES: usize = 64 << 10;
/// How long CRIU may take to end once it has closed its socket.
const END: Duration = Duration::from_secs(5);
/// Where CRIU finds the programs that it runs (`ip`, `iptables`, `tar`).
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The number in the CRIU process of the `index`th descriptor of
/// [`Launch::inherited`], for [`super::rpc::InheritFd`].
#[must_use]
pub fn inherited(index: usize) -> RawFd {
    RawFd::try_from(index).map_or(-1, |index| SOCKET + 1 + index)
}

/// CRIU could not be asked, or did not answer. What it answers is a
/// [`Response`], even when it failed.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// It did not start.
    #[error("cannot start CRIU ({path})")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// More descriptors than a process is started with.
    #[error("CRIU is to be handed {0} descriptors: at most {INHERITED_MAX} are possible")]
    TooManyDescriptors(usize),
    /// It ended without an answer.
    #[error("CRIU {} while it {doing}", ending(*.status))]
    Died {
        /// What it was doing.
        doing: &'static str,
        /// How it ended.
        status: ExitStatus,
    },
    /// It did not answer in time.
    #[error("CRIU did not answer within {} s while it {doing}", .limit.as_secs())]
    Slow {
        /// What it was doing.
        doing: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The system failed.
    #[error("the socket to CRIU failed")]
    Socket(#[from] io::Error),
    /// Not a message of CRIU's.
    #[error("CRIU sent what is not an answer: is the program CRIU?")]
    Malformed(#[from] prost::DecodeError),
    /// An answer longer than any.
    #[error("CRIU sent an answer of more than {RESPONSE_BYTES} bytes")]
    TooLong,
    /// A message that does not belong here.
    #[error("CRIU answered with a message of type {got} while it {doing}")]
    Unexpected {
        /// What it was doing.
        doing: &'static str,
        /// The type of the message.
        got: i32,
    },
    /// The caller asked while CRIU was busy, or answered what was not asked.
    #[error("CRIU was told to {0} out of turn")]
    OutOfTurn(&'static str),
}

impl From<Errno> for CriuError {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("was killed by {name}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, None) => "ended".into(),
    }
}

/// What a CRIU process is started with.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The program.
    pub criu: &'a Path,
    /// Descriptors that CRIU gets; see [`inherited`] for their numbers there.
    pub inherited: &'a [BorrowedFd<'a>],
    /// An open `cgroup.procs`, of the cgroup that CRIU is to be in. Restored
    /// processes stay in it when CRIU does not manage cgroups.
    pub cgroup_procs: Option<BorrowedFd<'a>>,
}

impl<'a> Launch<'a> {
    /// Starts `criu` with nothing of ours.
    #[must_use]
    pub fn plain(criu: &'a Path) -> Self {
        Self { criu, inherited: &[], cgroup_procs: None }
    }
}

/// What comes from CRIU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// CRIU stands still at a step until [`Session::answer`].
    Notify {
        /// The step, such as `post-dump`.
        script: String,
        /// The root of the tree in the caller's pid namespace, at the steps of
        /// a restore that have one.
        pid: Option<i32>,
    },
    /// The request is done with, or has failed.
    Done(Response),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Free,
    Busy(RequestType),
    Held(RequestType),
}

/// A running `criu swrk` in a session of its own.
///
/// Dropping it kills CRIU, and whatever of it is at work, and reaps it. A tree
/// that was held after its dump then runs on; what had been restored and was
/// held may be there still, and even run: whoever drops a restore has to kill
/// the root it was told of.
#[derive(Debug)]
pub struct Session {
    socket: OwnedFd,
    child: Child,
    pidfd: PidFd,
    turn: Turn,
    ended: Option<ExitStatus>,
}

impl Session {
    /// Starts CRIU and leaves it waiting for a request. What it says before it
    /// has a log goes to this process's stderr.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(launch: Launch<'_>) -> Result<Self, CriuError> {
        Self::start_within(launch, Vec::new())
    }

    /// The same, in these namespaces.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_within(
        launch: Launch<'_>,
        namespaces: Vec<(OwnedFd, CloneFlags)>,
    ) -> Result<Self, CriuError> {
        let Launch { criu, inherited: given, cgroup_procs } = launch;
        if given.len() > INHERITED_MAX {
            return Err(CriuError::TooManyDescriptors(given.len()));
        }
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let mut fds = vec![(theirs, SOCKET)];
        for (index, fd) in given.iter().enumerate() {
            fds.push((fd.try_clone_to_owned()?, inherited(index)));
        }
        let mut command = Command::new(criu);
        // The administrator's defaults for CRIU must not change where its log
        // goes or what becomes of the tree.
        command.args(["--no-default-config", "swrk"]).arg(SOCKET.to_string());
        command.env_clear().env("PATH", PATH).stdin(Stdio::null()).stdout(Stdio::null());
        process::enter(&mut command, namespaces);
        if let Some(procs) = cgroup_procs {
            process::join_cgroup(&mut command, procs.try_clone_to_owned()?);
        }
        process::isolate(&mut command, fds);
        let failed = |source| CriuError::Start { path: criu.to_owned(), source };
        let mut child = command.spawn().map_err(failed)?;
        // The command owns our copy of CRIU's end of the socket: as long as it
        // is open, the end of CRIU does not show.
        drop(command);
        match PidFd::open(child.id()) {
            Ok(pidfd) => Ok(Self { socket, child, pidfd, turn: Turn::Free, ended: None }),
            Err(source) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(failed(source))
            }
        }
    }

    /// The CRIU process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A descriptor that becomes readable when CRIU ends, for the time in which
    /// it is held and nobody waits in [`Session::next`].
    ///
    /// # Errors
    /// When there is no room for another descriptor.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.pidfd.watch()
    }

    /// Another handle to CRIU's process: killing it ends a [`Session::next`]
    /// that waits in another thread.
    ///
    /// # Errors
    /// When there is no room for another descriptor.
    pub fn handle(&self) -> io::Result<PidFd> {
        self.pidfd.try_clone()
    }

    /// Asks for something. Needs CRIU to be free: new, or done with what it was
    /// asked before and told to stay (`keep_open`, or a pre-dump).
    ///
    /// # Errors
    /// When it is busy, has ended, or the request does not fit into a message.
    pub fn request(&mut self, request: &Request) -> Result<(), CriuError> {
        if self.turn != Turn::Free {
            return Err(CriuError::OutOfTurn("begin something"));
        }
        self.send(request, request.r#type())?;
        self.turn = Turn::Busy(request.r#type());
        Ok(())
    }

    /// Waits for what CRIU says next.
    ///
    /// # Errors
    /// When it ends without saying anything, or says what it may not. A second
    /// call after that says the same.
    #[expect(clippy::should_implement_trait, reason = "an error is not the end of an iteration")]
    pub fn next(&mut self) -> Result<Event, CriuError> {
        self.receive(None)
    }

    /// The same, for at most `limit`.
    ///
    /// # Errors
    /// As for [`Session::next`], and when the time is over. CRIU is still at
    /// work then.
    pub fn next_within(&mut self, limit: Duration) -> Result<Event, CriuError> {
        self.receive(Some(limit))
    }

    /// Answers a notification: CRIU goes on, or gives up what it does.
    ///
    /// # Errors
    /// When there is none, or CRIU has ended.
    pub fn answer(&mut self, go_on: bool) -> Result<(), CriuError> {
        let Turn::Held(what) = self.turn else {
            return Err(CriuError::OutOfTurn("go on"));
        };
        self.send(&Request::answer(go_on), what)?;
        self.turn = Turn::Busy(what);
        Ok(())
    }

    fn send(&mut self, request: &Request, what: RequestType) -> Result<(), CriuError> {
        let bytes = request.encode_to_vec();
        match send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(self.died(what)),
            Err(e) => Err(e.into()),
        }
    }

    fn receive(&mut self, limit: Option<Duration>) -> Result<Event, CriuError> {
        let Turn::Busy(what) = self.turn else {
            return Err(CriuError::OutOfTurn("say something"));
        };
        let mut bytes = vec![0; RESPONSE_BYTES];
        let deadline = limit.map(|limit| Instant::now() + limit);
        let length = loop {
            if !self.wait_readable(deadline)? {
                let limit = limit.unwrap_or_default();
                return Err(CriuError::Slow { doing: what.doing(), limit });
            }
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            match recv(self.socket.as_raw_fd(), &mut bytes, flags) {
                Ok(0) | Err(Errno::ECONNRESET) => return Err(self.died(what)),
                Ok(length) => break length,
                Err(Errno::EINTR) => {}
                // Not its socket but CRIU itself is what was noticed. What it
                // had forked may still have the socket open.
                Err(Errno::EAGAIN) => return Err(self.died(what)),
                Err(e) => return Err(e.into()),
            }
        };
        let response = Response::decode(bytes.get(..length).ok_or(CriuError::TooLong)?)?;
        self.accept(what, response)
    }

    fn accept(&mut self, what: RequestType, response: Response) -> Result<Event, CriuError> {
        let unexpected = CriuError::Unexpected { doing: what.doing(), got: response.r#type };
        match RequestType::try_from(response.r#type) {
            Ok(RequestType::Notify) => {
                let notify = response.notify.ok_or(unexpected)?;
                self.turn = Turn::Held(what);
                Ok(Event::Notify { script: notify.script.unwrap_or_default(), pid: notify.pid })
            }
            // A request that CRIU does not know gets no more than a failure.
            Ok(RequestType::Empty) if !response.success => Ok(self.done(response)),
            Ok(kind) if kind == what => Ok(self.done(response)),
            _ => Err(unexpected),
        }
    }

    fn done(&mut self, response: Response) -> Event {
        self.turn = Turn::Free;
        Event::Done(response)
    }

    /// Whether there is something to receive before `deadline`, be it the end of
    /// the process.
    fn wait_readable(&self, deadline: Option<Instant>) -> Result<bool, CriuError> {
        let mut wait = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN),
        ];
        poll_until(&mut wait, deadline).map_err(CriuError::Socket)
    }

    /// CRIU has closed its socket or has ended: takes its status.
    fn died(&mut self, what: RequestType) -> CriuError {
        // The socket may close a moment before the process has ended.
        let mut wait = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll_until(&mut wait, Some(Instant::now() + END));
        match self.end() {
            Ok(status) => CriuError::Died { doing: what.doing(), status },
            Err(e) => e.into(),
        }
    }

    /// Kills what is left of CRIU and reaps it.
    fn end(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        // As long as CRIU is not reaped, nobody else has its number. What it has
        // forked for its own work is in its session; a tree that it has restored
        // or holds is not, unless the tree began in one from outside
        // (`shell_job`): that one is left alone once it is restored.
        if let (Turn::Busy(_) | Turn::Held(_), Ok(group)) =
            (self.turn, i32::try_from(self.child.id()))
        {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        self.child.kill()?;
        let status = self.child.wait()?;
        self.ended = Some(status);
        Ok(status)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Waits until one of `fds` is ready, and says whether one is.
pub(in crate::keeper) fn poll_until(
    fds: &mut [PollFd<'_>],
    deadline: Option<Instant>,
) -> io::Result<bool> {
    loop {
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            // Rounded up, so that the last turn does not spin.
            let left = deadline.saturating_duration_since(Instant::now()).as_micros();
            PollTimeout::try_from(left.div_ceil(1000)).unwrap_or(PollTimeout::MAX)
        });
        match poll(fds, timeout) {
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() < deadline) => {}
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
