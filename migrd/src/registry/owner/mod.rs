//! The one task that may touch a workload.
//!
//! It takes commands one by one. While a migration holds the workload it goes
//! on answering: most commands are refused as busy then.

mod handle;
mod leaving;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::status::state_of;
use super::{RegistryError, Shared, State, Status, Watching, blocking};
use crate::migration::journal::{Event, Ownership, WorkloadRecord};
use crate::migration::link::Peer;
use crate::migration::plan::Question;
use crate::migration::source::released::{Released, Settled};
use crate::migration::source::{End, Request};
use crate::units::MigrationId;
use crate::workload::{Carry, Problem, RunState, Workload, WorkloadError};
use handle::{Published, put};

pub(super) use handle::OwnerHandle;

type Reply<T> = oneshot::Sender<Result<T, RegistryError>>;

/// What is done with a workload while it stands still.
pub type FrozenWork = Box<
    dyn for<'a> FnOnce(&'a mut dyn Workload) -> BoxFuture<'a, Result<(), WorkloadError>> + Send,
>;

/// How a workload is saved.
pub struct Saving {
    /// What of it, and what may be done to it for that.
    pub carry: Carry,
    /// Where its files go, if it saves files.
    pub files: Option<OwnedFd>,
    /// Where the files are that they build on, relative to that; empty: on none.
    pub onto: String,
    /// It ends when it is saved.
    pub ends: bool,
}

/// What a look at a workload that is to be saved has shown.
pub struct Looked {
    /// What keeps it from being saved as it is now.
    pub problems: Vec<Problem>,
    /// It saves files.
    pub saves_files: bool,
}

/// What an owner can be told.
pub(super) enum Command {
    Pause(bool, Reply<Status>),
    AskToEnd(Reply<()>),
    Stop(Reply<Status>),
    Remove(Reply<()>),
    Frozen(Saving, FrozenWork, Reply<Duration>),
    Look(Carry, Reply<Looked>),
    Migrate(Arc<dyn Peer>, Request, Reply<Watching>),
    Question(Arc<dyn Peer>, Request, Reply<Question>),
    Cancel(Reply<MigrationId>),
    Force(bool, Reply<Status>),
}

/// What the owner has in its hands.
pub(super) enum Holding {
    /// The workload.
    Here(Box<dyn Workload>),
    /// This host owns it, and it is dead: why.
    Lost(String),
    /// A migration has it.
    Migrating(Active),
    /// Given away, not settled.
    InDoubt(Box<Released>),
    /// The task that settles it has it.
    Settling(CancellationToken),
    /// It is elsewhere.
    Gone,
}

/// A migration under way.
pub(super) struct Active {
    watching: Watching,
    cancel: CancellationToken,
}

/// What a task of the owner brings back.
enum Back {
    Migrated(Box<End>),
    Settled(Settled, Box<Released>),
    /// How it stands as long as that is not settled.
    Unsettled(Settled),
    Interrupted(Box<Released>),
}

/// The owner of one workload.
pub(super) struct Owner {
    shared: Arc<Shared>,
    record: WorkloadRecord,
    holding: Holding,
    run_state: Option<watch::Receiver<RunState>>,
    doubt: String,
    /// What was given away runs there, and its memory is still here.
    serves: bool,
    published: Arc<Published>,
    inbox: mpsc::Receiver<Command>,
    back: (mpsc::Sender<Back>, mpsc::Receiver<Back>),
}

impl Owner {
    pub(super) fn new(
        shared: Arc<Shared>,
        record: WorkloadRecord,
        holding: Holding,
    ) -> (Self, OwnerHandle) {
        let (commands, inbox) = mpsc::channel(16);
        let status = watch::Sender::new(Status {
            identity: record.identity.clone(),
            epoch: record.epoch,
            state: State::Gone,
            reason: String::new(),
            peer: String::new(),
            migration: None,
        });
        let published = Arc::new(Published {
            status,
            terminal: Mutex::default(),
            watching: Mutex::default(),
            last: Mutex::default(),
        });
        let mut owner = Self {
            shared,
            record,
            holding: Holding::Gone,
            run_state: None,
            doubt: String::new(),
            serves: false,
            published: published.clone(),
            inbox,
            back: mpsc::channel(4),
        };
        owner.hold(holding);
        (owner, OwnerHandle { commands, published })
    }

    /// Takes something else in its hands.
    fn hold(&mut self, holding: Holding) {
        match &holding {
            Holding::Here(workload) => {
                self.run_state = Some(workload.state());
                put(&self.published.terminal, Some(workload.terminal()));
            }
            Holding::Migrating(active) => {
                put(&self.published.watching, Some(active.watching.clone()));
            }
            Holding::Lost(_) | Holding::Gone => {
                self.run_state = None;
                put(&self.published.terminal, None);
            }
            Holding::InDoubt(_) | Holding::Settling(_) => {}
        }
        if !matches!(holding, Holding::Migrating(_)) {
            put(&self.published.watching, None);
        }
        self.holding = holding;
        self.publish();
        if matches!(self.holding, Holding::InDoubt(_)) {
            self.settle();
        }
    }

    /// Tells everybody how it stands.
    fn publish(&mut self) {
        let run = match (&self.holding, &mut self.run_state) {
            (Holding::Lost(why), _) => RunState::Ended(why.clone()),
            (_, Some(state)) => state.borrow_and_update().clone(),
            (_, None) => RunState::Ended("unknown".into()),
        };
        let (mut state, mut reason) = state_of(&self.record, &run);
        let mut migration = None;
        if let Holding::Migrating(active) = &self.holding {
            (state, reason) = (State::Migrating, String::new());
            migration = Some(active.watching.id);
        }
        let peer = match &self.record.ownership {
            Ownership::Released(to) | Ownership::Gone(to) => to.address.clone(),
            Ownership::Never | Ownership::Owned | Ownership::Removed(_) => String::new(),
        };
        if state == State::InDoubt {
            reason.clone_from(&self.doubt);
            if self.serves {
                state = State::Migrating;
            }
        }
        let (identity, epoch) = (self.record.identity.clone(), self.record.epoch);
        let status = Status { identity, epoch, state, reason, peer, migration };
        self.published.status.send_replace(status);
    }

    /// Serves until the daemon goes down or nobody can reach it any more.
    pub(super) async fn run(mut self) {
        let shutdown = self.shared.shutdown.clone();
        self.put_down_if_ended().await;
        loop {
            let (inbox, back) = (&mut self.inbox, &mut self.back.1);
            let run_state = &mut self.run_state;
            tokio::select! {
                biased;
                Some(back) = back.recv() => {
                    self.take_back(back).await;
                    self.put_down_if_ended().await;
                }
                () = shutdown.cancelled(), if !matches!(self.holding, Holding::Migrating(_)) => break,
                () = changed(run_state) => {
                    self.put_down_if_ended().await;
                    self.publish();
                }
                command = inbox.recv() => match command {
                    Some(Command::Remove(reply)) => {
                        let done = self.remove().await;
                        let ended = done.is_ok();
                        let _ = reply.send(done);
                        if ended {
                            break;
                        }
                    }
                    Some(command) => self.command(command).await,
                    None => break,
                },
            }
        }
        if let Holding::Settling(interrupt) = &self.holding {
            interrupt.cancel();
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Pause(paused, reply) => {
                let done = self.pause(paused).await;
                let _ = reply.send(done.map(|()| self.published.status.borrow().clone()));
            }
            Command::AskToEnd(reply) => {
                let _ = reply.send(self.ask_to_end().await);
            }
            Command::Stop(reply) => {
                let done = self.stop().await;
                let _ = reply.send(done.map(|()| self.published.status.borrow().clone()));
            }
            Command::Remove(reply) => {
                let _ = reply.send(self.remove().await);
            }
            Command::Frozen(how, work, reply) => {
                let _ = reply.send(self.frozen(how, work).await);
            }
            Command::Look(what, reply) => {
                let _ = reply.send(self.look(what).await);
            }
            Command::Migrate(peer, request, reply) => {
                let _ = reply.send(self.migrate(peer, request).await);
            }
            Command::Question(peer, request, reply) => {
                let _ = reply.send(self.question(&peer, &request).await);
            }
            Command::Cancel(reply) => {
                let _ = reply.send(self.cancel());
            }
            Command::Force(run_here, reply) => {
                let done = self.force(run_here).await;
                let _ = reply.send(done.map(|()| self.published.status.borrow().clone()));
            }
        }
    }

    fn name(&self) -> String {
        self.record.identity.name.clone()
    }

    fn wrong(&self, call: &'static str) -> RegistryError {
        let status = self.published.status.borrow();
        let name = self.name();
        if let Some(migration) = status.migration {
            return RegistryError::Busy { name, migration };
        }
        let (state, hint) = match status.state {
            State::Running if call == "removed" => {
                ("running", "; `migctl stop` it first".to_owned())
            }
            State::Running => ("running", String::new()),
            State::Paused => ("paused already", String::new()),
            State::Stopped => ("stopped", format!(" ({})", status.reason)),
            State::Migrating if self.serves => (
                "still needed",
                format!(
                    ": it runs at {} and takes the rest of its memory from here; wait for that, or \
                     see `migctl force --help`",
                    status.peer
                ),
            ),
            State::Migrating => ("arriving", "; wait for it".to_owned()),
            State::InDoubt => (
                "in doubt",
                format!(
                    "; it settles by itself when {} answers, or see `migctl force --help`",
                    status.peer
                ),
            ),
            State::Gone => ("gone", format!("; it was moved to {}", status.peer)),
        };
        RegistryError::WrongState { name, state: state.to_owned(), call, hint }
    }

    /// The workload, if it is here and has not ended.
    fn live(&mut self, call: &'static str) -> Result<&mut Box<dyn Workload>, RegistryError> {
        let ended = matches!(
            self.run_state.as_ref().map(|s| s.borrow().clone()),
            Some(RunState::Ended(_)) | None
        );
        if ended || !matches!(self.holding, Holding::Here(_)) {
            return Err(self.wrong(call));
        }
        match &mut self.holding {
            Holding::Here(workload) => Ok(workload),
            Holding::Lost(_)
            | Holding::Migrating(_)
            | Holding::InDoubt(_)
            | Holding::Settling(_)
            | Holding::Gone => Err(RegistryError::Unknown(String::new())),
        }
    }

    async fn journal(&mut self, event: Event) -> Result<(), RegistryError> {
        let (journal, identity) = (self.shared.journal.clone(), self.record.identity.clone());
        self.record = blocking(move || journal.record(&identity, &event)).await?;
        Ok(())
    }

    async fn pause(&mut self, paused: bool) -> Result<(), RegistryError> {
        let call = if paused { "paused" } else { "resumed" };
        let now = self.published.status.borrow().state;
        self.live(call)?;
        if (now == State::Paused) == paused {
            return Err(self.wrong(call));
        }
        self.journal(Event::Paused(paused)).await?;
        let workload = self.live(call)?;
        let done = if paused { workload.pause().await } else { workload.resume().await };
        if let Err(error) = done {
            self.journal(Event::Paused(!paused)).await?;
            return Err(error.into());
        }
        self.publish();
        Ok(())
    }

    /// A workload that has ended needs nothing of the host but its output: not
    /// its memory, and least of all its disks, which others may want. Done
    /// before anybody hears of the end.
    async fn put_down_if_ended(&mut self) {
        if self.end().is_none() {
            return;
        }
        let name = self.name();
        let Holding::Here(workload) = &mut self.holding else { return };
        if let Err(error) = workload.stop().await {
            tracing::warn!(workload = name, %error, "what has ended holds on to something");
        }
        self.remember_end().await;
    }

    /// Why it has ended, if it has.
    fn end(&self) -> Option<String> {
        match &*self.run_state.as_ref()?.borrow() {
            RunState::Ended(why) => Some(why.clone()),
            RunState::Running | RunState::Paused => None,
        }
    }

    /// Has the journal say why it has ended: what could be asked for that may be gone
    /// when the next daemon starts.
    async fn remember_end(&mut self) {
        let known = self.record.ended.is_some() || !self.record.owned();
        let Some(why) = self.end().filter(|_| !known) else { return };
        if let Err(error) = self.journal(Event::Ended(why)).await {
            let name = self.name();
            tracing::warn!(workload = name, %error, "why it has ended is not in the journal");
        }
    }

    async fn ask_to_end(&mut self) -> Result<(), RegistryError> {
        Ok(self.live("stopped")?.ask_to_end().await?)
    }

    async fn stop(&mut self) -> Result<(), RegistryError> {
        self.live("stopped")?.stop().await?;
        self.remember_end().await;
        self.publish();
        Ok(())
    }

    async fn remove(&mut self) -> Result<(), RegistryError> {
        let state = self.published.status.borrow().state;
        match &self.holding {
            Holding::Here(_) if state != State::Stopped => return Err(self.wrong("removed")),
            Holding::Migrating(_) | Holding::InDoubt(_) | Holding::Settling(_) => {
                return Err(self.wrong("removed"));
            }
            Holding::Here(_) | Holding::Lost(_) | Holding::Gone => {}
        }
        if matches!(self.holding, Holding::Lost(_))
            && let Some(engine) = self.shared.engine(self.record.identity.kind)
        {
            engine.clear(self.record.identity.id).await;
        }
        self.journal(Event::Removed(self.record.epoch)).await?;
        if let Holding::Here(workload) = std::mem::replace(&mut self.holding, Holding::Gone) {
            workload.discard().await;
        }
        self.hold(Holding::Gone);
        Ok(())
    }

    async fn look(&mut self, what: Carry) -> Result<Looked, RegistryError> {
        let workload = self.live("checkpointed")?;
        workload.carry(what).await?;
        let problems = workload.problems().await?;
        Ok(Looked { problems, saves_files: workload.saves_files() })
    }

    async fn frozen(&mut self, how: Saving, work: FrozenWork) -> Result<Duration, RegistryError> {
        let Saving { carry, files, onto, ends } = how;
        let workload = self.live("checkpointed")?;
        // A migration that failed may have chosen something else.
        workload.carry(carry).await?;
        if let Some(directory) = files {
            workload.save_files_in(directory, onto).await?;
        }
        let started = Instant::now();
        workload.freeze().await?;
        let done = work(workload.as_mut()).await;
        if ends && done.is_ok() {
            workload.stop().await?;
            self.remember_end().await;
            self.publish();
            return Ok(started.elapsed());
        }
        workload.thaw().await?;
        done?;
        Ok(started.elapsed())
    }
}

/// Waits for news of what the workload does; for ever when there won't be any,
/// and then the last news stay true.
async fn changed(state: &mut Option<watch::Receiver<RunState>>) {
    let news = match state {
        Some(state) => state.changed().await.is_ok(),
        None => false,
    };
    if !news {
        std::future::pending().await
    }
}
