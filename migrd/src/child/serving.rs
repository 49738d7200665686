//! Serves the daemon, and outlives it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::Message;
use vmm_sys_util::eventfd::EventFd;

use super::daemon::{Came, Daemon};
use super::listener::Listener;
use crate::sys::fds;

/// What is served.
pub trait Served {
    /// What a daemon asks.
    type Request: Message + Default;

    /// The line to the daemon.
    fn line(&mut self) -> &mut Line;

    /// The line's bell has rung.
    fn rang(&mut self);

    /// Serves a request, and says whether to go on.
    fn answer(&mut self, request: Self::Request) -> Then;
}

/// Whether to go on after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// There may be others.
    Serve,
    /// That was the last.
    Quit,
}

/// The line to the daemon that has come last, if one has.
pub struct Line {
    listener: Listener,
    /// The first byte of a connection.
    greeting: u8,
    /// What every daemon gets beside it.
    shared: Vec<File>,
    /// Rings when there is something to do without a daemon.
    bell: EventFd,
    daemon: Option<Daemon>,
}

/// What there is to do.
struct Ready {
    came: bool,
    rang: bool,
    readable: bool,
}

impl Line {
    /// With nobody on it. A daemon that comes is greeted with the byte `greeting`, and
    /// with `shared` beside it. Whoever has something to do without a daemon rings `bell`,
    /// which does not block.
    #[must_use]
    pub fn new(listener: Listener, greeting: u8, shared: Vec<File>, bell: EventFd) -> Self {
        Self { listener, greeting, shared, bell, daemon: None }
    }

    /// Waits for a new daemon, for the bell, or for the daemon.
    fn wait(&self) -> io::Result<Ready> {
        let mut wait = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(fds::of_event(&self.bell), PollFlags::POLLIN),
        ];
        wait.extend(self.daemon.as_ref().map(Daemon::poll));
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let any = |i: usize| {
            let events = wait.get(i).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
        };
        Ok(Ready { came: any(0), rang: any(1), readable: any(2) })
    }

    /// A daemon connects: the one before it, if any, is no longer heard.
    fn accept(&mut self) {
        // The listener does not block; whoever came may be gone again.
        let Ok(socket) = self.listener.accept() else { return };
        let shared: Vec<BorrowedFd<'_>> = self.shared.iter().map(AsFd::as_fd).collect();
        if fds::send(&socket, &[self.greeting], &shared).is_ok() {
            self.daemon = Some(Daemon::new(socket));
        }
    }

    /// The next request that came whole. What makes no sense ends the connection.
    fn request<R: Message + Default>(&mut self) -> Option<R> {
        match self.daemon.as_mut()?.request() {
            Ok(request) => request,
            Err(e) => {
                eprintln!("dropping the daemon's connection: {e}");
                self.daemon = None;
                None
            }
        }
    }

    /// The next `count` descriptors that came, or as many as did. They are to be
    /// taken whether the request can be served or not, as the next request has its
    /// own.
    pub fn take_fds(&mut self, count: usize) -> Vec<OwnedFd> {
        self.daemon.as_mut().map_or_else(Vec::new, |daemon| daemon.take_fds(count))
    }

    /// Puts a message in line; a daemon that has stopped reading is forgotten.
    pub fn queue(&mut self, message: &impl Message) {
        if self.daemon.as_mut().is_some_and(|daemon| !daemon.queue(message)) {
            self.daemon = None;
        }
    }

    /// Sends what the socket takes now; a daemon that is gone is forgotten.
    pub fn send(&mut self) {
        if self.daemon.as_mut().is_some_and(|daemon| !daemon.send()) {
            self.daemon = None;
        }
    }
}

/// Serves until a daemon says that it is enough.
///
/// # Errors
/// When the system fails in a way that leaves nothing to serve.
pub fn serve(mut served: impl Served) -> io::Result<()> {
    loop {
        let Ready { came, rang, readable } = served.line().wait()?;
        if rang {
            // What it counts does not matter.
            let _ = served.line().bell.read();
            served.rang();
        }
        if came {
            served.line().accept();
        }
        if readable && receive(&mut served) == Then::Quit {
            return Ok(());
        }
        served.line().send();
    }
}

/// Reads what came and serves every whole request of it.
fn receive(served: &mut impl Served) -> Then {
    loop {
        let Some(daemon) = &mut served.line().daemon else { return Then::Serve };
        let more = daemon.read();
        while let Some(request) = served.line().request() {
            if served.answer(request) == Then::Quit {
                return Then::Quit;
            }
        }
        match more {
            Came::Some => {}
            Came::NothingYet => return Then::Serve,
            Came::End => served.line().daemon = None,
        }
    }
}
