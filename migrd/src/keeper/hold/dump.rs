//! A tree is written, and held.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::{DUMP_LOG, DUMPED, Ended, Hold, News, Work, drive, system_failure};
use crate::keeper::cgroup::Cgroup;
use crate::keeper::connections;
use crate::keeper::criu::rpc::{PageServerInfo, Request};
use crate::keeper::criu::session::inherited;
use crate::keeper::criu::{Failure, Launch, Session};
use crate::keeper::tcp_options::TcpOptions;

/// How long CRIU may take to have every process of a tree in its hand.
const SEIZE_LIMIT: Duration = Duration::from_secs(20);
/// Where CRIU asks before a dump, when it has looked at everything but the tree.
const READY: &str = "pre-dump";

/// Has CRIU write the tree of `pid`, and holds it. It waits for two words: that all of
/// the tree's processes stand still by their cgroup, and then, what becomes of them.
pub fn dump(work: Work, pid: u32, tell: impl Fn(News) + Send + 'static) -> io::Result<Hold> {
    let (word, heard) = channel();
    std::thread::Builder::new().name("dump".into()).spawn(move || {
        match dump_held(&work, pid, &heard, &tell) {
            Ok(()) => tell(News::DumpOver),
            Err(failure) => tell(News::DumpFailed(failure)),
        }
    })?;
    Ok(Hold { word })
}

fn dump_held(
    work: &Work,
    pid: u32,
    heard: &Receiver<bool>,
    tell: &impl Fn(News),
) -> Result<(), Failure> {
    let cgroup = Cgroup::at(&work.cgroup);
    let mut options = work.dump_options(pid)?;
    let handed: Vec<_> = work.page_server.iter().map(AsFd::as_fd).collect();
    options.ps = work.page_server.as_ref().map(|_| PageServerInfo { fd: Some(inherited(0)) });
    let started = Session::start(Launch { inherited: &handed, ..Launch::plain(&work.criu) });
    let mut session = started.map_err(|e| system_failure(&e))?;
    session.request(&Request::dump(options)).map_err(|e| system_failure(&e))?;
    let criu = session.pid();
    let mut stuck = None;
    let held = std::thread::scope(|scope| {
        let (mut seized, mut sockets) = (None, None);
        let held = drive(&mut session, Session::next, |script, _| match script {
            READY => {
                tell(News::Ready);
                let stopped = heard.recv().unwrap_or(false);
                // CRIU makes the processes work for it, which those of a frozen cgroup
                // can't. It has to hold every one of them before they are let go by the
                // cgroup.
                seized = stopped.then(|| scope.spawn(|| thaw_when_seized(&cgroup, criu)));
                // From here on they stand still, by their cgroup or by CRIU.
                sockets = stopped.then(|| scope.spawn(|| TcpOptions::read(&cgroup, pid)));
                stopped
            }
            DUMPED => {
                // Should CRIU die, the processes stand still all the same.
                if cgroup.set_frozen(true).is_err() {
                    return false;
                }
                let sockets = sockets.take().and_then(|reading| reading.join().ok());
                if let Err(error) = sockets.map_or(Ok(()), |read| read.write(&work.images)) {
                    stuck = Some(error);
                    return false;
                }
                tell(News::Dumped);
                heard.recv().unwrap_or(false)
            }
            _ => true,
        });
        // It ends when CRIU does, at the latest.
        drop(session);
        if let Some(seized) = seized {
            let _ = seized.join();
        }
        held
    });
    if held.is_err() {
        match connections::release(&cgroup) {
            Ok(0) => {}
            Ok(count) => eprintln!("CRIU had left {count} TCP connections silent"),
            Err(error) => eprintln!("TCP connections may stay silent: {error}"),
        }
    }
    if let Some(error) = stuck {
        return Err(system_failure(&format!("options of TCP sockets can't be written: {error}")));
    }
    match held {
        // A dump that was not to be "fails".
        Ok(()) | Err(Ended::Refused) => Ok(()),
        Err(ended) => Err(work.failure(DUMP_LOG, ended)),
    }
}

/// Thaws the cgroup as soon as CRIU has every process, and after some time in every
/// case: it fails then, and says why.
pub(in crate::keeper) fn thaw_when_seized(cgroup: &Cgroup, criu: u32) {
    let started = Instant::now();
    loop {
        let all = cgroup.threads().unwrap_or_default();
        let seized = !all.is_empty() && all.iter().all(|thread| is_held(*thread, criu));
        let over = !Path::new(&format!("/proc/{criu}")).exists();
        if seized || over || started.elapsed() > SEIZE_LIMIT {
            let _ = cgroup.set_frozen(false);
            return;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Whether CRIU traces a thread: itself, or its child, which it has for a pre-dump.
fn is_held(thread: u32, criu: u32) -> bool {
    let tracer = status_number(thread, "TracerPid:").filter(|tracer| *tracer > 0);
    tracer.is_some_and(|tracer| {
        tracer == criu || status_number(tracer, "PPid:").is_some_and(|parent| parent == criu)
    })
}

fn status_number(pid: u32, name: &str) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}
