//! The keeper of one process tree, as the daemon sees it: a process that outlives
//! this handle and the daemon. A later daemon finds it by its socket.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use migr_proto::v1::{self as proto, keeper_message, keeper_reply, keeper_request};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::remains::clear_cgroup;
use crate::child::frame::{self, FrameError};
use crate::keeper::entry::number;
use crate::sys::process::{PidFd, isolate};
use crate::workload::link::{self, Dialect, Heard, LinkError};
use crate::workload::outliving::{
    config_file, connect, control_socket, ended, greeting, last_words, own_program, watch_bell,
};

/// Name of the control socket in a tree's directory.
const SOCKET: &str = "control.sock";
/// Name of the log of what it prints.
pub const OUTPUT_LOG: &str = "output.log";
/// Name of what the keeper itself has to say.
const KEEPER_LOG: &str = "keeper.log";
/// Name of the directory that the keeper mounts on.
const ROOT: &str = "root";

/// What a keeper says of its tree.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// It is there.
    Alive {
        /// Where the tree stands.
        status: proto::KeeperStatus,
        /// The end of its last dump, since this daemon asked for one.
        dumped: Option<proto::KeeperDumped>,
    },
    /// It is gone, and why.
    Dead(String),
}

/// The dialect of keepers.
#[derive(Debug)]
pub struct Keeping;

impl Dialect for Keeping {
    type Request = keeper_request::Request;
    type Reply = keeper_reply::Reply;
    type Message = proto::KeeperMessage;
    type State = Seen;

    fn frame(id: u64, request: Self::Request, out: &mut Vec<u8>) -> Result<(), FrameError> {
        frame::encode(&proto::KeeperRequest { id, request: Some(request) }, out)
    }

    fn hear(message: Self::Message, state: &Self::State) -> Option<Heard<Self>> {
        let (old_status, old_dumped) = match state {
            Seen::Alive { status, dumped } => (*status, dumped.clone()),
            Seen::Dead(_) => return None,
        };
        match message.message? {
            keeper_message::Message::Reply(proto::KeeperReply { id, reply }) => Some(Heard::Reply(
                id,
                match reply? {
                    keeper_reply::Reply::Error(message) => Err(message),
                    reply => Ok(reply),
                },
            )),
            keeper_message::Message::StateChanged(status) => {
                Some(Heard::State(Seen::Alive { status, dumped: old_dumped }))
            }
            keeper_message::Message::Dumped(dumped) => {
                Some(Heard::State(Seen::Alive { status: old_status, dumped: Some(dumped) }))
            }
            keeper_message::Message::CannotStart(why) => Some(Heard::State(Seen::Dead(why))),
        }
    }

    fn dead(why: String) -> Self::State {
        Seen::Dead(why)
    }

    fn why_dead(state: &Self::State) -> Option<&str> {
        match state {
            Seen::Dead(why) => Some(why),
            Seen::Alive { .. } => None,
        }
    }
}

/// A keeper could not be made or asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The system.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The keeper did not do it.
    #[error(transparent)]
    Link(#[from] LinkError),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> KeeperError {
    move |source| KeeperError::System { what, source }
}

/// What a keeper is made of.
#[derive(Debug)]
pub struct KeeperSpec {
    /// Where its socket and logs are; must exist.
    pub directory: PathBuf,
    /// Its tree.
    pub config: proto::ProcessConfig,
    /// The CRIU to use.
    pub criu: PathBuf,
    /// The cgroup of the tree.
    pub cgroup: PathBuf,
    /// The network namespace of the tree, if it has one of its own.
    pub network: Option<OwnedFd>,
}

/// A keeper, connected.
#[derive(Debug)]
pub struct Keeper {
    link: Arc<link::Link<Keeping>>,
    config: proto::ProcessConfig,
    states: watch::Receiver<Seen>,
    written: watch::Receiver<u64>,
    process: Arc<PidFd>,
    over: watch::Receiver<bool>,
}

impl Keeper {
    /// Starts one, which has no processes yet.
    ///
    /// # Errors
    /// When the host can't have it. No process is left then.
    pub async fn spawn(spec: KeeperSpec) -> Result<Self, KeeperError> {
        let (directory, cgroup) = (spec.directory.clone(), spec.cgroup.clone());
        let pid = start(spec)?;
        let process = PidFd::open(pid).map_err(system("watch the keeper"))?;
        let attached = async {
            let socket = connect(&directory.join(SOCKET)).await;
            Self::attach(socket.map_err(system("connect to the keeper"))?).await
        };
        match attached.await {
            Ok(parts) => Ok(Self::watch(parts, process, pid, &directory, cgroup)),
            Err(error) => {
                // What could not even start is not worth keeping.
                let _ = process.kill();
                ended(&process).await;
                Err(error)
            }
        }
    }

    /// Takes back the one that lives in `directory` and keeps the tree in `cgroup`;
    /// `None` when there is none.
    ///
    /// # Errors
    /// When there is one that does not answer as it should.
    pub async fn adopt(directory: &Path, cgroup: PathBuf) -> Result<Option<Self>, KeeperError> {
        let socket = match connect(&directory.join(SOCKET)).await {
            Ok(socket) => socket,
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {
                return Ok(None);
            }
            // Its listener was closed with this connection in line.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                return Err(LinkError::Dead("it is ending".into()).into());
            }
            Err(e) => return Err(system("connect to the keeper")(e)),
        };
        let peer = socket.peer_cred().map_err(system("see who owns the keeper's socket"))?;
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
        let nobody = || LinkError::Protocol("its socket has no owner".into());
        let pid = pid.ok_or_else(nobody)?;
        // If it dies from here on it does not answer, so an answer proves that this
        // names the keeper and no other process.
        let process = PidFd::open(pid).map_err(system("watch the keeper"))?;
        let parts = Self::attach(socket).await?;
        Ok(Some(Self::watch(parts, process, pid, directory, cgroup)))
    }

    async fn attach(socket: UnixStream) -> Result<Parts, KeeperError> {
        let (greeting, shared) = greeting(&socket).await.map_err(system("hear the keeper"))?;
        let (read, write) = socket.into_split();
        if greeting != Some(crate::keeper::control::READY) {
            return Err(LinkError::Dead("it ended before it could answer".into()).into());
        }
        let [_, bell]: [OwnedFd; 2] = shared
            .try_into()
            .map_err(|_| LinkError::Protocol("its greeting lacks descriptors".into()))?;
        let unknown = Seen::Alive { status: proto::KeeperStatus::default(), dumped: None };
        let (sender, states) = watch::channel(unknown);
        let link = link::Link::new(write, sender);
        let listener = Arc::clone(&link);
        let reader = tokio::spawn(async move { listener.listen(read).await });
        let hello = link.ask(keeper_request::Request::Hello(proto::KeeperHello {})).await?;
        let keeper_reply::Reply::Hello(proto::KeeperHelloReply { config, status }) = hello else {
            return Err(LinkError::Protocol("no answer to hello".into()).into());
        };
        link.become_state(Seen::Alive { status: status.unwrap_or_default(), dumped: None });
        let written = watch_bell(bell).map_err(system("watch the output"))?;
        Ok(Parts { link, config: config.unwrap_or_default(), states, written, reader })
    }

    /// From now on knows when the keeper ends. What it kept ends with it: nobody could
    /// hold it any more, or tell how it stands.
    fn watch(parts: Parts, process: PidFd, pid: u32, directory: &Path, cgroup: PathBuf) -> Self {
        let Parts { link, config, states, written, reader } = parts;
        let process = Arc::new(process);
        let (watched, told) = (Arc::clone(&process), Arc::clone(&link));
        let (end, over) = watch::channel(false);
        let log = directory.join(KEEPER_LOG);
        tokio::spawn(async move {
            ended(&watched).await;
            clear_cgroup(&cgroup).await;
            told.close(&format!("its keeper, process {pid}, has ended{}", last_words(&log)));
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
        Self { link, config, states, written, process, over }
    }

    /// Asks for what has no other answer than that it was done.
    ///
    /// # Errors
    /// When it was not.
    pub async fn done(&self, request: keeper_request::Request) -> Result<(), KeeperError> {
        self.done_with(request, Vec::new()).await
    }

    /// The same, with descriptors.
    ///
    /// # Errors
    /// When it was not done.
    pub async fn done_with(
        &self,
        request: keeper_request::Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(), KeeperError> {
        match self.link.ask_with(request, fds).await? {
            keeper_reply::Reply::Done(proto::KeeperDone {}) => Ok(()),
            _ => Err(LinkError::Protocol("an answer to something else".into()).into()),
        }
    }

    /// Has the memory of the tree written into `images`, but for what has not changed
    /// since those of `parent` were; empty: there are none. Returns when that is done.
    /// The tree stands still for a moment only.
    ///
    /// # Errors
    /// When it is not written. The tree runs.
    pub async fn ahead(
        &self,
        images: OwnedFd,
        options: proto::ProcessOptions,
        parent: String,
    ) -> Result<(), KeeperError> {
        let ahead = proto::KeeperAhead { options: Some(options), parent };
        self.done_with(keeper_request::Request::Ahead(ahead), vec![images]).await
    }

    /// Has a CRIU get ready to write it into `images`, which build on those of `parent`,
    /// as for [`Keeper::ahead`], and with `track` others can build on; its memory to the
    /// page server at the other end of that socket, if there is one. [`Keeper::stop`] and
    /// [`Keeper::write`] go on with that.
    ///
    /// # Errors
    /// When CRIU does not get ready. The tree runs in every case.
    pub async fn dump(
        &self,
        images: OwnedFd,
        options: proto::ProcessOptions,
        parent: String,
        page_server: Option<OwnedFd>,
        track: bool,
    ) -> Result<(), KeeperError> {
        self.link.states().send_modify(|seen| {
            if let Seen::Alive { dumped, .. } = seen {
                *dumped = None;
            }
        });
        let dump = proto::KeeperDump {
            options: Some(options),
            leave_running: false,
            parent,
            track,
            page_server: page_server.is_some(),
        };
        let fds = [Some(images), page_server].into_iter().flatten().collect();
        self.done_with(keeper_request::Request::Dump(dump), fds).await
    }

    /// Stops the tree. Returns when it stands still.
    ///
    /// # Errors
    /// When it does not stand still; it runs then.
    pub async fn stop(&self) -> Result<(), KeeperError> {
        self.done(keeper_request::Request::Stop(proto::KeeperStop {})).await
    }

    /// Has the tree that was stopped written by the CRIU that is ready to. Returns when that
    /// has begun; [`Keeper::dumped`] says more.
    ///
    /// # Errors
    /// When it does not begin; the tree stands still.
    pub async fn write(&self) -> Result<(), KeeperError> {
        self.done(keeper_request::Request::Write(proto::KeeperWrite {})).await
    }

    /// The end of the dump that was begun last, if it has ended.
    ///
    /// # Errors
    /// Why it has failed, or that the keeper is gone.
    pub fn dumped(&self) -> Result<Option<proto::KeeperDumped>, LinkError> {
        match &*self.states.borrow() {
            Seen::Alive { dumped: Some(dumped), .. } if !dumped.error.is_empty() => {
                Err(LinkError::Refused(dumped.error.clone()))
            }
            Seen::Alive { dumped, .. } => Ok(dumped.clone()),
            Seen::Dead(why) => Err(LinkError::Dead(why.clone())),
        }
    }

    /// Figures of the tree.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn stats(&self) -> Result<proto::KeeperStatsReply, KeeperError> {
        match self.link.ask(keeper_request::Request::Stats(proto::KeeperStats {})).await? {
            keeper_reply::Reply::Stats(stats) => Ok(stats),
            _ => Err(LinkError::Protocol("an answer to something else".into()).into()),
        }
    }

    /// The next piece of memory that the tree lacks; with `urgent` only one that it waits
    /// for. Returns when there is one; `None` when it lacks nothing.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn lacking(&self, urgent: bool) -> Result<Option<proto::ProcessStay>, KeeperError> {
        let lacking = keeper_request::Request::Lacking(proto::KeeperLacking { urgent });
        match self.link.ask(lacking).await? {
            keeper_reply::Reply::Lacking(proto::KeeperLackingReply { piece }) => Ok(piece),
            _ => Err(LinkError::Protocol("an answer to something else".into()).into()),
        }
    }

    /// Whether the tree lacks memory that its source has.
    #[must_use]
    pub fn lacks(&self) -> bool {
        match &*self.states.borrow() {
            Seen::Alive { status, .. } => status.lacks,
            Seen::Dead(_) => false,
        }
    }

    /// Ends it and its tree in good order, or kills it. The caller kills what may be
    /// left in the cgroup.
    pub async fn quit(&self) {
        let quit = keeper_request::Request::Quit(proto::KeeperQuit {});
        if let Err(error) = self.done(quit).await {
            tracing::info!(%error, "a keeper did not end in good order");
            if let Err(error) = self.process.kill() {
                tracing::warn!(%error, "cannot kill a keeper");
                return;
            }
        }
        // The sender goes away only with the runtime.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    /// What it says of its tree, now and later.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<Seen> {
        self.states.clone()
    }

    /// Where its tree stands.
    #[must_use]
    pub fn phase(&self) -> proto::KeeperPhase {
        match &*self.states.borrow() {
            Seen::Alive { status, .. } => status.phase(),
            Seen::Dead(_) => proto::KeeperPhase::Ended,
        }
    }

    /// The tree's init, seen from this host; 0 when there is none.
    #[must_use]
    pub fn init(&self) -> u32 {
        match &*self.states.borrow() {
            Seen::Alive { status, .. } => status.pid,
            Seen::Dead(_) => 0,
        }
    }

    /// The network namespace that the tree has for its own.
    ///
    /// # Errors
    /// When it has none, or the keeper is gone.
    pub fn network(&self) -> io::Result<OwnedFd> {
        self.process.descriptor(number::NETWORK)
    }

    /// What the tree is made of.
    #[must_use]
    pub fn config(&self) -> &proto::ProcessConfig {
        &self.config
    }

    /// Changes with every write to the log.
    #[must_use]
    pub fn written(&self) -> watch::Receiver<u64> {
        self.written.clone()
    }
}

/// What a connection to a keeper gives.
struct Parts {
    link: Arc<link::Link<Keeping>>,
    config: proto::ProcessConfig,
    states: watch::Receiver<Seen>,
    written: watch::Receiver<u64>,
    reader: tokio::task::JoinHandle<io::Result<()>>,
}

/// Starts the process, with its descriptors in place.
fn start(spec: KeeperSpec) -> Result<u32, KeeperError> {
    let KeeperSpec { directory, config, criu, cgroup, network } = spec;
    let root = directory.join(ROOT);
    match std::fs::create_dir(&root) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            return Err(system("make the keeper's directory")(e));
        }
        _ => {}
    }
    let listener = control_socket(&directory.join(SOCKET)).map_err(system("make its socket"))?;
    let open = |name: &str, append: bool| {
        let mut how = OpenOptions::new();
        how.create(true).read(true).write(true).append(append).mode(0o600);
        how.open(directory.join(name)).map_err(system("open a log"))
    };
    let (log, messages) = (open(OUTPUT_LOG, false)?, open(KEEPER_LOG, true)?);
    let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let bell = bell.map_err(|e| system("create an eventfd")(e.into()))?;
    let config = config_file(&config).map_err(system("hand over the configuration"))?;
    let mut inherited: Vec<(OwnedFd, _)> = vec![
        (listener, number::LISTENER),
        (log.into(), number::LOG),
        (bell.into(), number::BELL),
        (config, number::CONFIG),
    ];
    inherited.extend(network.map(|fd| (fd, number::NETWORK)));
    let mut command = Command::new(own_program());
    command.arg("process-keeper").arg("--criu").arg(criu).arg("--cgroup").arg(cgroup);
    command.arg("--root").arg(root);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(messages).current_dir("/");
    isolate(&mut command, inherited);
    Ok(command.spawn().map_err(system("start the keeper"))?.id())
}
