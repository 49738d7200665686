//! A keeper's main thread: serves the daemon, and outlives it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use migr_proto::v1::{self as proto, keeper_message, keeper_reply, keeper_request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::cgroup::Cgroup;
use super::criu::Failure;
use super::entry::{Fds, KeeperArgs};
use super::hold::{self, Hold, News, Place, Work};
use super::stdio::Stdio;
use super::tree;
use crate::sys::fds;
use crate::vmm::console::Console;
use crate::vmm::control::words;
use crate::vmm::daemon::{Came, Daemon};
use crate::vmm::output::SerialLog;

/// The first byte of a connection to a keeper.
pub const READY: u8 = b'K';

/// Where its tree stands.
#[derive(Debug)]
enum Phase {
    Empty,
    Running,
    Paused,
    /// CRIU has it, or is about to.
    Dumping {
        hold: Hold,
        was_paused: bool,
        written: bool,
        /// The word was spoken: whether it is to die, and who waits for that.
        word: Option<(bool, u64)>,
        leave_running: bool,
    },
    /// CRIU makes it; who waits for that.
    Restoring {
        hold: Hold,
        waits: u64,
    },
    /// Complete, and held.
    Restored(Hold),
    /// Let go; who waits for that.
    Releasing {
        waits: u64,
        paused: bool,
        /// Its init has ended already; whether it ran is CRIU's to say.
        ended: Option<Option<ExitStatus>>,
    },
    Ended(Option<ExitStatus>),
}

/// What other threads tell the main one.
#[derive(Debug)]
enum Told {
    Work(News),
    /// The init of that number has ended.
    End(u32, Option<ExitStatus>),
}

/// How other threads tell it.
#[derive(Clone, Debug)]
struct Teller {
    told: Sender<Told>,
    bell: Arc<EventFd>,
}

impl Teller {
    fn tell(&self, told: Told) {
        // The receiver lives as long as the process.
        let _ = self.told.send(told);
        let _ = self.bell.write(1);
    }
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
    config: proto::ProcessConfig,
    criu: PathBuf,
    root: PathBuf,
    cgroup: Cgroup,
    console: Console,
    stdio: Option<Stdio>,
    /// Input to be typed when the tree runs.
    input: Vec<u8>,
    phase: Phase,
    /// The tree's init.
    init: u32,
    /// A tree that is restored is to stand still at its first word.
    paused_at_restore: Arc<AtomicBool>,
    daemon: Option<Daemon>,
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
        let console = Console::default();
        let mut log = SerialLog::new(&fds.log, &fds.bell)?;
        let draining = console.clone();
        std::thread::Builder::new().name("log".into()).spawn(move || draining.drain(&mut log))?;
        let (sender, told) = channel();
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self {
            fds,
            config,
            criu,
            root,
            cgroup: Cgroup::at(&cgroup),
            console,
            stdio: None,
            input: Vec::new(),
            phase: Phase::Empty,
            init: 0,
            paused_at_restore: Arc::default(),
            daemon: None,
            told,
            teller: Teller { told: sender, bell },
            last: proto::KeeperStatus::default(),
        })
    }

    /// Serves until a daemon says that it is enough.
    ///
    /// # Errors
    /// When the system fails in a way that leaves nothing to serve.
    pub fn serve(mut self) -> io::Result<()> {
        loop {
            let (came, rang, readable) = self.wait()?;
            if rang {
                // What it counts does not matter.
                let _ = self.teller.bell.read();
                while let Ok(told) = self.told.try_recv() {
                    self.hear(told);
                }
            }
            if came {
                self.accept();
            }
            if readable && self.receive() == Then::Quit {
                return Ok(());
            }
            self.tell_status();
            self.send();
        }
    }

    fn wait(&self) -> io::Result<(bool, bool, bool)> {
        let mut wait = vec![
            PollFd::new(self.fds.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(fds::of_event(&self.teller.bell), PollFlags::POLLIN),
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
        Ok((any(0), any(1), any(2)))
    }

    fn accept(&mut self) {
        // The listener does not block; whoever came may be gone again.
        let Ok(socket) = self.fds.accept() else { return };
        let shared: [BorrowedFd<'_>; 2] = [self.fds.log.as_fd(), self.fds.bell.as_fd()];
        if fds::send(&socket, &[READY], &shared).is_ok() {
            self.daemon = Some(Daemon::new(socket));
        }
    }

    fn receive(&mut self) -> Then {
        loop {
            let Some(daemon) = &mut self.daemon else { return Then::Serve };
            let more = daemon.read();
            while let Some(daemon) = &mut self.daemon {
                match daemon.request::<proto::KeeperRequest>() {
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
            match more {
                Came::Some => {}
                Came::NothingYet => return Then::Serve,
                Came::End => self.daemon = None,
            }
        }
    }

    fn queue(&mut self, message: keeper_message::Message) {
        let message = proto::KeeperMessage { message: Some(message) };
        if self.daemon.as_mut().is_some_and(|daemon| !daemon.queue(&message)) {
            self.daemon = None;
        }
    }

    fn send(&mut self) {
        if self.daemon.as_mut().is_some_and(|daemon| !daemon.send()) {
            self.daemon = None;
        }
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
        self.send();
    }

    fn tell_status(&mut self) {
        let status = self.status();
        if status != self.last {
            self.last = status;
            self.queue(keeper_message::Message::StateChanged(status));
        }
    }

    fn status(&self) -> proto::KeeperStatus {
        let phase = match &self.phase {
            Phase::Empty | Phase::Restoring { .. } => proto::KeeperPhase::Empty,
            Phase::Running => proto::KeeperPhase::Running,
            Phase::Paused => proto::KeeperPhase::Paused,
            Phase::Dumping { .. } => proto::KeeperPhase::Dumping,
            Phase::Restored(_) | Phase::Releasing { .. } => proto::KeeperPhase::Restored,
            Phase::Ended(_) => proto::KeeperPhase::Ended,
        };
        let ended = match &self.phase {
            Phase::Ended(status) => *status,
            _ => None,
        };
        proto::KeeperStatus {
            phase: phase.into(),
            pid: self.init,
            exit_code: ended.and_then(|status| status.code()),
            signal: ended.and_then(|status| status.signal()).unwrap_or(0),
        }
    }

    fn serve_request(&mut self, request: proto::KeeperRequest) -> Then {
        use keeper_request::Request;
        let proto::KeeperRequest { id, request } = request;
        let Some(request) = request else {
            let text = "an empty request: the daemon is newer than this keeper";
            self.reply(id, Err(text.into()));
            return Then::Serve;
        };
        let directory = match &request {
            Request::Dump(_) | Request::Restore(_) => {
                self.daemon.as_mut().and_then(|daemon| daemon.take_fds(1).pop())
            }
            _ => None,
        };
        let said = |e: io::Error| words(&e);
        let result = match request {
            Request::Hello(proto::KeeperHello {}) => {
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
            Request::Start(proto::KeeperStart {}) => self.start().map_err(said),
            Request::Pause(proto::KeeperPause {}) => self.pause().map_err(said),
            Request::Resume(proto::KeeperResume {}) => self.resume().map_err(said),
            Request::Input(bytes) => self.type_in(&bytes).map_err(said),
            Request::Terminate(proto::KeeperTerminate {}) => self.terminate().map_err(said),
            Request::Dump(dump) => self.dump(&dump, directory).map_err(said),
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
            Request::Release(proto::KeeperRelease { paused }) => match self.release(paused, id) {
                Some(result) => result,
                None => return Then::Serve,
            },
            Request::Quit(proto::KeeperQuit {}) => {
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

    fn expect(&self, right: bool, what: &str) -> io::Result<()> {
        if right {
            return Ok(());
        }
        let phase = self.status().phase();
        Err(io::Error::other(format!("it can't {what} in phase {}", phase.as_str_name())))
    }

    fn start(&mut self) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Empty), "start")?;
        self.cgroup.make()?;
        let mut stdio = Stdio::new(self.console.sink())?;
        let network = self.fds.network.as_ref().map(AsFd::as_fd);
        let init = tree::start(&self.config, &self.cgroup, &stdio, network)?;
        stdio.handed_over();
        self.stdio = Some(stdio);
        self.follow(init)?;
        self.phase = Phase::Running;
        Ok(())
    }

    /// From now on hears of the end of an init.
    fn follow(&mut self, init: u32) -> io::Result<()> {
        self.init = init;
        let teller = self.teller.clone();
        let wait = move || teller.tell(Told::End(init, tree::wait(init)));
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
        self.cgroup.set_frozen(false)?;
        self.phase = Phase::Running;
        Ok(())
    }

    fn type_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        let lives = matches!(self.phase, Phase::Running | Phase::Paused);
        self.expect(lives, "take input")?;
        match &mut self.stdio {
            Some(stdio) => stdio.input(bytes),
            None => Err(io::Error::other("it has no standard input")),
        }
    }

    fn terminate(&mut self) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Running), "be asked to end")?;
        tree::terminate(self.init)
    }

    fn stats(&self) -> proto::KeeperStatsReply {
        let processes = self.cgroup.processes().unwrap_or_default();
        let resident = processes.iter().map(|pid| resident_bytes(*pid)).sum();
        proto::KeeperStatsReply {
            processes: u32::try_from(processes.len()).unwrap_or(u32::MAX),
            resident_bytes: resident,
            output_dropped: self.console.dropped(),
            stdio: self.stdio.as_ref().map(Stdio::names).unwrap_or_default(),
        }
    }

    fn work(
        &self,
        images: Option<OwnedFd>,
        options: Option<proto::ProcessOptions>,
        mounts: Vec<String>,
    ) -> io::Result<Work> {
        let images =
            images.ok_or_else(|| io::Error::other("no directory came with the request"))?;
        let network = self.fds.network.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Work {
            criu: self.criu.clone(),
            images,
            cgroup: self.cgroup.path().to_owned(),
            options: options.unwrap_or_default(),
            network,
            mounts,
        })
    }

    fn dump(&mut self, dump: &proto::KeeperDump, images: Option<OwnedFd>) -> io::Result<()> {
        let was_paused = matches!(self.phase, Phase::Paused);
        self.expect(was_paused || matches!(self.phase, Phase::Running), "be dumped")?;
        let mounts = hold::external_mounts(self.init)?;
        let work = self.work(images, dump.options, mounts)?;
        if !was_paused {
            self.cgroup.freeze()?;
        }
        if let Some(stdio) = &self.stdio {
            stdio.drain(&self.console);
        }
        let teller = self.teller.clone();
        let started = hold::dump(work, self.init, move |news| teller.tell(Told::Work(news)));
        match started {
            Ok(hold) => {
                self.phase = Phase::Dumping {
                    hold,
                    was_paused,
                    written: false,
                    word: None,
                    leave_running: dump.leave_running,
                };
                Ok(())
            }
            Err(error) => {
                if !was_paused {
                    self.cgroup.set_frozen(false)?;
                }
                Err(error)
            }
        }
    }

    /// Speaks the word over a dump; `None`: who asked is told when it is carried out.
    fn speak(&mut self, die: bool, id: u64) -> Option<Result<(), String>> {
        match &mut self.phase {
            // It runs on already: its dump had failed, or a daemon asks twice.
            Phase::Running | Phase::Paused if !die => Some(Ok(())),
            // A daemon that has restarted asks again: only it still waits.
            Phase::Dumping { word: Some((told, waits)), .. } if *told == die => {
                *waits = id;
                None
            }
            Phase::Dumping { word: Some(_), .. } => Some(Err("it was told already".into())),
            Phase::Dumping { hold, written, word, .. } => {
                *word = Some((die, id));
                if *written {
                    hold.say(die);
                }
                None
            }
            _ => Some(self.expect(false, "go on").map_err(|e| words(&e))),
        }
    }

    fn kill(&mut self, id: u64) -> Option<Result<(), String>> {
        if let Phase::Dumping { written: true, word: None, .. } = &self.phase {
            return self.speak(true, id);
        }
        Some(self.cgroup.kill().map_err(|e| words(&e)))
    }

    fn restore(
        &mut self,
        restore: &proto::KeeperRestore,
        images: Option<OwnedFd>,
        id: u64,
    ) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Empty), "be restored")?;
        let state = restore.state.clone().unwrap_or_default();
        let work = self.work(images, restore.options, state.mounts)?;
        self.cgroup.make()?;
        let stdio = Stdio::new(self.console.sink())?;
        let (stdin, stdout) =
            stdio.theirs().ok_or_else(|| io::Error::other("its input and output are in use"))?;
        let place = Place {
            root: self.root.clone(),
            stdin: stdin.try_clone_to_owned()?,
            stdout: stdout.try_clone_to_owned()?,
            stdio: state.stdio,
            paused: Arc::clone(&self.paused_at_restore),
        };
        let teller = self.teller.clone();
        let hold = hold::restore(work, place, move |news| teller.tell(Told::Work(news)))?;
        self.stdio = Some(stdio);
        self.input = state.input.to_vec();
        self.phase = Phase::Restoring { hold, waits: id };
        Ok(())
    }

    fn release(&mut self, paused: bool, id: u64) -> Option<Result<(), String>> {
        match std::mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Restored(hold) => {
                self.paused_at_restore.store(paused, Ordering::SeqCst);
                hold.say(true);
                self.phase = Phase::Releasing { waits: id, paused, ended: None };
                None
            }
            // A daemon that has restarted asks again.
            Phase::Releasing { paused, ended, .. } => {
                self.phase = Phase::Releasing { waits: id, paused, ended };
                None
            }
            phase @ (Phase::Running | Phase::Paused) => {
                self.phase = phase;
                Some(Ok(()))
            }
            phase => {
                self.phase = phase;
                Some(self.expect(false, "be let go").map_err(|e| words(&e)))
            }
        }
    }

    fn hear(&mut self, told: Told) {
        match told {
            Told::End(init, status) => self.init_ended(init, status),
            Told::Work(News::Dumped) => self.dumped(),
            Told::Work(News::DumpFailed(failure)) => self.dump_failed(&failure),
            Told::Work(News::DumpOver) => self.dump_over(),
            Told::Work(News::Restored(init)) => self.restored(init),
            Told::Work(News::RestoreFailed(failure)) => self.restore_failed(&failure),
            Told::Work(News::RestoreOver(result)) => self.restore_over(result),
        }
    }

    fn init_ended(&mut self, init: u32, status: Option<ExitStatus>) {
        if init != self.init {
            return;
        }
        if let Some(stdio) = &self.stdio {
            stdio.drain(&self.console);
        }
        if let Phase::Releasing { ended, .. } = &mut self.phase {
            *ended = Some(status);
            return;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Ended(status));
        if let Phase::Dumping { word: Some((_, waits)), .. } = phase {
            self.reply(waits, Ok(()));
        }
    }

    /// Everything is written, and the tree is in CRIU's hand.
    fn dumped(&mut self) {
        let input = self.stdio.as_ref().map(Stdio::take_input_back);
        let (input, error) = match input {
            Some(Ok(input)) => (input, String::new()),
            Some(Err(error)) => (Vec::new(), format!("cannot take its input along: {error}")),
            None => (Vec::new(), String::new()),
        };
        if let Some(stdio) = &self.stdio {
            stdio.drain(&self.console);
        }
        self.input.clone_from(&input);
        let dumped = proto::KeeperDumped {
            error,
            stdio: self.stdio.as_ref().map(Stdio::names).unwrap_or_default(),
            input: input.into(),
            mounts: hold::external_mounts(self.init).unwrap_or_default(),
            processes: self.stats().processes,
            criu: String::new(),
        };
        self.queue(keeper_message::Message::Dumped(dumped));
        if let Phase::Dumping { hold, written, word, leave_running, .. } = &mut self.phase {
            *written = true;
            match word {
                Some((die, _)) => hold.say(*die),
                None if *leave_running => hold.say(false),
                None => {}
            }
        }
    }

    fn dump_failed(&mut self, failure: &Failure) {
        let dumped =
            proto::KeeperDumped { error: failure.to_string(), ..proto::KeeperDumped::default() };
        self.queue(keeper_message::Message::Dumped(dumped));
        self.dump_over();
    }

    /// CRIU has let go of the tree: it lives, or its end will be heard of.
    fn dump_over(&mut self) {
        let Phase::Dumping { was_paused, word, .. } = &self.phase else { return };
        let (was_paused, word) = (*was_paused, *word);
        if matches!(word, Some((true, _))) {
            // What has begun to die stays in this phase until it is dead. A process
            // that CRIU did not know of must not stay.
            if let Err(error) = self.cgroup.kill() {
                eprintln!("what is left of its processes: {error}");
            }
            return;
        }
        let input = std::mem::take(&mut self.input);
        let typed = match &mut self.stdio {
            Some(stdio) if !input.is_empty() => stdio.input(&input),
            _ => Ok(()),
        };
        let thawed = if was_paused { self.cgroup.freeze() } else { self.cgroup.set_frozen(false) };
        self.phase = if was_paused { Phase::Paused } else { Phase::Running };
        if let Some((_, waits)) = word {
            self.reply(waits, typed.and(thawed).map_err(|e| words(&e)));
        }
    }

    fn restored(&mut self, init: u32) {
        let Phase::Restoring { hold, waits } = std::mem::replace(&mut self.phase, Phase::Empty)
        else {
            return;
        };
        self.phase = Phase::Restored(hold);
        if let Some(stdio) = &mut self.stdio {
            stdio.handed_over();
        }
        let followed = self.follow(init);
        self.reply(waits, followed.map_err(|e| words(&e)));
    }

    fn restore_failed(&mut self, failure: &Failure) {
        let Phase::Restoring { waits, .. } = std::mem::replace(&mut self.phase, Phase::Empty)
        else {
            return;
        };
        self.init = 0;
        self.stdio = None;
        // Nothing may be left that could run.
        if let Err(error) = self.cgroup.kill() {
            eprintln!("what is left of its processes: {error}");
        }
        self.reply(waits, Err(failure.to_string()));
    }

    fn restore_over(&mut self, result: Result<(), Failure>) {
        let Phase::Releasing { waits, paused, ended } = self.phase else { return };
        let result = match (result, ended) {
            // It ran: a command may be that short.
            (Ok(()), Some(status)) => {
                self.phase = Phase::Ended(status);
                Ok(())
            }
            (Ok(()), None) => {
                self.phase = if paused { Phase::Paused } else { Phase::Running };
                let input = std::mem::take(&mut self.input);
                match &mut self.stdio {
                    Some(stdio) if !input.is_empty() => stdio.input(&input).map_err(|e| words(&e)),
                    _ => Ok(()),
                }
            }
            (Err(failure), _) => {
                if let Err(error) = self.cgroup.kill() {
                    eprintln!("what is left of its processes: {error}");
                }
                self.phase = Phase::Ended(None);
                Err(failure.to_string())
            }
        };
        self.reply(waits, result);
    }
}

/// Resident memory of a process (proc(5), `VmRSS` of `/proc/PID/status`).
fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
