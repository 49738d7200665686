//! A container made from images by runc, and held.

use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::Container;
use super::relay::{Relay, Said};
use super::runc::Running;
use crate::keeper::cgroup::{self, Cgroup};
use crate::keeper::criu::rpc::Options;
use crate::keeper::criu::{CriuError, Failure};
use crate::keeper::hold::{
    Ended, Hold, News, Place, RELEASE_LIMIT, RESTORE_LOG, RESTORED, RESUMING, Work, conclude,
    system_failure,
};
use crate::keeper::lazy_pages::LazyPages;
use crate::keeper::tcp_options::TcpOptions;
use crate::keeper::timers;
use crate::sys::sockets::listen_at;

/// How long runc may take to end when CRIU is done.
const END: Duration = Duration::from_secs(30);

/// Has runc make a container from images, and holds it.
///
/// # Errors
/// When there is no room for a thread.
pub fn restore(
    container: Container,
    work: Work,
    place: Place,
    tell: impl Fn(News) + Send + 'static,
) -> io::Result<Hold> {
    let (word, heard) = channel();
    std::thread::Builder::new().name("restore".into()).spawn(move || {
        let restore = Restore { container: &container, work: &work, place: &place };
        let lazy_pages = match place.lazy_pages(&work) {
            Ok(lazy_pages) => lazy_pages,
            Err(failure) => return tell(News::RestoreFailed(failure)),
        };
        conclude(&work, lazy_pages, &tell, |lazy, told| {
            let result = restore.to_the_word(lazy, |init| {
                told(init);
                heard.recv().unwrap_or(false)
            });
            container.unmount_root();
            result
        });
    })?;
    Ok(Hold::new(word))
}

struct Restore<'a> {
    container: &'a Container,
    work: &'a Work,
    place: &'a Place,
}

impl Restore<'_> {
    fn to_the_word(
        &self,
        mut lazy_pages: Option<&mut LazyPages>,
        mut word: impl FnMut(u32) -> bool,
    ) -> Result<bool, Failure> {
        let system = |error: io::Error| system_failure(&error);
        let cgroup = Cgroup::at(&self.work.cgroup);
        let sockets = TcpOptions::load(&self.work.images)?;
        let listener = self.prepare(&cgroup).map_err(system)?;
        let mut runc = self.start().map_err(system)?;
        // What runs in the container stays in the cgroup that CRIU is in. Where cgroup
        // v2 is not the only one runc may know nothing of it.
        let place = |criu: u32| {
            cgroup.make()?;
            fs::write(cgroup.processes_file(), criu.to_string())
        };
        let relay = Relay::accept(&listener, &runc.process, place).map_err(system)?;
        let Some(relay) = relay else {
            let ended = runc.end(END).map_err(system)?;
            return Err(system_failure(&self.container.what_runc_said(ended)));
        };
        let options = Options {
            auto_dedup: Some(true),
            lazy_pages: lazy_pages.as_ref().map(|_| true),
            ..self.work.options(RESTORE_LOG)
        };
        relay.request(options).map_err(system)?;
        if let Some(lazy_pages) = &mut lazy_pages {
            relay.handle().and_then(|maker| lazy_pages.made_by(maker)).map_err(system)?;
        }
        let mut wanted = false;
        let deadline = Cell::new(self.place.limit.map(|limit| Instant::now() + limit));
        let done = drive(&relay, &deadline, |script, init| match script {
            RESTORED => {
                let started = cgroup.processes().and_then(|all| timers::start_again(&all));
                if let Err(error) = started {
                    eprintln!("timers of its processes may stand still: {error}");
                }
                sockets.apply(&cgroup, init);
                // CRIU is in the cgroup, too, and has to go on when that is frozen.
                cgroup::take_in(relay.pid)?;
                lazy_pages.as_mut().map_or(Ok(()), |lazy_pages| lazy_pages.complete())?;
                wanted = word(init);
                // It may have been held for long.
                lazy_pages.as_mut().map_or(Ok(()), |lazy_pages| lazy_pages.check())?;
                deadline.set(Some(Instant::now() + RELEASE_LIMIT));
                Ok(wanted)
            }
            // Should anything fail from here on, nothing has run yet: whoever hears of
            // the failure may run another copy.
            RESUMING => cgroup.set_frozen(true).map(|()| true),
            _ => Ok(true),
        });
        if matches!(done, Err(Ended::Slow)) {
            // What CRIU lets go of when it ends must not run.
            let _ = cgroup.set_frozen(true);
            relay.kill();
        }
        drop(relay);
        // It clears up what was not to be, and ends.
        let ended = runc.end(END).map_err(system)?;
        if let Some(lazy_pages) = lazy_pages {
            lazy_pages.sound(done.is_ok()).map_err(system)?;
        }
        match done {
            Ok(()) if !ended.success() => {
                Err(system_failure(&self.container.what_runc_said(ended)))
            }
            Ok(()) if self.place.paused.load(Ordering::SeqCst) => Ok(true),
            Ok(()) => cgroup.set_frozen(false).map(|()| true).map_err(system),
            Err(Ended::Refused) if !wanted => Ok(false),
            // Which of the two it was is in its words.
            Err(Ended::Broken(CriuError::Socket(error))) => {
                Err(system_failure(&format!("runc, or CRIU below it, has ended: {error}")))
            }
            Err(ended) => Err(self.work.failure(RESTORE_LOG, ended)),
        }
    }

    /// Writes what runc reads, and listens for what it starts.
    fn prepare(&self, cgroup: &Cgroup) -> io::Result<OwnedFd> {
        let network = self.work.network.as_ref().map(AsRawFd::as_raw_fd);
        self.container.write_spec(cgroup, network)?;
        let bundle = self.container.bundle();
        let mut names = vec![String::new(); 3];
        for end in &self.place.stdio {
            let index = usize::try_from(end.fd).unwrap_or(usize::MAX);
            if let Some(name) = names.get_mut(index) {
                name.clone_from(&end.pipe);
            }
        }
        // What runc takes for the images is only this; CRIU has the others from here.
        fs::write(bundle.join("descriptors.json"), serde_json::to_vec(&names)?)?;
        let socket = bundle.join("criu.sock");
        self.write_program(&bundle.join("criu"), &socket)?;
        listen_at(&socket, 1)
    }

    /// The program that runc takes for CRIU, which it looks for by that name.
    fn write_program(&self, at: &Path, socket: &Path) -> io::Result<()> {
        let namespace =
            if self.container.spec.has_cgroup_namespace() { " --cgroup-namespace" } else { "" };
        let mut program = OpenOptions::new().write(true).create(true).truncate(true).open(at)?;
        program.write_all(
            format!(
                "#!/bin/sh\nexec /proc/{}/exe criu-relay --socket {} --criu {}{namespace} -- \"$@\"\n",
                std::process::id(),
                quoted(socket),
                quoted(&self.work.criu),
            )
            .as_bytes(),
        )?;
        program.set_permissions(fs::Permissions::from_mode(0o700))
    }

    fn start(&self) -> io::Result<Running> {
        let bundle = self.container.bundle();
        let mut command = self.container.runc(Some(&bundle));
        command.args(["restore", "--detach"]);
        command.arg("--bundle").arg(&bundle).arg("--image-path").arg(&bundle);
        command.arg(&self.container.id);
        Running::start(command, self.place.stdin.as_fd(), self.place.stdout.as_fd())
    }
}

/// Passes on what CRIU says until it is done, each time before the `deadline`. `answer` is asked what runc agrees to,
/// with the step and the root of the tree.
fn drive(
    relay: &Relay,
    deadline: &Cell<Option<Instant>>,
    mut answer: impl FnMut(&str, u32) -> io::Result<bool>,
) -> Result<(), Ended> {
    let broken = |error: io::Error| Ended::Broken(error.into());
    let (mut refused, mut root) = (false, 0);
    loop {
        match relay.hear_criu(deadline.get()) {
            Ok(Said::Step(script, pid, said)) => {
                root = if pid > 0 { pid } else { root };
                relay.tell_runc(&said).map_err(broken)?;
                let go_on = relay.runc_agrees().map_err(broken)?
                    && answer(&script, root).map_err(broken)?;
                refused |= !go_on;
                relay.answer(go_on).map_err(broken)?;
            }
            Ok(Said::Done(response, said)) => {
                // It may have given up before.
                let told = relay.tell_runc(&said);
                return match response.success {
                    _ if refused => Err(Ended::Refused),
                    true => told.map_err(broken),
                    false => Err(Ended::Failed(response)),
                };
            }
            Err(_) if refused => return Err(Ended::Refused),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(Ended::Slow),
            Err(error) => return Err(broken(error)),
        }
    }
}

/// A word for the shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_for_the_shell() {
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
