//! The socket that daemons come to.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Backlog, SockFlag, accept4, listen};

use crate::sys::fds;

/// A listening socket that does not block.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Takes over the one that the daemon has made. Listening again names this
    /// process, not the daemon, as the socket's peer to everyone who connects from
    /// now on (unix(7), `SO_PEERCRED`).
    ///
    /// # Errors
    /// When it is no such socket.
    pub fn take_over(socket: OwnedFd) -> io::Result<Self> {
        listen(&socket, Backlog::MAXCONN)?;
        let flags = OFlag::from_bits_truncate(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(socket))
    }

    /// A new connection, if one waits.
    ///
    /// # Errors
    /// When none does.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = accept4(self.0.as_raw_fd(), flags)?;
        Ok(fds::own(fd).into())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
