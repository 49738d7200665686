//! The child's main thread: serves the daemon, and outlives it.

use std::fs::File;
use std::io;
use std::time::Duration;

use migr_proto::v1::{self as proto, child_message, child_reply, child_request};
use vmm_sys_util::eventfd::EventFd;

use super::entry::Fds;
use super::lifecycle::{Phase, StopKind};
use super::machine::{Machine, MachineError};
use super::pages::{from_wire, to_wire};
use crate::child::serving::{self, Line, Served, Then};
use crate::child::words;

/// The first byte of a connection to a child that is ready.
pub const READY: u8 = b'M';
/// The first byte of a connection to a child that could not start.
pub const FAILED: u8 = b'E';

/// Kernel and initrd, until one of them or a snapshot was loaded.
#[derive(Debug, Default)]
pub struct Images {
    /// What to boot.
    pub kernel: Option<File>,
    /// What goes with it.
    pub initrd: Option<File>,
}

/// The main thread's things.
pub struct Control {
    line: Line,
    machine: Machine,
    images: Images,
    /// The last phase that a daemon was told.
    told: Phase,
}

impl Control {
    /// `ended` rings when the guest ends by itself.
    #[must_use]
    pub fn new(fds: Fds, machine: Machine, images: Images, ended: EventFd) -> Self {
        let Fds { listener, memory, log, bell } = fds;
        let line = Line::new(listener, READY, vec![memory, log, bell], ended);
        Self { line, machine, images, told: Phase::Ready }
    }

    /// Serves until a daemon says that it is enough.
    ///
    /// # Errors
    /// When the system fails in a way that leaves nothing to serve.
    pub fn serve(self) -> io::Result<()> {
        serving::serve(self)
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
        self.line.queue(&proto::ChildMessage { message: Some(message) });
    }

    fn take_files(&mut self, count: usize) -> Vec<File> {
        self.line.take_fds(count).into_iter().map(File::from).collect()
    }

    fn carry_out(
        &mut self,
        request: child_request::Request,
    ) -> Result<child_reply::Reply, MachineError> {
        use child_reply::Reply;
        use child_request::Request;
        let files = match &request {
            Request::Attach(proto::ChildAttach { backings }) => self.take_files(backings.len()),
            Request::Reboot(proto::ChildReboot { initrd }) => {
                self.take_files(1 + usize::from(*initrd))
            }
            _ => Vec::new(),
        };
        let machine = &mut self.machine;
        match request {
            Request::Hello(proto::ChildHello {}) => {
                let config = Some(machine.config().clone());
                let status = Some(status(&machine.phase()));
                let attached = machine.attached();
                return Ok(Reply::Hello(proto::ChildHelloReply { config, status, attached }));
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
            Request::DirtyStart(proto::ChildDirtyStart { disks }) => {
                machine.dirty().start(disks)?
            }
            Request::DirtyRead(proto::ChildDirtyRead {}) => {
                return Ok(Reply::Dirty(to_wire(&machine.dirty().read()?)));
            }
            Request::DirtyClear(pages) => machine.dirty().clear(&from_wire(&pages))?,
            Request::Populate(pages) => machine.populate(&from_wire(&pages)),
            Request::DirtyStop(proto::ChildDirtyStop {}) => machine.dirty().stop()?,
            Request::ConsoleInput(bytes) => machine.input(&bytes)?,
            Request::Stats(proto::ChildStats {}) => return Ok(Reply::Stats(machine.stats())),
            Request::Quit(proto::ChildQuit {}) => {}
            Request::PowerButton(proto::ChildPowerButton {}) => machine.press_power_button()?,
            Request::Reboot(proto::ChildReboot { initrd }) => {
                let mut files = files.into_iter();
                let mut kernel = files.next().ok_or(MachineError::NoDescriptor)?;
                let mut next = || files.next().ok_or(MachineError::NoDescriptor);
                let mut initrd = initrd.then(&mut next).transpose()?;
                machine.reboot(&mut kernel, initrd.as_mut())?;
            }
            Request::Attach(proto::ChildAttach { backings }) => machine.attach(&backings, files)?,
            Request::Detach(proto::ChildDetach {}) => machine.detach()?,
            Request::Drain(proto::ChildDrain { limit_ms }) => {
                machine.drain(Duration::from_millis(limit_ms.into()))?;
            }
            Request::Undrain(proto::ChildUndrain {}) => machine.undrain(),
        }
        Ok(Reply::Done(proto::ChildDone {}))
    }
}

impl Served for Control {
    type Request = proto::ChildRequest;

    fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    /// The guest has ended.
    fn rang(&mut self) {
        self.machine.rest();
        self.machine.flush_console();
        self.tell_phase();
    }

    fn answer(&mut self, request: proto::ChildRequest) -> Then {
        let proto::ChildRequest { id, request } = request;
        let quit = matches!(request, Some(child_request::Request::Quit(_)));
        let reply = match request {
            Some(request) => {
                self.carry_out(request).unwrap_or_else(|e| child_reply::Reply::Error(words(&e)))
            }
            None => child_reply::Reply::Error(
                "an empty request: the daemon is newer than this VMM".into(),
            ),
        };
        self.tell_phase();
        let reply = proto::ChildReply { id, reply: Some(reply) };
        self.queue(child_message::Message::Reply(reply));
        self.line.send();
        if quit { Then::Quit } else { Then::Serve }
    }
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
                StopKind::DeviceAbused => proto::GuestStopKind::DeviceAbused,
            }
            .into(),
            details: stop.details.clone(),
        }),
        Phase::Ready | Phase::Running | Phase::Paused => None,
    };
    proto::ChildStatus { phase: wire.into(), stop }
}
