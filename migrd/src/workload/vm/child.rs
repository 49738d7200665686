//! The VMM child of one VM, as the daemon sees it.
//!
//! The child outlives this handle and the daemon: dropping the handle only
//! closes a connection. A later daemon finds the child by its socket.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use migr_proto::v1::{self as proto, child_reply, child_request};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use prost::Message;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::link::Link;
use crate::pages::PageSet;
use crate::sys::mapping::GuestMapping;
use crate::sys::process::{PidFd, isolate};
use crate::sys::{fds, memfd};
use crate::units::WorkloadId;
use crate::vmm::control::{FAILED, READY};
use crate::vmm::entry::number;
use crate::vmm::{memory, pages};

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

/// What a child does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// Not ready yet.
    Starting,
    /// Ready; nothing is loaded.
    Ready,
    /// The guest runs.
    Running,
    /// The guest stands still.
    Paused,
    /// The guest has ended; the child is there and can be read.
    Stopped(StopReason),
    /// The child itself is gone, with the reason.
    Dead(String),
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReason {
    /// What ended it.
    pub kind: proto::GuestStopKind,
    /// What else there is to say.
    pub details: String,
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use proto::GuestStopKind::{
            EmulationFailure, InternalError, Reset, Shutdown, TripleFault, Unspecified,
        };
        f.write_str(match self.kind {
            Unspecified => "the guest ended",
            Shutdown => "the guest shut down",
            Reset => "the guest asked for a reset",
            TripleFault => "the guest crashed with a triple fault",
            EmulationFailure => "KVM could not emulate an instruction of the guest",
            InternalError => "KVM failed to run the guest",
        })?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl ChildState {
    /// From what the child says.
    #[must_use]
    pub fn from_wire(status: proto::ChildStatus) -> Self {
        match status.phase() {
            proto::ChildPhase::Unspecified => Self::Starting,
            proto::ChildPhase::Ready => Self::Ready,
            proto::ChildPhase::Running => Self::Running,
            proto::ChildPhase::Paused => Self::Paused,
            proto::ChildPhase::Stopped => {
                let stop = status.stop.unwrap_or_default();
                Self::Stopped(StopReason { kind: stop.kind(), details: stop.details })
            }
        }
    }
}

/// What a child is made of.
#[derive(Debug)]
pub struct ChildSpec {
    /// The workload it is.
    pub id: WorkloadId,
    /// Where its socket and logs are; must exist.
    pub directory: PathBuf,
    /// The VM.
    pub config: proto::VmConfig,
    /// The kernel, when it is to be booted.
    pub kernel: Option<File>,
    /// The initrd that goes with the kernel.
    pub initrd: Option<File>,
    /// The binary that has the `vmm-child` command: the daemon's own, which
    /// [`own_program`] names.
    pub program: PathBuf,
}

/// The running binary, even if its file was replaced since.
#[must_use]
pub fn own_program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

/// The serial log of a VM: its file, and when to look again.
#[derive(Clone, Debug)]
pub struct SerialOutput {
    /// Where it is.
    pub path: PathBuf,
    /// Changes after each write to it.
    pub written: watch::Receiver<u64>,
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
        let process = start(spec)?;
        let pid = process.id();
        let process = PidFd::open(pid).map_err(system("watch the VM's process"))?;
        let attached = async {
            let socket = UnixStream::connect(directory.join(SOCKET)).await;
            let socket = socket.map_err(system("connect to the VM's process"))?;
            Self::attach(socket, &directory, pid).await
        };
        match attached.await {
            Ok(parts) => Ok(Self::watch(parts, process, pid)),
            Err(e) => {
                // What could not even start is not worth keeping.
                let _ = process.kill();
                ended(&process).await;
                Err(e)
            }
        }
    }

    /// Takes back the child that lives in `directory`; `None` when there is none.
    ///
    /// # Errors
    /// When there is one that does not answer as it should.
    pub async fn adopt(directory: &Path) -> Result<Option<Self>, ChildError> {
        let socket = match UnixStream::connect(directory.join(SOCKET)).await {
            Ok(socket) => socket,
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {
                return Ok(None);
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

    async fn attach(socket: UnixStream, directory: &Path, pid: u32) -> Result<Parts, ChildError> {
        let died = || ChildError::Dead(format!("process {pid} ended{}", last_words(directory)));
        let broken = |_: io::Error| died();
        let (first, shared) = greeting(&socket).await.map_err(broken)?;
        let (mut read, write) = socket.into_split();
        match first {
            Some(READY) => {}
            Some(FAILED) => return Err(ChildError::Dead(reason(&mut read).await)),
            Some(_) | None => return Err(died()),
        }
        let [memory, log, bell] = <[OwnedFd; 3]>::try_from(shared)
            .map_err(|_| ChildError::Protocol("its greeting lacks descriptors".into()))?;
        let (states, watched) = watch::channel(ChildState::Starting);
        let link = Link::new(write, states);
        let listener = Arc::clone(&link);
        let reader = tokio::spawn(async move { listener.listen(read).await });
        let hello = link.ask(child_request::Request::Hello(proto::ChildHello {})).await?;
        let child_reply::Reply::Hello(proto::ChildHelloReply { config, status }) = hello else {
            return Err(ChildError::Protocol("no answer to hello".into()));
        };
        link.become_state(ChildState::from_wire(status.unwrap_or_default()));
        let config = config.unwrap_or_default();
        let extents = memory::extents(config.memory_bytes)?;
        let mapping = GuestMapping::new(memory.into(), extents);
        let mapping = Arc::new(mapping.map_err(system("map the guest's memory"))?);
        drop(log);
        let written = watch_bell(bell).map_err(system("watch the serial log"))?;
        let log = SerialOutput { path: directory.join(SERIAL_LOG), written };
        let directory = directory.to_owned();
        Ok(Parts { link, config, mapping, log, states: watched, reader, directory })
    }

    /// From now on knows when the child ends.
    fn watch(parts: Parts, process: PidFd, pid: u32) -> Self {
        let Parts { link, config, mapping, log, states, reader, directory } = parts;
        let process = Arc::new(process);
        let (watched, told) = (Arc::clone(&process), Arc::clone(&link));
        let (end, over) = watch::channel(false);
        tokio::spawn(async move {
            let status = ended(&watched).await;
            let how = status.map_or_else(String::new, |s| format!(" ({s})"));
            told.close(&format!("process {pid} ended{how}{}", last_words(&directory)));
            end.send_replace(true);
        });
        let (told, mut left) = (Arc::clone(&link), over.clone());
        tokio::spawn(async move {
            let _ = reader.await;
            // Usually it has ended, and then that is the better reason.
            let wait = std::time::Duration::from_secs(1);
            if tokio::time::timeout(wait, left.wait_for(|over| *over)).await.is_err() {
                told.close("another daemon has taken over its control connection");
            }
        });
        Self { link, config, mapping, log, pid, process, states, over }
    }

    async fn done(&self, request: child_request::Request) -> Result<(), ChildError> {
        match self.link.ask(request).await? {
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

    /// Starts tracking which pages are written. At first all of them are dirty.
    ///
    /// # Errors
    /// When KVM refuses.
    pub async fn dirty_start(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::DirtyStart(proto::ChildDirtyStart {})).await
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

struct Parts {
    link: Arc<Link>,
    config: proto::VmConfig,
    mapping: Arc<GuestMapping>,
    log: SerialOutput,
    states: watch::Receiver<ChildState>,
    reader: tokio::task::JoinHandle<io::Result<()>>,
    directory: PathBuf,
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// When there is none or it may not be used, with what to do about it.
pub fn open_kvm() -> Result<File, ChildError> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map_err(|source| {
        let remedy = match source.kind() {
            ErrorKind::NotFound => {
                "load kvm_intel or kvm_amd, and switch virtualization on in the firmware"
            }
            ErrorKind::PermissionDenied => "run migrd as root or as a member of the group kvm",
            _ => "load kvm_intel or kvm_amd again",
        };
        ChildError::NoKvm { remedy, source }
    })
}

/// Starts the process, with its descriptors in place.
fn start(spec: ChildSpec) -> Result<std::process::Child, ChildError> {
    let ChildSpec { id, directory, config, kernel, initrd, program } = spec;
    let kvm = open_kvm()?;
    let bytes = config.memory_bytes;
    memory::extents(bytes)?;
    let name = std::ffi::CString::new(format!("migr-{id}")).unwrap_or_default();
    let ram = memfd::create(&name, bytes).map_err(system(format!("reserve {bytes} bytes")))?;
    let listener = control_socket(&directory.join(SOCKET)).map_err(system("make its socket"))?;
    let open = |name: &str, append: bool| {
        let mut how = OpenOptions::new();
        how.create(true).read(true).write(true).append(append);
        how.open(directory.join(name)).map_err(system(format!("open {name} in the VM's directory")))
    };
    let (log, messages) = (open(SERIAL_LOG, false)?, open(VMM_LOG, true)?);
    let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let bell = bell.map_err(|e| system("create an eventfd")(e.into()))?;
    let mut inherited: Vec<(OwnedFd, _)> = vec![
        (listener, number::LISTENER),
        (ram.into(), number::MEMORY),
        (kvm.into(), number::KVM),
        (log.into(), number::LOG),
        (bell.into(), number::BELL),
        (config_file(&config).map_err(system("hand over the configuration"))?, number::CONFIG),
    ];
    inherited.extend(kernel.map(|file| (file.into(), number::KERNEL)));
    inherited.extend(initrd.map(|file| (file.into(), number::INITRD)));
    let mut command = Command::new(program);
    command.arg("vmm-child").env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(messages).current_dir("/");
    isolate(&mut command, inherited);
    command.spawn().map_err(system("start the VM's process"))
}

/// A listening socket at `path`, in place of the one of a child that is dead.
fn control_socket(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

fn config_file(config: &proto::VmConfig) -> io::Result<OwnedFd> {
    use std::os::unix::fs::FileExt;
    let bytes = config.encode_to_vec();
    let file = memfd::create(c"migr-config", bytes.len() as u64)?;
    file.write_all_at(&bytes, 0)?;
    Ok(file.into())
}

/// The child's first byte and what came beside it; no byte when it is gone.
async fn greeting(socket: &UnixStream) -> io::Result<(Option<u8>, Vec<OwnedFd>)> {
    loop {
        socket.readable().await?;
        let mut first = [0];
        let read = || fds::receive(socket.as_fd(), &mut first);
        match socket.try_io(Interest::READABLE, read) {
            Ok((length, shared)) => return Ok(((length > 0).then_some(first[0]), shared)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// Why a child could not start, in its own words.
async fn reason(socket: &mut tokio::net::unix::OwnedReadHalf) -> String {
    use proto::child_message::Message::CannotStart;
    let mut bytes = Vec::new();
    let read = socket.take(1 << 20).read_to_end(&mut bytes).await;
    match crate::vmm::frame::decode::<proto::ChildMessage>(&mut bytes) {
        Ok(Some(proto::ChildMessage { message: Some(CannotStart(why)) })) => why,
        _ => format!("it could not start, and did not say why ({read:?})"),
    }
}

/// The last line the child wrote, for an error message.
fn last_words(directory: &Path) -> String {
    let text = std::fs::read(directory.join(VMM_LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().last().map_or_else(String::new, |line| format!("; its last words: {line}"))
}

/// Waits for the end of the process and leaves no zombie of it.
async fn ended(process: &PidFd) -> Option<std::process::ExitStatus> {
    if let Ok(readable) = process.watch().and_then(fds::readable) {
        let _ = readable.readable().await;
    }
    process.reap()
}

/// Counts how often the bell was rung, from now on.
fn watch_bell(bell: OwnedFd) -> io::Result<watch::Receiver<u64>> {
    let rung = fds::readable(bell.try_clone()?)?;
    let mut bell = File::from(bell);
    let (written, watched) = watch::channel(0_u64);
    tokio::spawn(async move {
        while let Ok(mut ready) = tokio::select! {
            ready = rung.readable() => ready,
            () = written.closed() => return,
        } {
            use std::io::Read;
            let mut count = [0; 8];
            let read = bell.read(&mut count);
            ready.clear_ready();
            if read.is_ok() {
                written.send_modify(|n| *n = n.wrapping_add(u64::from_ne_bytes(count)));
            }
        }
    });
    Ok(watched)
}
