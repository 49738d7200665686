//! Reports on one migration until its outcome is known, also when the
//! connection to the daemon breaks on the way.

use futures::future::OptionFuture;
use migr_proto::v1::{
    self, MigrationEvent, MigrationProgress, WorkloadName, WorkloadState, migration_event::Event,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tonic::{Status, Streaming};

use crate::client::{Client, ClientError};
use crate::commands::Context;
use crate::failure::{Failure, Report, exit, note};
use crate::follow::{RETRIES, RETRY_PAUSE};
use crate::output::json::{Migration, MigrationFailure, Outcome};
use crate::output::{human, print};
use crate::progress::Display;

/// What Ctrl-C does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// The first asks for the migration to be cancelled, the second detaches.
    Cancels,
    /// It ends the reporting; the migration is somebody else's.
    Detaches,
}

/// What is known of the migration before its result.
pub struct Tracker<'a> {
    ctx: &'a Context,
    client: Client,
    /// As far as known without the daemon's result.
    known: Migration,
    interrupt: Interrupt,
    display: Display,
}

/// Why the loop over events stopped.
enum Stop {
    Result(Box<Migration>),
    Broken(String),
    Detached,
}

/// What asking again after a broken connection found.
enum Found {
    Stream(Box<Streaming<MigrationEvent>>),
    Result(Box<Migration>),
    Nothing,
}

impl<'a> Tracker<'a> {
    /// `known` names at least the workload.
    pub fn new(ctx: &'a Context, client: Client, known: Migration, interrupt: Interrupt) -> Self {
        Self { ctx, client, known, interrupt, display: Display::new(ctx.format) }
    }

    /// Reports until the end and prints the result; the exit status.
    pub async fn run(
        mut self,
        mut stream: Option<Streaming<MigrationEvent>>,
    ) -> Result<u8, Failure> {
        let mut interrupts = signal(SignalKind::interrupt()).map_err(Failure::Signals)?;
        let mut broken = "it broke before the daemon's first report".to_owned();
        loop {
            if let Some(events) = stream.take() {
                match self.follow(events, &mut interrupts).await {
                    Stop::Result(result) => return self.conclude(&result),
                    Stop::Detached => return Ok(self.detach()),
                    Stop::Broken(detail) => broken = detail,
                }
            }
            let found = tokio::select! {
                found = self.ask_again() => found,
                _ = interrupts.recv() => return Ok(self.detach()),
            };
            match found {
                Found::Stream(events) => stream = Some(*events),
                Found::Result(result) => return self.conclude(&result),
                Found::Nothing => {
                    let unknown = self.unknown(&broken);
                    return self.conclude(&unknown);
                }
            }
        }
    }

    async fn follow(
        &mut self,
        mut events: Streaming<MigrationEvent>,
        interrupts: &mut Signal,
    ) -> Stop {
        let mut cancel: Option<JoinHandle<Result<(), ClientError>>> = None;
        let mut asked = false;
        loop {
            tokio::select! {
                event = events.message() => {
                    if let Some(stop) = self.take(event) {
                        return stop;
                    }
                }
                _ = interrupts.recv() => {
                    if asked || self.interrupt == Interrupt::Detaches {
                        return Stop::Detached;
                    }
                    asked = true;
                    let format = self.ctx.format;
                    self.display.aside(|| note(format, "cancelling; Ctrl-C again to detach"));
                    cancel = Some(tokio::spawn(
                        request_cancel(self.client.clone(), self.known.workload.clone()),
                    ));
                }
                Some(answer) = OptionFuture::from(cancel.as_mut()) => {
                    cancel = None;
                    if let Ok(Err(error)) = answer {
                        let format = self.ctx.format;
                        self.display.aside(|| Failure::from(error).report(format));
                    }
                }
            }
        }
    }

    /// Takes in one message of the stream.
    fn take(&mut self, event: Result<Option<MigrationEvent>, Status>) -> Option<Stop> {
        let event = match event {
            Ok(Some(event)) => event.event?,
            Ok(None) => {
                return Some(Stop::Broken("the daemon ended its report without a result".into()));
            }
            Err(status) => {
                let error = self.client.explain("the report on the migration ended", &status);
                return Some(Stop::Broken(error.to_string()));
            }
        };
        let id = match &event {
            Event::Progress(progress) => &progress.migration_id,
            Event::Result(result) => &result.migration_id,
        };
        if self.known.migration_id.is_empty() {
            self.known.migration_id.clone_from(id);
        } else if *id != self.known.migration_id {
            return Some(Stop::Broken("the daemon reports on another migration".into()));
        }
        match event {
            Event::Progress(progress) => {
                self.show(&progress);
                None
            }
            Event::Result(result) => Some(Stop::Result(Box::new(result.into()))),
        }
    }

    fn show(&mut self, progress: &MigrationProgress) {
        self.display.show(progress);
    }

    /// The connection broke: asks the daemon what became of the migration.
    async fn ask_again(&mut self) -> Found {
        for _ in 0..RETRIES {
            tokio::time::sleep(RETRY_PAUSE).await;
            let Ok(client) = Client::connect(self.client.address(), "asking again").await else {
                continue;
            };
            let name = || WorkloadName { name: self.known.workload.clone() };
            if let Ok(reply) = client.rpc().inspect(name()).await {
                let reply = reply.into_inner();
                let superseded = self.is_another(&reply);
                if let Some(result) = self.deduce(reply) {
                    return Found::Result(Box::new(result));
                }
                if superseded {
                    return Found::Nothing;
                }
            }
            if let Ok(stream) = client.rpc().watch(name()).await {
                self.client = client;
                return Found::Stream(Box::new(stream.into_inner()));
            }
        }
        Found::Nothing
    }

    /// Whether a later migration of the workload is under way already.
    fn is_another(&self, reply: &v1::InspectReply) -> bool {
        let now = reply.workload.as_ref().map(|workload| workload.migration_id.as_str());
        let id = &self.known.migration_id;
        !id.is_empty() && now.is_some_and(|now| !now.is_empty() && now != id)
    }

    /// What the daemon's view of the workload says about this migration. Only
    /// with its id known: else it may speak of another one.
    fn deduce(&self, reply: v1::InspectReply) -> Option<Migration> {
        let id = &self.known.migration_id;
        if id.is_empty() {
            return None;
        }
        if let Some(last) = reply.last_migration.filter(|last| last.migration_id == *id) {
            return Some(last.into());
        }
        let workload = reply.workload?;
        let host = Some(self.client.address().to_owned());
        let mut known = self.known.clone();
        known.epoch = workload.epoch;
        match workload.state() {
            WorkloadState::Running | WorkloadState::Paused | WorkloadState::Stopped => {
                known.outcome = Outcome::Failed;
                let message = "the daemon no longer runs this migration; the workload is still \
                               at the source"
                    .to_owned();
                let remedy = Some("see the daemon's log, and start it again".to_owned());
                known.failure = Some(MigrationFailure { message, host, phase: None, remedy });
                Some(known)
            }
            WorkloadState::Gone => {
                known.outcome = Outcome::Completed;
                known.destination = workload.moved_to;
                Some(known)
            }
            // The last of its memory is still here.
            WorkloadState::Migrating if !workload.moved_to.is_empty() => {
                known.destination = workload.moved_to;
                let message = workload.reason;
                let phase = Some("running");
                known.failure = Some(MigrationFailure { message, host, phase, remedy: None });
                Some(known)
            }
            WorkloadState::InDoubt => {
                known.failure = Some(MigrationFailure {
                    message: workload.reason,
                    host,
                    phase: Some("released"),
                    remedy: None,
                });
                Some(known)
            }
            WorkloadState::Migrating | WorkloadState::Unspecified => None,
        }
    }

    fn unknown(&self, broken: &str) -> Migration {
        let mut known = self.known.clone();
        let host = self.client.address();
        let name = &known.workload;
        known.failure = Some(MigrationFailure {
            message: format!(
                "the daemon cannot be asked what became of the migration of {name}: {broken}"
            ),
            host: Some(host.to_owned()),
            phase: None,
            remedy: Some(format!(
                "it may go on by itself: see `migctl --host {host} inspect {name}` when the \
                 daemon answers again, and `migctl list` at the destination"
            )),
        });
        known
    }

    fn detach(self) -> u8 {
        let (host, name) = (self.client.address().to_owned(), self.known.workload);
        self.display.finish(false);
        note(
            self.ctx.format,
            &format!(
                "detached; the migration of {name} goes on. `migctl --host {host} watch {name}` \
                 shows it, `migctl --host {host} cancel {name}` stops it"
            ),
        );
        exit::DETACHED
    }

    fn conclude(self, result: &Migration) -> Result<u8, Failure> {
        self.display.finish(result.outcome == Outcome::Completed);
        conclude(self.ctx, result)
    }
}

/// Prints the result of a migration; the exit status it means.
pub fn conclude(ctx: &Context, result: &Migration) -> Result<u8, Failure> {
    let name = &result.workload;
    // What is in the way says it all, each with where it is and what to do.
    if let Some(failure) = result.failure.as_ref().filter(|_| result.blockers.is_empty()) {
        let doubt = (result.outcome == Outcome::InDoubt).then(|| {
            format!(
                "see whether {name} runs at {}; the source keeps asking. Only if you know, \
                 settle it with `migctl force {name}`",
                result.destination
            )
        });
        let message = match result.outcome {
            Outcome::InDoubt => format!("{name} is in doubt: {}", failure.message),
            Outcome::Cancelled => format!("migration of {name} cancelled: {}", failure.message),
            Outcome::Completed | Outcome::Failed => {
                format!("cannot migrate {name}: {}", failure.message)
            }
        };
        Report {
            message: &message,
            code: None,
            host: failure.host.as_deref(),
            phase: failure.phase,
            remedy: failure.remedy.as_deref().or(doubt.as_deref()),
        }
        .write(ctx.format);
    }
    for blocker in &result.blockers {
        Report {
            message: &format!("cannot migrate {name}: {}", blocker.message),
            code: Some(&blocker.code),
            host: blocker.host.as_deref(),
            phase: Some("planning"),
            remedy: blocker.remedy.as_deref(),
        }
        .write(ctx.format);
    }
    print(ctx.format, result, || human::migration(result))?;
    Ok(exit_status(result))
}

fn exit_status(result: &Migration) -> u8 {
    match result.outcome {
        Outcome::Completed => exit::DONE,
        Outcome::Cancelled => exit::CANCELLED,
        Outcome::Failed if !result.blockers.is_empty() => exit::REFUSED,
        Outcome::Failed => exit::STILL_AT_SOURCE,
        Outcome::InDoubt => exit::IN_DOUBT,
    }
}

async fn request_cancel(client: Client, name: String) -> Result<(), ClientError> {
    let doing = format!("cannot cancel the migration of {name}");
    match client.rpc().cancel(WorkloadName { name }).await {
        Ok(_) => Ok(()),
        Err(status) => Err(client.explain(&doing, &status)),
    }
}
