//! A tree that is started here.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::Control;
use super::phase::{Phase, Told};
use crate::child::words;
use crate::keeper::cgroup::Cgroup;
use crate::keeper::container::{self, Start};
use crate::keeper::stdio::Stdio;
use crate::keeper::tree;

impl Control {
    /// Starts it. `None`: who asked is told when runc has.
    pub(super) fn start(&mut self, id: u64) -> Option<io::Result<()>> {
        // A daemon that has restarted asks again: only it still waits.
        if let Phase::Starting { waits, .. } = &mut self.phase {
            *waits = Some(id);
            return None;
        }
        let begun = self.begin(id);
        match &self.phase {
            Phase::Starting { .. } if begun.is_ok() => None,
            _ => Some(begun),
        }
    }

    fn begin(&mut self, id: u64) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Empty), "start")?;
        let stdio = Stdio::new(self.console.sink())?;
        let network = self.network.as_ref();
        let Some(container) = &self.container else {
            self.cgroup.make()?;
            let init = tree::start(&self.config, &self.cgroup, &stdio, network.map(AsFd::as_fd))?;
            self.stdio = Some(stdio);
            return self.runs(init);
        };
        let (stdin, stdout) =
            stdio.theirs().ok_or_else(|| io::Error::other("its input and output are in use"))?;
        let start = Start {
            cgroup: Cgroup::at(self.cgroup.path()),
            stdin: stdin.try_clone_to_owned()?,
            stdout: stdout.try_clone_to_owned()?,
            network: network.map(AsRawFd::as_raw_fd),
        };
        let teller = self.teller.clone();
        let tell = move |news| teller.tell(Told::Work(news));
        let call_off = Some(container::start(container.clone(), start, tell)?);
        self.stdio = Some(stdio);
        self.phase = Phase::Starting { call_off, waits: Some(id) };
        Ok(())
    }

    fn runs(&mut self, init: u32) -> io::Result<()> {
        if let Some(stdio) = &mut self.stdio {
            stdio.handed_over();
        }
        self.follow(init)?;
        self.phase = Phase::Running;
        Ok(())
    }

    /// runc has started it, or has not.
    pub(super) fn started(&mut self, result: io::Result<u32>) {
        let Phase::Starting { waits, .. } = std::mem::replace(&mut self.phase, Phase::Empty) else {
            return;
        };
        let runs = result.and_then(|init| self.runs(init));
        if runs.is_err() {
            self.stdio = None;
        }
        if let Some(waits) = waits {
            self.reply(waits, runs.map_err(|e| words(&e)));
        }
    }

    /// Another daemon has come: the one before waits for nothing any more.
    pub(super) fn forget_start(&mut self) {
        if let Phase::Starting { waits, .. } = &mut self.phase {
            *waits = None;
        }
    }

    /// Ends a start that is under way; and a runc that makes it again, which ends without it.
    pub(super) fn end_start(&mut self) {
        if matches!(self.phase, Phase::Restoring { .. }) {
            container::end_all();
        }
        while let Phase::Starting { call_off, .. } = &mut self.phase {
            *call_off = None;
            // The sender is this process's own.
            let Ok(told) = self.told.recv() else { return };
            self.hear(told);
        }
    }
}
