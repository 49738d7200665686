//! A keeper's main thread: serves the daemon, and knows where its tree stands
//! ([`phase`]).
//!
//! ```text
//!            start          dump, stop            [`starting`]
//!   Empty ──────────▶ Running ──────▶ Dumping ──kill──▶ Ended
//!     │ restore         ▲  ▲             │
//!     │ or adopt        │  └────thaw─────┘        [`leaving`]
//!     ▼                 │
//!   Restoring ──▶ Restored ──release              [`arriving`]
//! ```

mod ahead;
mod arriving;
mod following;
mod leaving;
mod phase;
mod starting;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};

use migr_proto::v1::{self as proto, keeper_message, keeper_reply, keeper_request};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::cgroup::Cgroup;
use super::connections;
use super::container::{self, Container};
use super::criu::Failure;
use super::entry::{Fds, KeeperArgs};
use super::hold::{self, News, Work};
use super::stdio::Stdio;
use super::tree;
use crate::child::console::Console;
use crate::child::output::SerialLog;
use crate::child::serving::{self, Line, Served, Then};
use crate::child::words;
use crate::sys::process::PidFd;
use ahead::Ahead;
use following::Lacking;
use phase::{Phase, Stage, Teller, Told};

/// The first byte of a connection to a keeper.
pub const READY: u8 = b'K';

/// The main thread's things.
pub struct Control {
    line: Line,
    /// The network namespace of the tree, if it has one of its own.
    network: Option<OwnedFd>,
    config: proto::ProcessConfig,
    /// What makes its tree a container.
    container: Option<Container>,
    criu: PathBuf,
    root: PathBuf,
    cgroup: Cgroup,
    console: Console,
    stdio: Option<Stdio>,
    /// Input to be typed when the tree runs.
    input: Vec<u8>,
    phase: Phase,
    /// How many dumps were begun.
    dumps: u64,
    ahead: Ahead,
    /// The tree's init.
    init: u32,
    /// The same, whoever has its number later.
    init_process: Option<PidFd>,
    /// What of its memory is still at its source.
    lacking: Lacking,
    /// A tree that is restored is to stand still at its first word.
    paused_at_restore: Arc<AtomicBool>,
    told: Receiver<Told>,
    teller: Teller,
    /// The last status that a daemon was told.
    last: proto::KeeperStatus,
}

impl Control {
    /// With nothing started yet.
    ///
    /// # Errors
    /// When the system has no room.
    pub fn new(fds: Fds, config: proto::ProcessConfig, args: &KeeperArgs) -> io::Result<Self> {
        let KeeperArgs { criu, cgroup, root } = args.clone();
        let Fds { listener, log, bell, network } = fds;
        let container = Container::of(&config, root.parent().unwrap_or(&root))?;
        let console = Console::default();
        let mut output = SerialLog::new(&log, &bell)?;
        let draining = console.clone();
        let drain = move || draining.drain(&mut output);
        std::thread::Builder::new().name("log".into()).spawn(drain)?;
        let (sender, told) = channel();
        let rung = EventFd::new(EFD_NONBLOCK)?;
        let teller = Teller { told: sender, bell: Arc::new(rung.try_clone()?) };
        Ok(Self {
            line: Line::new(listener, READY, vec![log, bell], rung),
            network,
            config,
            container,
            criu,
            root,
            cgroup: Cgroup::at(&cgroup),
            console,
            stdio: None,
            input: Vec::new(),
            phase: Phase::Empty,
            dumps: 0,
            ahead: Ahead::default(),
            init: 0,
            init_process: None,
            lacking: Lacking::default(),
            paused_at_restore: Arc::default(),
            told,
            teller,
            last: proto::KeeperStatus::default(),
        })
    }

    /// Serves until a daemon says that it is enough.
    ///
    /// # Errors
    /// When the system fails in a way that leaves nothing to serve.
    pub fn serve(self) -> io::Result<()> {
        serving::serve(self)
    }

    fn queue(&mut self, message: keeper_message::Message) {
        self.line.queue(&proto::KeeperMessage { message: Some(message) });
    }

    fn reply(&mut self, id: u64, result: Result<(), String>) {
        let reply = match result {
            Ok(()) => keeper_reply::Reply::Done(proto::KeeperDone {}),
            Err(error) => keeper_reply::Reply::Error(error),
        };
        self.reply_with(id, reply);
    }

    /// The status goes before the reply: who has the reply must not see what was.
    fn reply_with(&mut self, id: u64, reply: keeper_reply::Reply) {
        self.tell_status();
        let reply = proto::KeeperReply { id, reply: Some(reply) };
        self.queue(keeper_message::Message::Reply(reply));
        self.line.send();
    }

    fn tell_status(&mut self) {
        let status = self.status();
        if status != self.last {
            self.last = status;
            self.queue(keeper_message::Message::StateChanged(status));
        }
    }

    fn status(&self) -> proto::KeeperStatus {
        let (loss, lacks) = (self.lacking.loss().into(), self.lacking.lacks());
        proto::KeeperStatus { loss, lacks, ..self.phase.status(self.init) }
    }

    fn expect(&self, right: bool, what: &str) -> io::Result<()> {
        if right {
            return Ok(());
        }
        Err(io::Error::other(format!("it can't {what}: {}", self.phase.words())))
    }

    /// From now on hears of the end of an init.
    fn follow(&mut self, init: u32) -> io::Result<()> {
        self.init = init;
        // Nobody has waited for it yet, so the number is still its own.
        self.init_process = Some(PidFd::open(init)?);
        let teller = self.teller.clone();
        let wait = if self.container.is_some() { container::wait } else { tree::wait };
        let wait = move || teller.tell(Told::End(init, wait(init)));
        std::thread::Builder::new().name("init".into()).spawn(wait)?;
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        if matches!(self.phase, Phase::Paused) {
            return Ok(());
        }
        self.expect(matches!(self.phase, Phase::Running), "pause")?;
        self.cgroup.freeze()?;
        self.phase = Phase::Paused;
        if let Some(stdio) = &self.stdio {
            stdio.drain(&self.console);
        }
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        if matches!(self.phase, Phase::Running) {
            return Ok(());
        }
        self.expect(matches!(self.phase, Phase::Paused), "resume")?;
        // While it stood still, or was on its way, the other ends of its connections may
        // have had no answer: they would all wait for a timer, of a second or more.
        if self.network.is_some()
            && let Err(error) = connections::probe(&self.cgroup)
        {
            eprintln!("its connections may be slow to go on: {error}");
        }
        self.cgroup.set_frozen(false)?;
        self.phase = Phase::Running;
        Ok(())
    }

    fn type_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.expect(self.phase.is_free(), "take input")?;
        match &mut self.stdio {
            Some(stdio) => stdio.input(bytes),
            None => Err(io::Error::other("it has no standard input")),
        }
    }

    /// Types what an earlier run has not read. It can't be typed twice, and is not
    /// worth the tree.
    fn type_again(&mut self) {
        let input = std::mem::take(&mut self.input);
        if input.is_empty() {
            return;
        }
        let typed = match &mut self.stdio {
            Some(stdio) => stdio.input(&input),
            None => Err(io::Error::other("it has no standard input")),
        };
        if let Err(error) = typed {
            eprintln!("{} bytes of input that it has not read are lost: {error}", input.len());
        }
    }

    fn terminate(&mut self) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Running), "be asked to end")?;
        let gone = || io::Error::other("it has ended");
        tree::terminate(self.init_process.as_ref().ok_or_else(gone)?, self.init)
    }

    fn stats(&self) -> proto::KeeperStatsReply {
        let processes = self.cgroup.processes().unwrap_or_default();
        let sum = |what: &str| processes.iter().map(|pid| held_bytes(*pid, what)).sum();
        proto::KeeperStatsReply {
            processes: u32::try_from(processes.len()).unwrap_or(u32::MAX),
            resident_bytes: sum("VmRSS:"),
            private_bytes: sum("RssAnon:"),
            output_dropped: self.console.dropped(),
            stdio: self.stdio.as_ref().map(Stdio::names).unwrap_or_default(),
        }
    }

    /// The mounts that CRIU does not look into, by their paths. Those of a container
    /// have other names.
    fn external_mounts(&self) -> io::Result<Vec<String>> {
        match &self.container {
            Some(_) => Ok(Vec::new()),
            None => hold::external_mounts(self.init),
        }
    }

    /// Work that writes the tree as it is now, on top of the images of `parent`.
    fn writing(
        &self,
        images: Option<OwnedFd>,
        options: Option<proto::ProcessOptions>,
        parent: String,
    ) -> io::Result<Work> {
        let work = self.work(images, options, self.external_mounts()?)?;
        let external = match &self.container {
            Some(container) => container.external(self.init)?,
            None => Vec::new(),
        };
        Ok(Work { parent, external, ..work })
    }

    fn work(
        &self,
        images: Option<OwnedFd>,
        options: Option<proto::ProcessOptions>,
        mounts: Vec<String>,
    ) -> io::Result<Work> {
        let images =
            images.ok_or_else(|| io::Error::other("no directory came with the request"))?;
        let network = self.network.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Work {
            criu: self.criu.clone(),
            images,
            logs: hold::logs()?,
            cgroup: self.cgroup.path().to_owned(),
            options: options.unwrap_or_default(),
            network,
            mounts,
            external: Vec::new(),
            network_key: match &self.container {
                Some(_) => container::NETWORK_KEY,
                None => hold::NETWORK_KEY,
            },
            page_server: None,
            parent: String::new(),
            track: false,
        })
    }

    fn hear(&mut self, told: Told) {
        match told {
            Told::End(init, status) => self.init_ended(init, status),
            Told::Work(news) => self.hear_of_work(news),
            Told::Dump(number, news) if number == self.dumps => self.hear_of_work(news),
            // It was called off.
            Told::Dump(..) => {}
            Told::Wanted => self.name_what_is_lacking(),
        }
    }

    fn hear_of_work(&mut self, news: News) {
        match news {
            News::Started(result) => self.started(result),
            News::Ready => self.ready(),
            News::Dumped => self.dumped(),
            News::DumpFailed(failure) => self.dump_failed(&failure),
            News::DumpOver => self.dump_over(),
            News::AheadOver(result) => self.ahead_over(result),
            News::Restored(init) => self.restored(init),
            News::RestoreFailed(failure) => self.restore_failed(&failure),
            News::Filling => self.ahead.fill(),
            News::RestoreOver(result) => self.restore_over(result),
            News::Losing => self.losing(),
            News::Filled(result) => self.filled(result),
        }
    }

    fn init_ended(&mut self, init: u32, status: Option<ExitStatus>) {
        if init != self.init {
            return;
        }
        if let Some(stdio) = &self.stdio {
            stdio.drain(&self.console);
        }
        self.nothing_follows();
        if let Phase::Releasing { ended, .. } = &mut self.phase {
            *ended = Some(status);
            return;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Ended(status));
        // A CRIU that was to write it is told not to when its hold is gone.
        if let Phase::Dumping { word, stage, .. } = phase {
            if let Some((_, waits)) = word {
                self.reply(waits, Ok(()));
            }
            if let Stage::Starting(waits) = stage {
                self.reply(waits, Err("it has ended".into()));
            }
        }
    }
}

impl Served for Control {
    type Request = proto::KeeperRequest;

    fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    fn rang(&mut self) {
        while let Ok(told) = self.told.try_recv() {
            self.hear(told);
        }
        self.tell_status();
    }

    fn answer(&mut self, request: proto::KeeperRequest) -> Then {
        use keeper_request::Request;
        let count = match &request.request {
            Some(Request::Dump(dump)) => 1 + usize::from(dump.page_server),
            Some(Request::Restore(_) | Request::Adopt(_) | Request::Ahead(_)) => 1,
            _ => 0,
        };
        let fds = self.line.take_fds(count);
        match self.ahead.put_off(request, fds) {
            Some((request, fds)) => self.carry_out(request, fds),
            None => Then::Serve,
        }
    }
}

impl Control {
    fn carry_out(&mut self, request: proto::KeeperRequest, fds: Vec<OwnedFd>) -> Then {
        use keeper_request::Request;
        let mut fds = fds.into_iter();
        let directory = fds.next();
        let proto::KeeperRequest { id, request } = request;
        let Some(request) = request else {
            let text = "an empty request: the daemon is newer than this keeper";
            self.reply(id, Err(text.into()));
            return Then::Serve;
        };
        let said = |e: io::Error| words(&e);
        let result = match request {
            Request::Hello(proto::KeeperHello {}) => {
                self.ahead.forget_daemon();
                self.lacking.forget_daemon();
                self.call_off();
                self.forget_start();
                let (config, status) = (Some(self.config.clone()), Some(self.status()));
                let hello = proto::KeeperHelloReply { config, status };
                self.reply_with(id, keeper_reply::Reply::Hello(hello));
                return Then::Serve;
            }
            Request::Stats(proto::KeeperStats {}) => {
                let stats = self.stats();
                self.reply_with(id, keeper_reply::Reply::Stats(stats));
                return Then::Serve;
            }
            Request::Start(proto::KeeperStart {}) => match self.start(id) {
                Some(result) => result.map_err(said),
                None => return Then::Serve,
            },
            Request::Pause(proto::KeeperPause {}) => self.pause().map_err(said),
            Request::Resume(proto::KeeperResume {}) => self.resume().map_err(said),
            Request::Input(bytes) => self.type_in(&bytes).map_err(said),
            Request::Settle(proto::KeeperSettle {}) => Ok(()),
            Request::Terminate(proto::KeeperTerminate {}) => self.terminate().map_err(said),
            Request::Dump(dump) => match self.dump(&dump, directory, fds.next(), id) {
                Ok(()) => return Then::Serve,
                Err(error) => Err(words(&error)),
            },
            Request::Stop(proto::KeeperStop {}) => self.stop().map_err(said),
            Request::Write(proto::KeeperWrite {}) => self.write().map_err(said),
            Request::Lacking(proto::KeeperLacking { urgent }) => {
                self.name_lacking(urgent, id);
                return Then::Serve;
            }
            Request::Arrived(arrived) => self.memory_arrived(&arrived),
            Request::Lost(proto::KeeperLost { why }) => self.memory_lost(&why),
            Request::Ahead(ahead) => match self.write_ahead(ahead, directory, id) {
                Ok(()) => return Then::Serve,
                Err(error) => Err(words(&error)),
            },
            Request::Thaw(proto::KeeperThaw {}) => match self.speak(false, id) {
                Some(result) => result,
                None => return Then::Serve,
            },
            Request::Kill(proto::KeeperKill {}) => match self.kill(id) {
                Some(result) => result,
                None => return Then::Serve,
            },
            Request::Restore(restore) => match self.restore(&restore, directory, id) {
                Ok(()) => return Then::Serve,
                Err(error) => Err(words(&error)),
            },
            Request::Adopt(adopt) => match self.adopt(&adopt, directory, id) {
                Ok(()) => return Then::Serve,
                Err(error) => Err(words(&error)),
            },
            Request::Release(proto::KeeperRelease { paused }) => match self.release(paused, id) {
                Some(result) => result,
                None => return Then::Serve,
            },
            Request::Quit(proto::KeeperQuit {}) => {
                self.end_start();
                let gone = self.cgroup.remove().map_err(said);
                let quit = gone.is_ok();
                self.console.flush();
                self.reply(id, gone);
                return if quit { Then::Quit } else { Then::Serve };
            }
        };
        self.reply(id, result);
        Then::Serve
    }
}

/// Memory of a process, by the name of its line in `/proc/PID/status` (proc(5)).
fn held_bytes(pid: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
