//! The one task that may touch a workload.
//!
//! It takes commands one by one. While a migration holds the workload it goes
//! on answering: most commands are refused as busy then.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{RegistryError, Shared, State, Status, Watching, blocking, state_of};
use crate::migration::journal::{Event, Ownership, WorkloadRecord};
use crate::migration::link::Peer;
use crate::migration::phase::{MigrationError, Outcome, Phase, Progress, Report};
use crate::migration::plan::{Question, identify};
use crate::migration::policy::approximate;
use crate::migration::source::released::{Released, Settled};
use crate::migration::source::{self, Context, End, Request};
use crate::units::MigrationId;
use crate::workload::{Manifest, RunState, Terminal, Workload, WorkloadError};

type Reply<T> = oneshot::Sender<Result<T, RegistryError>>;

/// What is done with a workload while it stands still.
pub type FrozenWork = Box<
    dyn for<'a> FnOnce(&'a mut dyn Workload) -> BoxFuture<'a, Result<(), WorkloadError>> + Send,
>;

/// What an owner can be told.
pub(super) enum Command {
    Pause(bool, Reply<Status>),
    Stop(Reply<Status>),
    Remove(Reply<()>),
    Frozen(FrozenWork, Reply<Duration>),
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
    Interrupted(Box<Released>),
}

/// The way to an owner. Cheap to clone.
#[derive(Clone)]
pub(super) struct OwnerHandle {
    commands: mpsc::Sender<Command>,
    published: Arc<Published>,
}

/// What anybody may look at without asking the owner.
struct Published {
    status: watch::Sender<Status>,
    terminal: Mutex<Option<Arc<dyn Terminal>>>,
    watching: Mutex<Option<Watching>>,
    last: Mutex<Option<Arc<Report>>>,
}

fn get<T: Clone>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn put<T>(slot: &Mutex<Option<T>>, value: Option<T>) {
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = value;
}

impl OwnerHandle {
    /// Whether both lead to the same owner.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.published, &other.published)
    }

    pub(super) fn status(&self) -> Status {
        self.published.status.borrow().clone()
    }

    pub(super) fn follow(&self) -> watch::Receiver<Status> {
        self.published.status.subscribe()
    }

    pub(super) fn terminal(&self) -> Option<Arc<dyn Terminal>> {
        get(&self.published.terminal)
    }

    pub(super) fn watching(&self) -> Option<Watching> {
        get(&self.published.watching)
    }

    pub(super) fn last_report(&self) -> Option<Arc<Report>> {
        get(&self.published.last)
    }

    /// Memory it was promised and has not touched, in bytes.
    pub(super) fn untouched(&self) -> u64 {
        let (promised, state) = {
            let status = self.published.status.borrow();
            (status.identity.memory_bytes, status.state)
        };
        if state == State::Stopped {
            return 0;
        }
        self.terminal().map_or(0, |t| promised.saturating_sub(t.populated_bytes()))
    }

    pub(super) async fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, RegistryError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(command(reply)).await;
        sent.map_err(|_| RegistryError::ShuttingDown)?;
        answer.await.unwrap_or(Err(RegistryError::ShuttingDown))
    }
}

/// The owner of one workload.
pub(super) struct Owner {
    shared: Arc<Shared>,
    record: WorkloadRecord,
    holding: Holding,
    run_state: Option<watch::Receiver<RunState>>,
    doubt: String,
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
        }
        let (identity, epoch) = (self.record.identity.clone(), self.record.epoch);
        let status = Status { identity, epoch, state, reason, peer, migration };
        self.published.status.send_replace(status);
    }

    /// Serves until the daemon goes down or nobody can reach it any more.
    pub(super) async fn run(mut self) {
        let shutdown = self.shared.shutdown.clone();
        loop {
            let (inbox, back) = (&mut self.inbox, &mut self.back.1);
            let run_state = &mut self.run_state;
            tokio::select! {
                biased;
                Some(back) = back.recv() => self.take_back(back).await,
                () = shutdown.cancelled(), if !matches!(self.holding, Holding::Migrating(_)) => break,
                () = changed(run_state) => self.publish(),
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
            Command::Stop(reply) => {
                let done = self.stop().await;
                let _ = reply.send(done.map(|()| self.published.status.borrow().clone()));
            }
            Command::Remove(reply) => {
                let _ = reply.send(self.remove().await);
            }
            Command::Frozen(work, reply) => {
                let _ = reply.send(self.frozen(work).await);
            }
            Command::Migrate(peer, request, reply) => {
                let _ = reply.send(self.migrate(peer, request));
            }
            Command::Question(peer, request, reply) => {
                let _ = reply.send(self.question(&peer, &request));
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

    async fn stop(&mut self) -> Result<(), RegistryError> {
        self.live("stopped")?.stop().await?;
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

    async fn frozen(&mut self, work: FrozenWork) -> Result<Duration, RegistryError> {
        let workload = self.live("checkpointed")?;
        let started = Instant::now();
        workload.freeze().await?;
        let done = work(workload.as_mut()).await;
        workload.thaw().await?;
        done?;
        Ok(started.elapsed())
    }

    fn question(
        &mut self,
        peer: &Arc<dyn Peer>,
        request: &Request,
    ) -> Result<Question, RegistryError> {
        let streams = self.live("migrated")?.streams();
        let identity = &self.record.identity;
        let rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let terminal = get(&self.published.terminal);
        Ok(Question {
            peer: peer.clone(),
            here: self.shared.host,
            manifest: Manifest {
                workload: identity.id,
                name: identity.name.clone(),
                kind: identity.kind,
                streams,
                config: identity.config.clone(),
                memory_bytes: identity.memory_bytes,
                cpus: identity.cpus,
                paused: self.record.paused,
                created_unix_ms: identity.created_unix_ms,
            },
            epoch: self.record.epoch.next(),
            mode: request.mode,
            lanes: self.shared.lanes,
            populated_bytes: terminal.map_or(0, |t| t.populated_bytes()),
            known_rate: rates.get(peer.address()).copied().unwrap_or(0.0),
            fixed_cost: self.shared.fixed_cost.get(),
        })
    }

    fn migrate(
        &mut self,
        peer: Arc<dyn Peer>,
        request: Request,
    ) -> Result<Watching, RegistryError> {
        if self.shared.shutdown.is_cancelled() {
            return Err(RegistryError::ShuttingDown);
        }
        let question = self.question(&peer, &request)?;
        let id = MigrationId::random();
        let (progress, progress_seen) = watch::channel(Progress::default());
        let (result, result_seen) = watch::channel(None);
        let cancel = CancellationToken::new();
        let watching = Watching { id, progress: progress_seen, result: result_seen };
        let context = Context {
            id,
            identity: self.record.identity.clone(),
            epoch: self.record.epoch,
            paused: self.record.paused,
            request,
            here: self.shared.here.clone(),
            peer,
            // Known when it has said who it is, which comes first.
            peer_host: self.shared.host,
            journal: self.shared.journal.clone(),
            cancel: cancel.clone(),
            shutdown: self.shared.shutdown.clone(),
            progress,
            fixed_cost: self.shared.fixed_cost.clone(),
            lanes: self.shared.lanes,
        };
        let active = Active { watching: watching.clone(), cancel };
        let held = std::mem::replace(&mut self.holding, Holding::Gone);
        let Holding::Here(workload) = held else {
            self.holding = held;
            return Err(self.wrong("migrated"));
        };
        self.shared.table().under_way.insert(id);
        self.hold(Holding::Migrating(active));
        let span = tracing::info_span!("migration", %id, role = "source", workload = self.name());
        let (back, published) = (self.back.0.clone(), self.published.clone());
        let moving = async move {
            let end = moving(question, context, workload).await;
            let report = match &end {
                End::Moved(report) | End::Kept(_, report) | End::InDoubt(_, report) => report,
            };
            let report = Arc::new(report.clone());
            put(&published.last, Some(report.clone()));
            // The owner first, so that whoever hears the result finds the
            // workload in the state that the result speaks of.
            let _ = back.send(Back::Migrated(Box::new(end))).await;
            (report, result)
        };
        let (status, shared) = (self.published.status.subscribe(), self.shared.clone());
        self.shared.tasks.spawn(
            async move {
                let (report, result) = moving.await;
                shared.table().under_way.remove(&id);
                announced(status, id).await;
                result.send_replace(Some(report));
            }
            .instrument(span),
        );
        Ok(watching)
    }

    fn cancel(&mut self) -> Result<MigrationId, RegistryError> {
        let Holding::Migrating(active) = &self.holding else {
            return Err(RegistryError::NotMigrating(self.name()));
        };
        if active.watching.progress.borrow().phase >= Phase::Released {
            return Err(RegistryError::TooLate(self.name()));
        }
        active.cancel.cancel();
        Ok(active.watching.id)
    }

    async fn force(&mut self, run_here: bool) -> Result<(), RegistryError> {
        let Holding::Settling(interrupt) = &self.holding else {
            return Err(self.wrong("forced"));
        };
        interrupt.cancel();
        let released = match self.back.1.recv().await {
            Some(Back::Interrupted(released)) => released,
            Some(other) => {
                // It settled by itself at this very moment: nothing to force.
                self.take_back(other).await;
                return Err(self.wrong("forced"));
            }
            None => return Err(RegistryError::ShuttingDown),
        };
        let event = if run_here { Event::ForcedHere } else { Event::GivenUp };
        if let Err(error) = self.journal(event).await {
            self.hold(Holding::InDoubt(released));
            return Err(error);
        }
        match (released.into_workload(), run_here) {
            (Some(mut workload), true) => {
                let thawed = workload.thaw().await;
                if let Err(error) = workload.stop_tracking().await {
                    tracing::warn!(%error, "page tracking could not be switched off");
                }
                // It is this host's now, whether it runs or not.
                self.hold(Holding::Here(workload));
                thawed?;
            }
            (Some(workload), false) => {
                workload.discard().await;
                self.hold(Holding::Gone);
            }
            (None, true) => self.hold(Holding::Lost("its stopped copy is gone".into())),
            (None, false) => self.hold(Holding::Gone),
        }
        Ok(())
    }

    /// Has the peer asked until it answers.
    fn settle(&mut self) {
        let interrupt = CancellationToken::new();
        let settling = Holding::Settling(interrupt.clone());
        let held = std::mem::replace(&mut self.holding, settling);
        let Holding::InDoubt(mut released) = held else {
            self.holding = held;
            return;
        };
        let (back, name) = (self.back.0.clone(), self.name());
        self.shared.tasks.spawn(async move {
            let told = |why: &str| tracing::warn!(workload = name, why, "in doubt");
            let settled = released.settle(&interrupt, told).await;
            let news = match settled {
                Some(settled) => Back::Settled(settled, released),
                None => Back::Interrupted(released),
            };
            let _ = back.send(news).await;
        });
    }

    async fn take_back(&mut self, back: Back) {
        // Whatever it was, buffers of a migration are free now.
        tokio::task::spawn_blocking(crate::sys::heap::trim);
        if let Ok(Some(record)) = self.shared.journal.get(self.record.identity.id) {
            self.record = record;
        }
        match back {
            Back::Migrated(end) => match *end {
                End::Moved(report) => {
                    self.learn_rate(&report);
                    self.hold(Holding::Gone);
                }
                End::Kept(workload, _) => self.hold(Holding::Here(workload)),
                End::InDoubt(released, report) => {
                    self.doubt = report.failure.map_or_else(String::new, |f| f.message);
                    self.hold(Holding::InDoubt(Box::new(released)));
                }
            },
            Back::Settled(Settled::Gone, released) => {
                if let Some(workload) = released.into_workload() {
                    workload.discard().await;
                }
                self.hold(Holding::Gone);
            }
            Back::Settled(Settled::TakenBack, released) => {
                let holding = released.into_workload().map_or_else(
                    || Holding::Lost("it came back to a host that had lost it".into()),
                    Holding::Here,
                );
                self.hold(holding);
            }
            Back::Settled(Settled::InDoubt(why), released) => {
                self.doubt = why;
                self.hold(Holding::InDoubt(released));
            }
            Back::Interrupted(released) => self.hold(Holding::InDoubt(released)),
        }
    }

    fn learn_rate(&self, report: &Report) {
        let largest = report.tally.rounds.iter().max_by_key(|r| r.bytes);
        if let Some(round) =
            largest.filter(|r| r.bytes > 1 << 24 && report.outcome == Outcome::Completed)
        {
            let rate = approximate(round.bytes) / round.took.as_secs_f64().max(1e-6);
            let mut rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
            rates.insert(report.destination.clone(), rate);
        }
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

/// Waits until the owner has published the end of migration `id`.
async fn announced(mut status: watch::Receiver<Status>, id: MigrationId) {
    let _ = status.wait_for(|s| s.migration != Some(id)).await;
}

/// Checks who is there, then moves it.
async fn moving(question: Question, mut context: Context, workload: Box<dyn Workload>) -> End {
    let asked = context.cancel.run_until_cancelled(identify(&question)).await;
    match asked {
        Some(Ok(facts)) => {
            context.peer_host = facts.host;
            source::run(context, workload).await
        }
        Some(Err(blocker)) => {
            let cause = MigrationError::Refused(vec![blocker]);
            End::Kept(workload, context.refused(&cause))
        }
        None => End::Kept(workload, context.refused(&MigrationError::Cancelled)),
    }
}
