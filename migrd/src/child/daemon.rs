//! The daemon that is connected to a process it has started, as that process sees
//! it: it may be slow, and it may be gone at any time.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags};
use prost::Message;

use super::frame::{self, FrameError};
use crate::sys::fds;

/// What a daemon may leave unread before it counts as gone (bytes).
const UNREAD_BYTES: usize = 2 * frame::FRAME_BYTES;
/// Descriptors that may wait for the request they belong to: one for every
/// device that a VM can have, and some.
const WAITING_FDS: usize = 32;

/// A daemon that is connected.
#[derive(Debug)]
pub struct Daemon {
    socket: UnixStream,
    received: Vec<u8>,
    /// What came beside the bytes, in order, and no request has used yet.
    fds: VecDeque<OwnedFd>,
    unsent: Vec<u8>,
}

/// What a look at the socket has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// Something; there may be more.
    Some,
    /// Nothing now.
    NothingYet,
    /// There will be nothing any more.
    End,
}

impl Daemon {
    /// Over `socket`, which does not block.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, received: Vec::new(), fds: VecDeque::new(), unsent: Vec::new() }
    }

    /// What to wait for.
    #[must_use]
    pub fn poll(&self) -> PollFd<'_> {
        let more = if self.unsent.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        PollFd::new(self.socket.as_fd(), PollFlags::POLLIN | more)
    }

    /// Reads once.
    pub fn read(&mut self) -> Came {
        let mut buffer = [0; 16 * 1024];
        let (length, came) = match fds::receive(&self.socket, &mut buffer) {
            Ok(received) => received,
            Err(e) if e.kind() == ErrorKind::Interrupted => return Came::Some,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Came::NothingYet,
            Err(_) => return Came::End,
        };
        self.fds.extend(came);
        // Nobody who means well sends more descriptors than any request has.
        if length == 0 || self.fds.len() > WAITING_FDS {
            return Came::End;
        }
        self.received.extend_from_slice(buffer.get(..length).unwrap_or_default());
        Came::Some
    }

    /// The next request that came whole.
    ///
    /// # Errors
    /// When what came can't be one.
    pub fn request<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        frame::decode(&mut self.received)
    }

    /// The next `count` descriptors that came, or as many as did.
    pub fn take_fds(&mut self, count: usize) -> Vec<OwnedFd> {
        self.fds.drain(..count.min(self.fds.len())).collect()
    }

    /// Puts a message in line; false when the daemon has stopped reading.
    #[must_use]
    pub fn queue(&mut self, message: &impl Message) -> bool {
        frame::encode(message, &mut self.unsent).is_ok() && self.unsent.len() <= UNREAD_BYTES
    }

    /// Sends what the socket takes now; false when the daemon is gone.
    #[must_use]
    pub fn send(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        self.unsent.shrink_to(1 << 16);
        true
    }
}
