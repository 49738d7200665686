//! A tree on its way out: CRIU writes it, and it dies or runs on, as the word is.

use std::io;
use std::os::fd::OwnedFd;

use migr_proto::v1::{self as proto, keeper_message};

use super::phase::{Phase, Stage, Told};
use super::{Control, Failure};
use crate::child::words;
use crate::keeper::hold::{self, Work};
use crate::keeper::stdio::Stdio;

impl Control {
    pub(super) fn dump(
        &mut self,
        dump: &proto::KeeperDump,
        images: Option<OwnedFd>,
        page_server: Option<OwnedFd>,
        id: u64,
    ) -> io::Result<()> {
        let was_paused = matches!(self.phase, Phase::Paused);
        self.expect(was_paused || matches!(self.phase, Phase::Running), "be dumped")?;
        let work = self.writing(images, dump.options, dump.parent.clone())?;
        let work = Work { page_server, track: dump.track, ..work };
        let teller = self.teller.clone();
        self.dumps += 1;
        let number = self.dumps;
        let hold = hold::dump(work, self.init, move |news| teller.tell(Told::Dump(number, news)))?;
        self.phase = Phase::Dumping {
            hold,
            was_paused,
            stage: Stage::Starting(id),
            word: None,
            leave_running: dump.leave_running,
        };
        Ok(())
    }

    /// CRIU is ready to write it.
    pub(super) fn ready(&mut self) {
        let Phase::Dumping { stage, word, hold, .. } = &mut self.phase else { return };
        let Stage::Starting(waits) = *stage else { return };
        *stage = Stage::Ready;
        // It was called off meanwhile.
        if word.is_some() {
            hold.say(false);
        }
        self.reply(waits, Ok(()));
    }

    /// Ends a dump that has not touched the tree yet: another daemon has come, which
    /// knows nothing of it.
    pub(super) fn call_off(&mut self) {
        let Phase::Dumping { stage, was_paused, hold, .. } = &self.phase else { return };
        if stage.is_before() {
            hold.say(false);
            // What is still heard of it counts for nothing.
            self.dumps += 1;
            self.phase = if *was_paused { Phase::Paused } else { Phase::Running };
        }
    }

    /// Stops the tree.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        let ready = matches!(self.phase, Phase::Dumping { stage: Stage::Ready, word: None, .. });
        self.expect(ready, "be written, since no CRIU is ready to")?;
        self.cgroup.freeze_tree(self.init)?;
        if let Some(stdio) = &self.stdio {
            stdio.drain(&self.console);
        }
        if let Phase::Dumping { stage, .. } = &mut self.phase {
            *stage = Stage::Still;
        }
        Ok(())
    }

    /// Lets CRIU write the tree that was stopped.
    pub(super) fn write(&mut self) -> io::Result<()> {
        match &mut self.phase {
            Phase::Dumping { stage: stage @ Stage::Still, word: None, hold, .. } => {
                *stage = Stage::Writing;
                hold.say(true);
                Ok(())
            }
            _ => self.expect(false, "be written, since it was not stopped"),
        }
    }

    /// Speaks the word over a dump; `None`: who asked is told when it is carried out.
    pub(super) fn speak(&mut self, die: bool, id: u64) -> Option<Result<(), String>> {
        match &mut self.phase {
            // It runs on already: its dump had failed, or a daemon asks twice.
            Phase::Running | Phase::Paused if !die => Some(Ok(())),
            // A daemon that has restarted asks again: only it still waits.
            Phase::Dumping { word: Some((told, waits)), .. } if *told == die => {
                *waits = id;
                None
            }
            Phase::Dumping { word: Some(_), .. } => Some(Err("it was told already".into())),
            Phase::Dumping { hold, stage, word, .. } => {
                *word = Some((die, id));
                match stage {
                    // It is not dumped after all.
                    Stage::Ready | Stage::Still => hold.say(false),
                    Stage::Written => hold.say(die),
                    Stage::Starting(_) | Stage::Writing => {}
                }
                None
            }
            _ => Some(self.expect(false, "go on").map_err(|e| words(&e))),
        }
    }

    pub(super) fn kill(&mut self, id: u64) -> Option<Result<(), String>> {
        if let Phase::Dumping { stage: Stage::Written, word: None, .. } = &self.phase {
            return self.speak(true, id);
        }
        self.end_start();
        Some(self.cgroup.kill().map_err(|e| words(&e)))
    }

    /// Everything is written, and the tree is in CRIU's hand.
    pub(super) fn dumped(&mut self) {
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
            mounts: self.external_mounts().unwrap_or_default(),
            processes: self.stats().processes,
        };
        self.queue(keeper_message::Message::Dumped(dumped));
        if let Phase::Dumping { hold, stage, word, leave_running, .. } = &mut self.phase {
            *stage = Stage::Written;
            match word {
                Some((die, _)) => hold.say(*die),
                None if *leave_running => hold.say(false),
                None => {}
            }
        }
    }

    pub(super) fn dump_failed(&mut self, failure: &Failure) {
        eprintln!("its processes were not written: {failure}");
        if let Phase::Dumping { stage: Stage::Starting(waits), .. } = self.phase {
            self.reply(waits, Err(failure.to_string()));
        }
        let dumped =
            proto::KeeperDumped { error: failure.to_string(), ..proto::KeeperDumped::default() };
        self.queue(keeper_message::Message::Dumped(dumped));
        self.dump_over();
    }

    /// CRIU has let go of the tree: it lives, or its end will be heard of.
    pub(super) fn dump_over(&mut self) {
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
        self.type_again();
        let thawed = if was_paused { self.cgroup.freeze() } else { self.cgroup.set_frozen(false) };
        self.phase = if was_paused { Phase::Paused } else { Phase::Running };
        if let Some((_, waits)) = word {
            self.reply(waits, thawed.map_err(|e| words(&e)));
        }
    }
}
