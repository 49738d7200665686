//! The child's main thread: serves the daemon, and outlives it.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use migr_proto::v1::{self as proto, child_message, child_reply, child_request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::entry::Fds;
use super::frame;
use super::lifecycle::{Phase, StopKind};
use super::machine::{Machine, MachineError};
use super::pages::{from_wire, to_wire};
use crate::sys::fds;

/// The first byte of a connection to a child that is ready.
pub const READY: u8 = b'M';
/// The first byte of a connection to a child that could not start.
pub const FAILED: u8 = b'E';

/// What a daemon may leave unread before it counts as gone (bytes).
const UNREAD_BYTES: usize = 2 * frame::FRAME_BYTES;

/// Kernel and initrd, until one of them or a snapshot was loaded.
#[derive(Debug, Default)]
pub struct Images {
    /// What to boot.
    pub kernel: Option<File>,
    /// What goes with it.
    pub initrd: Option<File>,
}

/// A daemon that is connected.
struct Daemon {
    socket: UnixStream,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

/// Whether to go on after a request.
#[derive(PartialEq, Eq)]
enum Then {
    Serve,
    Quit,
}

/// The main thread's things.
pub struct Control {
    fds: Fds,
    machine: Machine,
    images: Images,
    ended: EventFd,
    daemon: Option<Daemon>,
    /// The last phase that a daemon was told.
    told: Phase,
}

impl Control {
    /// `ended` rings when the guest ends by itself.
    #[must_use]
    pub fn new(fds: Fds, machine: Machine, images: Images, ended: EventFd) -> Self {
        Self { fds, machine, images, ended, daemon: None, told: Phase::Ready }
    }

    /// Serves until a daemon says that it is enough.
    ///
    /// # Errors
    /// When the system fails in a way that leaves nothing to serve.
    pub fn serve(mut self) -> io::Result<()> {
        loop {
            let (came, rang, readable) = self.wait()?;
            if rang {
                self.guest_ended();
            }
            if came {
                self.accept();
            }
            if readable && self.receive() == Then::Quit {
                return Ok(());
            }
            self.send();
        }
    }

    /// Waits for a new daemon, for the end of the guest, or for the daemon.
    fn wait(&self) -> io::Result<(bool, bool, bool)> {
        let mut wait = vec![
            PollFd::new(self.fds.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(fds::of_event(&self.ended), PollFlags::POLLIN),
        ];
        if let Some(daemon) = &self.daemon {
            let more =
                if daemon.unsent.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            wait.push(PollFd::new(daemon.socket.as_fd(), PollFlags::POLLIN | more));
        }
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let any = |i: usize| {
            let events = wait.get(i).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
        };
        Ok((any(0), any(1), any(2)))
    }

    /// A daemon connects: the one before it, if any, is no longer heard.
    fn accept(&mut self) {
        // The listener does not block; whoever came may be gone again.
        let Ok(socket) = self.fds.accept() else { return };
        let shared: [BorrowedFd<'_>; 3] =
            [self.fds.memory.as_fd(), self.fds.log.as_fd(), self.fds.bell.as_fd()];
        if fds::send(&socket, &[READY], &shared).is_ok() {
            self.daemon = Some(Daemon { socket, received: Vec::new(), unsent: Vec::new() });
        }
    }

    fn guest_ended(&mut self) {
        // It rang, so the counter is not zero; what it counts does not matter.
        let _ = self.ended.read();
        self.machine.flush_console();
        self.tell_phase();
    }

    /// Tells the daemon where the guest stands, if that is news to it.
    fn tell_phase(&mut self) {
        let phase = self.machine.phase();
        if phase != self.told {
            let status = status(&phase);
            self.told = phase;
            self.queue(child_message::Message::StateChanged(status));
        }
    }

    fn queue(&mut self, message: child_message::Message) {
        let message = proto::ChildMessage { message: Some(message) };
        let Some(daemon) = &mut self.daemon else { return };
        let failed = frame::encode(&message, &mut daemon.unsent).is_err();
        if failed || daemon.unsent.len() > UNREAD_BYTES {
            self.daemon = None;
        }
    }

    /// Sends what the socket takes now; a daemon that is gone is forgotten.
    fn send(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        while !daemon.unsent.is_empty() {
            match daemon.socket.write(&daemon.unsent) {
                Ok(sent) => drop(daemon.unsent.drain(..sent)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.daemon = None;
                    return;
                }
            }
        }
        daemon.unsent.shrink_to(1 << 16);
    }

    /// Reads what came and serves every whole request of it.
    fn receive(&mut self) -> Then {
        let mut buffer = [0; 16 * 1024];
        loop {
            let Some(daemon) = &mut self.daemon else { return Then::Serve };
            match daemon.socket.read(&mut buffer) {
                Ok(0) => self.daemon = None,
                Ok(length) => daemon.received.extend_from_slice(&buffer[..length]),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Then::Serve,
                Err(_) => self.daemon = None,
            }
            while let Some(daemon) = &mut self.daemon {
                match frame::decode::<proto::ChildRequest>(&mut daemon.received) {
                    Ok(Some(request)) => {
                        if self.serve_request(request) == Then::Quit {
                            return Then::Quit;
                        }
                    }
                    Ok(None) => break,
                    Err(e) => {
                        eprintln!("dropping the daemon's connection: {e}");
                        self.daemon = None;
                    }
                }
            }
        }
    }

    fn serve_request(&mut self, request: proto::ChildRequest) -> Then {
        let proto::ChildRequest { id, request } = request;
        let quit = matches!(request, Some(child_request::Request::Quit(_)));
        let reply = match request {
            Some(request) => {
                self.answer(request).unwrap_or_else(|e| child_reply::Reply::Error(words(&e)))
            }
            None => child_reply::Reply::Error(
                "an empty request: the daemon is newer than this VMM".into(),
            ),
        };
        self.tell_phase();
        let reply = proto::ChildReply { id, reply: Some(reply) };
        self.queue(child_message::Message::Reply(reply));
        self.send();
        if quit { Then::Quit } else { Then::Serve }
    }

    fn answer(
        &mut self,
        request: child_request::Request,
    ) -> Result<child_reply::Reply, MachineError> {
        use child_reply::Reply;
        use child_request::Request;
        let machine = &mut self.machine;
        match request {
            Request::Hello(proto::ChildHello {}) => {
                let config = Some(machine.config().clone());
                let status = Some(status(&machine.phase()));
                return Ok(Reply::Hello(proto::ChildHelloReply { config, status }));
            }
            Request::Boot(proto::ChildBoot {}) => {
                let Images { kernel, mut initrd } = std::mem::take(&mut self.images);
                let mut kernel = kernel.ok_or(MachineError::NoKernel)?;
                machine.boot(&mut kernel, initrd.as_mut())?;
            }
            Request::Restore(state) => {
                machine.restore(&state)?;
                self.images = Images::default();
            }
            Request::Run(proto::ChildRun {}) => machine.run()?,
            Request::Pause(proto::ChildPause {}) => machine.pause()?,
            Request::Save(proto::ChildSave {}) => return Ok(Reply::Saved(machine.save()?)),
            Request::DirtyStart(proto::ChildDirtyStart {}) => machine.dirty().start()?,
            Request::DirtyRead(proto::ChildDirtyRead {}) => {
                return Ok(Reply::Dirty(to_wire(&machine.dirty().read()?)));
            }
            Request::DirtyClear(pages) => machine.dirty().clear(&from_wire(&pages))?,
            Request::Populate(pages) => machine.populate(&from_wire(&pages)),
            Request::DirtyStop(proto::ChildDirtyStop {}) => machine.dirty().stop()?,
            Request::ConsoleInput(bytes) => machine.input(&bytes)?,
            Request::Stats(proto::ChildStats {}) => return Ok(Reply::Stats(machine.stats())),
            Request::Quit(proto::ChildQuit {}) => {}
            Request::Attach(_)
            | Request::Detach(_)
            | Request::Drain(_)
            | Request::Undrain(_)
            | Request::PowerButton(_)
            | Request::Reboot(_) => return Err(MachineError::NoDevices),
        }
        Ok(Reply::Done(proto::ChildDone {}))
    }
}

/// An error with everything that caused it.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

fn status(phase: &Phase) -> proto::ChildStatus {
    let wire = match phase {
        Phase::Ready => proto::ChildPhase::Ready,
        Phase::Running => proto::ChildPhase::Running,
        Phase::Paused => proto::ChildPhase::Paused,
        Phase::Stopped(_) => proto::ChildPhase::Stopped,
    };
    let stop = match phase {
        Phase::Stopped(stop) => Some(proto::GuestStop {
            kind: match stop.kind {
                StopKind::Shutdown => proto::GuestStopKind::Shutdown,
                StopKind::Reset => proto::GuestStopKind::Reset,
                StopKind::TripleFault => proto::GuestStopKind::TripleFault,
                StopKind::EmulationFailure => proto::GuestStopKind::EmulationFailure,
                StopKind::InternalError => proto::GuestStopKind::InternalError,
            }
            .into(),
            details: stop.details.clone(),
        }),
        Phase::Ready | Phase::Running | Phase::Paused => None,
    };
    proto::ChildStatus { phase: wire.into(), stop }
}
