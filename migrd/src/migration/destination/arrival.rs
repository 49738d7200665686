//! One arrival and the task that owns it: Receiving until it is sealed, then
//! Sealed until its source has decided.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::sealed::{self, Held};
use super::{ArrivalError, Claim, Filling, Remembered, Shared};
use crate::migration::journal::{Counterpart, Identity};
use crate::migration::link::{Activated, Intake, LinkError, Peer, SealOrder, SealReport, Standing};
use crate::units::{Epoch, MigrationId, WorkloadId};
use crate::workload::Arriving;

/// The longest pause between two questions to the source.
const ASK_MOST: Duration = Duration::from_secs(10);
/// How long the source has to answer one.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

type Reply<T> = oneshot::Sender<Result<T, ArrivalError>>;

/// What an arrival can be told.
pub(super) enum Command {
    Seal(SealOrder, Reply<SealReport>),
    Activate(Epoch, Reply<Activated>),
    Abandon(String, Reply<()>),
    Resolve(Reply<Standing>),
    Force(bool, Reply<()>),
    /// Its source starts anew: ask it how this one stands.
    AskSource(Reply<()>),
}

/// What is known of an arrival whatever its phase.
pub(super) struct Facts {
    pub(super) shared: Arc<Shared>,
    pub(super) identity: Identity,
    /// The epoch this host would own it in.
    pub(super) epoch: Epoch,
    pub(super) paused: bool,
    /// Memory of it stays at its source, and follows.
    pub(super) follows: bool,
    pub(super) from: Counterpart,
    pub(super) claim: Claim,
}

/// An arrival in either of its phases.
pub(super) struct Arrival {
    facts: Facts,
    phase: Phase,
    /// When its source last said that it is not done with it.
    heard: std::time::Instant,
}

enum Phase {
    Receiving { workload: Box<dyn Arriving>, intake: Arc<dyn Intake> },
    Sealed(Held),
}

/// Whether the task goes on. Moved once a command, so its size is no matter.
#[allow(clippy::large_enum_variant)]
enum Next {
    Wait(Arrival),
    Done,
}

impl Facts {
    /// Has what the copy lacks brought from its source, if memory is to follow.
    fn fill(&self, workload: &dyn Arriving) {
        if !self.follows {
            return;
        }
        let (shared, identity) = (self.shared.clone(), self.identity.clone());
        let (epoch, from) = (self.epoch, self.from.clone());
        let filling = Filling { shared, identity, epoch, from };
        match workload.lacks() {
            Some(lacks) => filling.start(lacks),
            None => filling.over(),
        }
    }

    /// Asks the source how the migration stands; gives up after some seconds.
    async fn ask(&self) -> Result<Result<Standing, LinkError>, tokio::time::error::Elapsed> {
        let source: Arc<dyn Peer> = self.shared.host.peer(&self.from.address);
        let (host, migration) = (self.from.host, self.from.migration);
        let asked = source.resolve(host, migration, self.identity.id, self.epoch, false);
        tokio::time::timeout(ANSWER_WAIT, asked).await
    }
}

/// What it is told.
struct Inbox {
    commands: mpsc::Receiver<Command>,
    /// What came while it could not be done.
    later: VecDeque<Command>,
}

impl Inbox {
    async fn next(&mut self) -> Option<Command> {
        match self.later.pop_front() {
            Some(command) => Some(command),
            None => self.commands.recv().await,
        }
    }

    /// Returns when the copy that is being made is not wanted any more; the command
    /// that says so is the next one. What else comes has to wait.
    async fn given_up(&mut self, facts: &Facts) -> ArrivalError {
        loop {
            let Some(command) = self.commands.recv().await else {
                return std::future::pending().await;
            };
            match command {
                Command::Abandon(..) | Command::Resolve(_) => {
                    self.later.push_front(command);
                    return ArrivalError::GivenUp;
                }
                Command::AskSource(reply) => {
                    if matches!(facts.ask().await, Ok(Ok(Standing::Aborted))) {
                        self.later.push_front(Command::AskSource(reply));
                        return ArrivalError::GivenUp;
                    }
                    let _ = reply.send(Ok(()));
                }
                Command::Seal(..) | Command::Activate(..) | Command::Force(..) => {
                    self.later.push_back(command);
                }
            }
        }
    }
}

impl Arrival {
    pub(super) fn receiving(
        facts: Facts,
        workload: Box<dyn Arriving>,
        intake: Arc<dyn Intake>,
    ) -> Self {
        Self {
            facts,
            phase: Phase::Receiving { workload, intake },
            heard: std::time::Instant::now(),
        }
    }

    pub(super) fn remembered(shared: &Arc<Shared>, found: Remembered) -> Option<Self> {
        let sealed = found.record.sealed?;
        let facts = Facts {
            shared: shared.clone(),
            identity: found.record.identity,
            epoch: sealed.epoch,
            paused: sealed.paused,
            follows: sealed.follows,
            from: sealed.from,
            claim: found.claim,
        };
        facts.fill(found.workload.as_ref());
        let held = Held { workload: found.workload, report: None };
        Some(Self { facts, phase: Phase::Sealed(held), heard: std::time::Instant::now() })
    }

    pub(super) fn migration(&self) -> MigrationId {
        self.facts.from.migration
    }

    pub(super) fn workload(&self) -> WorkloadId {
        self.facts.identity.id
    }

    /// Serves commands until it runs or is discarded.
    pub(super) async fn run(self, inbox: mpsc::Receiver<Command>) {
        let (shared, migration) = (self.facts.shared.clone(), self.migration());
        let mut arrival = self;
        let mut pause = shared.patience.ask;
        let mut wake = Instant::now() + arrival.first_pause();
        let mut inbox = Inbox { commands: inbox, later: VecDeque::new() };
        loop {
            let was_sealed = matches!(arrival.phase, Phase::Sealed(_));
            let next = tokio::select! {
                Some(command) = inbox.next() => arrival.command(command, &mut inbox).await,
                () = tokio::time::sleep_until(wake) => {
                    pause = (pause * 2).min(ASK_MOST);
                    wake = Instant::now() + pause;
                    arrival.tick().await
                }
            };
            arrival = match next {
                Next::Wait(arrival) => arrival,
                Next::Done => break,
            };
            if !was_sealed && matches!(arrival.phase, Phase::Sealed(_)) {
                pause = shared.patience.ask;
                wake = Instant::now() + pause;
            }
        }
        shared.open().remove(&migration);
    }

    fn first_pause(&self) -> Duration {
        match self.phase {
            Phase::Receiving { .. } => self.facts.shared.patience.ask,
            Phase::Sealed(_) => Duration::ZERO,
        }
    }

    async fn command(self, command: Command, inbox: &mut Inbox) -> Next {
        match command {
            Command::Seal(order, reply) => self.seal(order, reply, inbox).await,
            Command::Activate(epoch, reply) => self.activate(epoch, reply).await,
            Command::Abandon(reason, reply) => {
                let done = self.discard(&reason, true).await;
                answer(done, (), reply)
            }
            Command::Resolve(reply) => match self.phase {
                Phase::Sealed(_) => {
                    let _ = reply.send(Ok(Standing::Sealed));
                    Next::Wait(self)
                }
                Phase::Receiving { .. } => {
                    let done = self.discard("its source has given up", false).await;
                    answer(done, Standing::Discarded, reply)
                }
            },
            Command::Force(run, reply) => self.force(run, reply).await,
            Command::AskSource(reply) => {
                let next = self.ask_source().await;
                let _ = reply.send(Ok(()));
                next
            }
        }
    }

    async fn seal(self, order: SealOrder, reply: Reply<SealReport>, inbox: &mut Inbox) -> Next {
        match self.phase {
            Phase::Receiving { mut workload, intake } => {
                let facts = self.facts;
                // To make it may take some of that already.
                facts.fill(workload.as_ref());
                let made = sealed::complete(workload.as_mut(), &intake, &order);
                // It may take long, and the source need not wait for the end of that to
                // have it dropped.
                let made = tokio::select! {
                    biased;
                    made = made => made,
                    given_up = inbox.given_up(&facts) => Err(given_up),
                };
                let sealed = match made {
                    Ok(complete) => sealed::seal(&facts, complete).await,
                    Err(error) => Err(error),
                };
                match sealed {
                    Ok(report) => {
                        let _ = reply.send(Ok(report));
                        let held = Held { workload, report: Some(report) };
                        Next::Wait(Self {
                            facts,
                            phase: Phase::Sealed(held),
                            heard: std::time::Instant::now(),
                        })
                    }
                    // The command that says so comes next, and discards it.
                    Err(error @ ArrivalError::GivenUp) => {
                        let _ = reply.send(Err(error));
                        let phase = Phase::Receiving { workload, intake };
                        Next::Wait(Self { facts, phase, heard: std::time::Instant::now() })
                    }
                    Err(error) => {
                        let reason = error.to_string();
                        let phase = Phase::Receiving { workload, intake };
                        let arrival = Self { facts, phase, heard: std::time::Instant::now() };
                        let done = arrival.discard(&reason, false).await;
                        let _ = reply.send(Err(error));
                        done.map_or_else(|(arrival, _)| Next::Wait(*arrival), |()| Next::Done)
                    }
                }
            }
            Phase::Sealed(ref held) => {
                let again =
                    held.report.ok_or(ArrivalError::Unexpected { call: "Seal", phase: "sealed" });
                let _ = reply.send(again);
                Next::Wait(self)
            }
        }
    }

    async fn activate(self, epoch: Epoch, reply: Reply<Activated>) -> Next {
        if epoch != self.facts.epoch || matches!(self.phase, Phase::Receiving { .. }) {
            let phase = if epoch == self.facts.epoch { "not sealed" } else { "of another epoch" };
            let _ = reply.send(Err(ArrivalError::Unexpected { call: "Activate", phase }));
            return Next::Wait(self);
        }
        let filling = self.facts.follows;
        let (outcome, next) = self.own(None).await;
        let _ = reply.send(outcome.map(|took| Activated { took, filling }));
        next
    }

    async fn force(self, run: bool, reply: Reply<()>) -> Next {
        match (&self.phase, run) {
            (Phase::Receiving { .. }, _) => {
                let (call, phase) = ("force", "still receiving");
                let _ = reply.send(Err(ArrivalError::Unexpected { call, phase }));
                Next::Wait(self)
            }
            (Phase::Sealed(_), true) => {
                let (outcome, next) = self.own(Some(())).await;
                let _ = reply.send(outcome.map(drop));
                next
            }
            (Phase::Sealed(_), false) => {
                let done = self.discard("an operator gave it up", false).await;
                answer(done, (), reply)
            }
        }
    }

    /// Owns it in the journal, then runs it. `forced`: on an operator's word.
    async fn own(self, forced: Option<()>) -> (Result<Duration, ArrivalError>, Next) {
        let Phase::Sealed(held) = self.phase else {
            let (call, phase) = ("Activate", "still receiving");
            return (Err(ArrivalError::Unexpected { call, phase }), Next::Wait(self));
        };
        match sealed::own(self.facts, held, forced.is_some()).await {
            sealed::Owning::Runs(took) => (Ok(took), Next::Done),
            sealed::Owning::NeverRan(error) => (Err(error), Next::Done),
            sealed::Owning::StillSealed(facts, held, error) => (
                Err(error),
                Next::Wait(Self {
                    facts,
                    phase: Phase::Sealed(held),
                    heard: std::time::Instant::now(),
                }),
            ),
        }
    }

    /// Time has passed without a word.
    async fn tick(self) -> Next {
        match &self.phase {
            Phase::Receiving { intake, .. } => {
                // A source that says it is still at it may take its time: it may
                // be hashing, or waiting for a slow disk.
                let silent = intake.last_activity().elapsed().min(self.heard.elapsed());
                if silent < self.facts.shared.patience.idle {
                    // A source that has died gives its reservation back soon.
                    if silent > self.facts.shared.patience.ask {
                        return self.ask_source().await;
                    }
                    return Next::Wait(self);
                }
                tracing::warn!(migration = %self.migration(), "nothing arrives any more");
                match self.discard("nothing arrived for too long", false).await {
                    Ok(()) => Next::Done,
                    Err((arrival, _)) => Next::Wait(*arrival),
                }
            }
            Phase::Sealed(_) => self.ask_source().await,
        }
    }

    async fn ask_source(self) -> Next {
        match self.facts.ask().await {
            Ok(Ok(Standing::Released)) => self.own(None).await.1,
            Ok(Ok(Standing::Aborted)) => {
                match self.discard("its source will not release it", true).await {
                    Ok(()) => Next::Done,
                    Err((arrival, _)) => Next::Wait(*arrival),
                }
            }
            Ok(Ok(Standing::Pending)) => {
                Next::Wait(Self { heard: std::time::Instant::now(), ..self })
            }
            Ok(Ok(
                Standing::Sealed | Standing::Owned | Standing::Filling | Standing::Discarded,
            )) => Next::Wait(self),
            Ok(Err(error)) => {
                tracing::warn!(migration = %self.migration(), %error,
                    "a sealed copy waits and its source does not answer");
                Next::Wait(self)
            }
            Err(_) => Next::Wait(self),
        }
    }

    /// Promises never to run it and drops it. Kept if the promise can't be
    /// written, since it may have been given before; but not where the source
    /// has said that it will never release it: then nobody needs the promise.
    async fn discard(
        self,
        reason: &str,
        source_gave_up: bool,
    ) -> Result<(), (Box<Self>, ArrivalError)> {
        tracing::info!(migration = %self.migration(), reason, "arrival discarded");
        let sealed = matches!(self.phase, Phase::Sealed(_));
        let promised =
            sealed::promise(&self.facts.shared, &self.facts.identity, self.migration(), sealed)
                .await;
        if let Err(error) = promised {
            if !source_gave_up {
                return Err((Box::new(self), error.into()));
            }
            tracing::error!(migration = %self.migration(), %error,
                "that it was discarded could not be journalled");
        }
        match self.phase {
            Phase::Receiving { workload, intake } => {
                intake.close(reason);
                workload.discard().await;
            }
            Phase::Sealed(held) => held.workload.discard().await,
        }
        Ok(())
    }
}

fn answer<T>(done: Result<(), (Box<Arrival>, ArrivalError)>, value: T, reply: Reply<T>) -> Next {
    match done {
        Ok(()) => {
            let _ = reply.send(Ok(value));
            Next::Done
        }
        Err((arrival, error)) => {
            let _ = reply.send(Err(error));
            Next::Wait(*arrival)
        }
    }
}
