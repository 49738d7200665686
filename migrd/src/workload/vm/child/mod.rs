//! The VMM child of one VM, as the daemon sees it.
//!
//! The child outlives this handle and the daemon: dropping the handle only
//! closes a connection. A later daemon finds the child by its socket.

mod attach;
mod devices;
mod spawn;
mod state;

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use migr_proto::v1::{self as proto, child_reply, child_request};
use tokio::sync::watch;

use super::link::Link;
use crate::pages::PageSet;
use crate::sys::mapping::GuestMapping;
use crate::sys::process::PidFd;
use crate::vmm::{memory, pages};
use crate::workload::outliving::connect;

pub use attach::SerialOutput;
pub use devices::{Backing, Device};
pub use spawn::{ChildSpec, open_kvm};
pub use state::{ChildState, StopReason};

/// Name of the control socket in the VM's directory.
const SOCKET: &str = "control.sock";
/// Name of the serial log in the VM's directory.
pub const SERIAL_LOG: &str = "serial.log";
/// Name of what the child itself has to say.
const VMM_LOG: &str = "vmm.log";

/// What went wrong with a child.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// No KVM on this host.
    #[error("cannot open /dev/kvm: {remedy}")]
    NoKvm {
        /// What to do about it.
        remedy: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The child could not be made.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Not a size that a guest can have.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// The child could not start, or is not there any more.
    #[error("the VM's process is dead: {0}")]
    Dead(String),
    /// The child did not do it.
    #[error("{0}")]
    Refused(String),
    /// The child speaks another language.
    #[error("the VM's process does not answer as it should: {0}")]
    Protocol(String),
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> ChildError {
    let what = what.into();
    move |source| ChildError::System { what, source }
}

/// A child, connected.
#[derive(Debug)]
pub struct Child {
    link: Arc<Link>,
    config: proto::VmConfig,
    mapping: Arc<GuestMapping>,
    log: SerialOutput,
    pid: u32,
    process: Arc<PidFd>,
    states: watch::Receiver<ChildState>,
    /// What was behind its devices when it greeted.
    held: Vec<Device>,
    /// The process has ended, and was reaped if it was ours to reap.
    over: watch::Receiver<bool>,
}

impl Child {
    /// Starts a child, which is then ready and has nothing loaded.
    ///
    /// # Errors
    /// When the host cannot have this VM. No process is left then.
    pub async fn spawn(spec: ChildSpec) -> Result<Self, ChildError> {
        let directory = spec.directory.clone();
        let process = spawn::start(spec)?;
        let pid = process.id();
        let process = PidFd::open(pid).map_err(system("watch the VM's process"))?;
        let attached = async {
            let socket = connect(&directory.join(SOCKET)).await;
            let socket = socket.map_err(system("connect to the VM's process"))?;
            Self::attach(socket, &directory, pid).await
        };
        match attached.await {
            Ok(parts) => Ok(Self::watch(parts, process, pid)),
            Err(e) => {
                // What could not even start is not worth keeping.
                let _ = process.kill();
                crate::workload::outliving::ended(&process).await;
                Err(e)
            }
        }
    }

    /// Takes back the child that lives in `directory`; `None` when there is none.
    ///
    /// # Errors
    /// When there is one that does not answer as it should.
    pub async fn adopt(directory: &Path) -> Result<Option<Self>, ChildError> {
        let socket = match connect(&directory.join(SOCKET)).await {
            Ok(socket) => socket,
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {
                return Ok(None);
            }
            // Its listener was closed with this connection in line.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                return Err(ChildError::Dead("it is ending".into()));
            }
            Err(e) => return Err(system("connect to the VM's process")(e)),
        };
        let peer = socket.peer_cred().map_err(system("see who owns the VM's socket"))?;
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| ChildError::Protocol("its socket has no owner".into()))?;
        // If it dies from here on it does not answer, so an answer proves that
        // this names the child and no other process.
        let process = PidFd::open(pid).map_err(system("watch the VM's process"))?;
        let parts = Self::attach(socket, directory, pid).await?;
        Ok(Some(Self::watch(parts, process, pid)))
    }

    async fn done(&self, request: child_request::Request) -> Result<(), ChildError> {
        self.done_with(request, Vec::new()).await
    }

    async fn done_with(
        &self,
        request: child_request::Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(), ChildError> {
        match self.link.ask_with(request, fds).await? {
            child_reply::Reply::Done(proto::ChildDone {}) => Ok(()),
            _ => Err(ChildError::Protocol("an answer to something else".into())),
        }
    }

    /// Loads the kernel that the child was started with. The guest does not
    /// run yet.
    ///
    /// # Errors
    /// When there is no kernel, it is not one, or something is loaded already.
    pub async fn boot(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::Boot(proto::ChildBoot {})).await
    }

    /// Loads a `VmState`. The guest does not run yet.
    ///
    /// # Errors
    /// When the state is not one, or not for this VM or host.
    pub async fn restore(&self, state: impl Into<bytes::Bytes>) -> Result<(), ChildError> {
        self.done(child_request::Request::Restore(state.into())).await
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When nothing is loaded, or it has ended.
    pub async fn run(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::Run(proto::ChildRun {})).await
    }

    /// Returns when the guest stands still and its serial output is in the log.
    ///
    /// # Errors
    /// When nothing is loaded, or it has ended.
    pub async fn pause(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::Pause(proto::ChildPause {})).await
    }

    /// The `VmState` of a guest that stands still.
    ///
    /// # Errors
    /// When the guest runs or nothing is loaded.
    pub async fn save(&self) -> Result<bytes::Bytes, ChildError> {
        match self.link.ask(child_request::Request::Save(proto::ChildSave {})).await? {
            child_reply::Reply::Saved(state) => Ok(state),
            _ => Err(ChildError::Protocol("an answer to something else".into())),
        }
    }

    /// Starts tracking which pages are written, of memory and, with `disks`, of
    /// disks too. At first all of them are dirty.
    ///
    /// # Errors
    /// When KVM refuses.
    pub async fn dirty_start(&self, disks: bool) -> Result<(), ChildError> {
        self.done(child_request::Request::DirtyStart(proto::ChildDirtyStart { disks })).await
    }

    /// The pages written since they were last cleared, by the guest or the VMM.
    ///
    /// # Errors
    /// When tracking is off.
    pub async fn dirty_read(&self) -> Result<PageSet, ChildError> {
        match self.link.ask(child_request::Request::DirtyRead(proto::ChildDirtyRead {})).await? {
            child_reply::Reply::Dirty(set) => Ok(pages::from_wire(&set)),
            _ => Err(ChildError::Protocol("an answer to something else".into())),
        }
    }

    /// Takes `set` as clean.
    ///
    /// # Errors
    /// When tracking is off.
    pub async fn dirty_clear(&self, set: &PageSet) -> Result<(), ChildError> {
        self.done(child_request::Request::DirtyClear(pages::to_wire(set))).await
    }

    /// Has the VMM map `set`, pages that hold memory, so that the guest's first
    /// touch of each costs less.
    ///
    /// # Errors
    /// When it is dead.
    pub async fn populate(&self, set: &PageSet) -> Result<(), ChildError> {
        self.done(child_request::Request::Populate(pages::to_wire(set))).await
    }

    /// Ends the tracking.
    ///
    /// # Errors
    /// When KVM refuses.
    pub async fn dirty_stop(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::DirtyStop(proto::ChildDirtyStop {})).await
    }

    /// Types on the guest's console, all of it or nothing.
    ///
    /// # Errors
    /// When the guest has not read what came before.
    pub async fn console_input(&self, input: impl Into<bytes::Bytes>) -> Result<(), ChildError> {
        self.done(child_request::Request::ConsoleInput(input.into())).await
    }

    /// The child's counters.
    ///
    /// # Errors
    /// When it is dead.
    pub async fn stats(&self) -> Result<proto::ChildStatsReply, ChildError> {
        match self.link.ask(child_request::Request::Stats(proto::ChildStats {})).await? {
            child_reply::Reply::Stats(stats) => Ok(stats),
            _ => Err(ChildError::Protocol("an answer to something else".into())),
        }
    }

    /// Ends the child in good order.
    ///
    /// # Errors
    /// When it was dead before.
    pub async fn quit(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::Quit(proto::ChildQuit {})).await?;
        self.gone().await;
        Ok(())
    }

    /// Kills the child and waits for its end. Harmless when it is dead.
    pub async fn kill(&self) {
        if let Err(error) = self.process.kill() {
            tracing::warn!(pid = self.pid, %error, "cannot kill a VM's process");
            return;
        }
        self.gone().await;
    }

    /// Resolves when the process has ended and its state says so.
    async fn gone(&self) {
        // The sender goes away only with the runtime.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    /// The guest's memory.
    #[must_use]
    pub fn mapping(&self) -> Arc<GuestMapping> {
        Arc::clone(&self.mapping)
    }

    /// What the child does, now and later.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<ChildState> {
        self.states.clone()
    }

    /// What the VM was made of.
    #[must_use]
    pub fn config(&self) -> &proto::VmConfig {
        &self.config
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The guest's serial output.
    #[must_use]
    pub fn log(&self) -> SerialOutput {
        self.log.clone()
    }
}
