//! Between runc and CRIU at a restore: every message of either goes through here.
//!
//! CRIU looks up descriptors in the process that made its socket, which is this one:
//! the directory of images is the keeper's, not one that runc has opened.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, accept4, getsockopt, recv, send, socketpair,
};
use prost::Message;

use super::shim::REQUEST_BYTES;
use crate::keeper::criu::rpc::{Options, Request, RequestType, Response};
use crate::keeper::criu::session::poll_until;
use crate::sys::fds;
use crate::sys::process::PidFd;

/// How long runc may take to say something to CRIU's step: it runs the container's
/// hooks there.
const RUNC_LIMIT: Duration = Duration::from_secs(60);

/// The two ends, and CRIU.
pub(super) struct Relay {
    runc: OwnedFd,
    criu: OwnedFd,
    /// CRIU's process.
    pub(super) pid: u32,
    process: PidFd,
}

/// What CRIU says.
pub(super) enum Said {
    /// It stands still at a step: which, of which process, and in its own words.
    Step(String, u32, Vec<u8>),
    /// It is done, or has failed.
    Done(Response, Vec<u8>),
}

impl Relay {
    /// Waits for what runc takes for CRIU; none comes if runc ends before. `place`
    /// gets its process, to put it where CRIU is to be.
    pub(super) fn accept(
        listener: &OwnedFd,
        runc: &PidFd,
        place: impl FnOnce(u32) -> io::Result<()>,
    ) -> io::Result<Option<Self>> {
        let mut wait = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(runc.as_fd(), PollFlags::POLLIN),
        ];
        if !poll_until(&mut wait, Some(Instant::now() + RUNC_LIMIT))? {
            return Err(io::Error::other(format!("runc did not start CRIU within {RUNC_LIMIT:?}")));
        }
        if !is_ready(&wait[0]) {
            return Ok(None);
        }
        let shim = fds::own(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?);
        let peer = getsockopt(&shim, PeerCredentials)?.pid();
        let pid = u32::try_from(peer).map_err(io::Error::other)?;
        let process = PidFd::open(pid)?;
        let mut byte = [0];
        let (_, mut given) = fds::receive(&shim, &mut byte)?;
        let runc = given.pop().ok_or_else(|| io::Error::other("runc's socket did not come"))?;
        place(pid)?;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (criu, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        fds::send(&shim, &[1], &[theirs.as_fd()])?;
        Ok(Some(Self { runc, criu, pid, process }))
    }

    /// Passes runc's request on, with `options` instead of its own where both say
    /// something.
    pub(super) fn request(&self, options: Options) -> io::Result<()> {
        let mut request = self.hear_runc()?;
        let ours = Request {
            r#type: RequestType::Restore.into(),
            opts: Some(options),
            ..Request::default()
        };
        // A message that follows another is merged into it, and the last value of a
        // field counts (Protocol Buffers, "Encoding"): what runc wants and is not
        // known here stays.
        request.extend(ours.encode_to_vec());
        tell(&self.criu, &request)
    }

    /// CRIU's process, for somebody who may have to end it.
    pub(super) fn handle(&self) -> io::Result<PidFd> {
        self.process.try_clone()
    }

    /// Ends CRIU.
    pub(super) fn kill(&self) {
        if let Err(error) = self.process.kill() {
            eprintln!("CRIU can't be ended: {error}");
        }
    }

    /// What CRIU says next; an error of the kind `TimedOut` when that is nothing before
    /// the `deadline`.
    pub(super) fn hear_criu(&self, deadline: Option<Instant>) -> io::Result<Said> {
        let gone = || io::Error::other("CRIU ended while it restored the processes");
        let mut wait = [
            PollFd::new(self.criu.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.process.as_fd(), PollFlags::POLLIN),
        ];
        if !poll_until(&mut wait, deadline)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let bytes = receive(&self.criu)?.ok_or_else(gone)?;
        let response = Response::decode(bytes.as_slice()).map_err(io::Error::other)?;
        if response.r#type != i32::from(RequestType::Notify) {
            return Ok(Said::Done(response, bytes));
        }
        let notify = response.notify.unwrap_or_default();
        let pid = notify.pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        Ok(Said::Step(notify.script.unwrap_or_default(), pid, bytes))
    }

    /// Tells runc what CRIU said.
    pub(super) fn tell_runc(&self, bytes: &[u8]) -> io::Result<()> {
        tell(&self.runc, bytes)
    }

    /// Whether runc is content with that step.
    pub(super) fn runc_agrees(&self) -> io::Result<bool> {
        let answer = self.hear_runc()?;
        let answer = Request::decode(answer.as_slice()).map_err(io::Error::other)?;
        Ok(answer.notify_success.unwrap_or(false))
    }

    /// Answers CRIU's step.
    pub(super) fn answer(&self, go_on: bool) -> io::Result<()> {
        tell(&self.criu, &Request::answer(go_on).encode_to_vec())
    }

    fn hear_runc(&self) -> io::Result<Vec<u8>> {
        let mut wait = [PollFd::new(self.runc.as_fd(), PollFlags::POLLIN)];
        if !poll_until(&mut wait, Some(Instant::now() + RUNC_LIMIT))? {
            return Err(io::Error::other(format!("runc says nothing for {RUNC_LIMIT:?}")));
        }
        receive(&self.runc)?.ok_or_else(|| io::Error::other("runc has given up"))
    }
}

fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
}

/// A message; none when the other end is closed, or nothing is there.
fn receive(socket: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; REQUEST_BYTES];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let length = loop {
        match recv(socket.as_raw_fd(), &mut bytes, flags) {
            Ok(0) | Err(Errno::ECONNRESET | Errno::EAGAIN) => return Ok(None),
            Ok(length) => break length,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if length > bytes.len() {
        return Err(io::Error::other("a message to or from CRIU is too long"));
    }
    bytes.truncate(length);
    Ok(Some(bytes))
}

fn tell(socket: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_a_request_takes_precedence_and_leaves_the_rest() {
        let theirs = Options {
            images_dir_fd: 9,
            root: Some("/run/root".into()),
            tcp_established: Some(false),
            external: vec!["mnt[/a]:/a".into()],
            ..Options::default()
        };
        let ours = Options { images_dir_fd: 5, tcp_established: Some(true), ..Options::default() };
        let of = |opts| {
            let kind = RequestType::Restore.into();
            Request { r#type: kind, opts: Some(opts), ..Request::default() }.encode_to_vec()
        };
        let both = [of(theirs), of(ours)].concat();
        let merged = Request::decode(both.as_slice()).unwrap().opts.unwrap();
        assert_eq!(merged.images_dir_fd, 5);
        assert_eq!(merged.root.as_deref(), Some("/run/root"));
        assert_eq!(merged.tcp_established, Some(true));
        assert_eq!(merged.external, ["mnt[/a]:/a"]);
    }
}
