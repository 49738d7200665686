//! A tree on its way in: CRIU makes it, and it is let go when the word is given.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use migr_proto::v1 as proto;

use super::phase::{Phase, Told};
use super::{Control, Failure};
use crate::child::words;
use crate::keeper::adopt::{self, Adoption, Original};
use crate::keeper::container;
use crate::keeper::hold::{self, Place};
use crate::keeper::mounts;
use crate::keeper::stdio::Stdio;

impl Control {
    pub(super) fn restore(
        &mut self,
        restore: &proto::KeeperRestore,
        images: Option<OwnedFd>,
        id: u64,
    ) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Empty), "be restored")?;
        let state = restore.state.clone().unwrap_or_default();
        let work = self.work(images, restore.options, state.mounts)?;
        let following = self.follow_memory(&work.images, &state.stays)?;
        if self.container.is_none() {
            self.cgroup.make()?;
            // Not before: a tree that is started here would have that mount, too, which
            // a host that it comes to has not.
            mounts::bind_root(&self.root)?;
        }
        let stdio = Stdio::new(self.console.sink())?;
        let (stdin, stdout) =
            stdio.theirs().ok_or_else(|| io::Error::other("its input and output are in use"))?;
        let place = Place {
            root: self.root.clone(),
            stdin: stdin.try_clone_to_owned()?,
            stdout: stdout.try_clone_to_owned()?,
            stdio: state.stdio,
            paused: Arc::clone(&self.paused_at_restore),
            limit: (restore.limit_ms > 0).then(|| Duration::from_millis(restore.limit_ms.into())),
            lazy: restore.lazy,
            following,
        };
        let teller = self.teller.clone();
        let tell = move |news| teller.tell(Told::Work(news));
        let hold = match &self.container {
            Some(container) => container::restore(container.clone(), work, place, tell)?,
            None => hold::restore(work, place, tell)?,
        };
        self.stdio = Some(stdio);
        self.input = state.input.to_vec();
        self.phase = Phase::Restoring { hold, waits: id };
        self.name_what_is_lacking();
        Ok(())
    }

    pub(super) fn adopt(
        &mut self,
        adopt: &proto::KeeperAdopt,
        images: Option<OwnedFd>,
        id: u64,
    ) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Empty), "take over a process")?;
        let adoption = Adoption {
            work: self.work(images, adopt.options, Vec::new())?,
            original: Original { pid: adopt.pid, start_time: adopt.start_time },
            config: self.config.clone(),
            paused: Arc::clone(&self.paused_at_restore),
        };
        self.cgroup.make()?;
        let teller = self.teller.clone();
        let hold = adopt::adopt(adoption, move |news| teller.tell(Told::Work(news)))?;
        self.phase = Phase::Restoring { hold, waits: id };
        Ok(())
    }

    pub(super) fn release(&mut self, paused: bool, id: u64) -> Option<Result<(), String>> {
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

    pub(super) fn restored(&mut self, init: u32) {
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

    pub(super) fn restore_failed(&mut self, failure: &Failure) {
        let Phase::Restoring { waits, .. } = std::mem::replace(&mut self.phase, Phase::Empty)
        else {
            return;
        };
        self.init = 0;
        self.stdio = None;
        self.nothing_follows();
        // Nothing may be left that could run.
        if let Err(error) = self.cgroup.kill() {
            eprintln!("what is left of its processes: {error}");
        }
        if let Err(error) = self.cgroup.set_frozen(false) {
            eprintln!("its cgroup stays frozen: {error}");
        }
        self.reply(waits, Err(failure.to_string()));
    }

    pub(super) fn restore_over(&mut self, result: Result<(), Failure>) {
        let Phase::Releasing { waits, paused, ended } = self.phase else { return };
        let result = match (result, ended) {
            // It ran: a command may be that short.
            (Ok(()), Some(status)) => {
                self.phase = Phase::Ended(status);
                Ok(())
            }
            (Ok(()), None) => {
                self.phase = if paused { Phase::Paused } else { Phase::Running };
                self.type_again();
                Ok(())
            }
            (Err(failure), _) => {
                if let Err(error) = self.cgroup.kill() {
                    eprintln!("what is left of its processes: {error}");
                }
                self.phase = Phase::Ended(None);
                self.nothing_follows();
                Err(failure.to_string())
            }
        };
        self.reply(waits, result);
    }
}
