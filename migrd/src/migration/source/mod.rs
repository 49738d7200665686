//! The giving side: one file a phase, each a type whose transitions consume it.
//!
//! On `Ok` the phase is reached; on `Err` the workload runs again here, nothing
//! is left at the destination that could run, and [`Aborted`] gives it back.
//! Only [`released::Released`] can't abort.

mod copies;
mod files;
mod offered;
mod precopy;
pub mod released;
pub mod serving;
mod stopped;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::migration::failpoint;
use crate::migration::journal::{Counterpart, Identity, Journal};
use crate::migration::link::{LaneTotals, LinkError, PageLanes, Peer};
use crate::migration::mode::Chosen;
use crate::migration::phase::{
    Failure, MigrationError, Mode, Outcome, Phase, Progress, Report, Tally,
};
use crate::pages::PageSet;
use crate::units::{Epoch, HostId, MigrationId};
use crate::workload::{Carry, ProcessOptions, RunState, Workload};

use released::{Released, Settled};
use serving::{Serves, Serving};

/// How long an abort waits for the peer to hear of it. The peer finds out by
/// itself if it does not.
const ABANDON_WAIT: Duration = Duration::from_secs(2);

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How memory shall move; `None`: the best way that the workload has.
    pub mode: Option<Mode>,
    /// The longest the workload may stand still by prediction; `None`: what is usual
    /// for its kind.
    pub max_downtime: Option<Duration>,
    /// The longest until the workload is stopped.
    pub timeout: Option<Duration>,
    /// Compare hashes of all streams while it stands still.
    pub verify: bool,
    /// Its disks travel with it.
    pub copy_disks: bool,
    /// What may be done to a process tree.
    pub process: ProcessOptions,
}

impl Request {
    /// What of the workload travels, and what may be done to it for that.
    #[must_use]
    pub fn carry(&self) -> Carry {
        let (disks, verify, process) = (self.copy_disks, self.verify, self.process);
        let follows = self.mode == Some(Mode::Postcopy);
        Carry { disks, verify, process, follows, ..Carry::default() }
    }
}

/// What a stop costs besides memory, learned from stops done by this daemon.
#[derive(Clone)]
pub struct FixedCost(Arc<Mutex<Duration>>);

impl Default for FixedCost {
    fn default() -> Self {
        Self::about(Duration::from_millis(8))
    }
}

impl FixedCost {
    /// Takes it for so much until a stop was seen.
    #[must_use]
    pub fn about(cost: Duration) -> Self {
        Self(Arc::new(Mutex::new(cost)))
    }

    /// The estimate.
    #[must_use]
    pub fn get(&self) -> Duration {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Learns from a stop that cost `seen` besides memory. One that took very
    /// long for reasons of its own counts only in part: an estimate above the
    /// user's limit would keep every later stop, and all learning, from happening.
    pub fn learn(&self, seen: Duration) {
        let mut cost = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *cost = (*cost * 3 + seen.min(*cost * 2)) / 4;
    }
}

/// Everything a migration needs besides the workload.
pub struct Context {
    /// The migration.
    pub id: MigrationId,
    /// The workload.
    pub identity: Identity,
    /// The epoch this host owns it in.
    pub epoch: Epoch,
    /// It is paused and stays so.
    pub paused: bool,
    /// What was asked for.
    pub request: Request,
    /// How memory moves.
    pub mode: Chosen,
    /// This host's address.
    pub here: String,
    /// The destination.
    pub peer: Arc<dyn Peer>,
    /// Who the destination said it is.
    pub peer_host: HostId,
    /// This host's journal.
    pub journal: Journal,
    /// Cancels it.
    pub cancel: CancellationToken,
    /// The daemon is going down.
    pub shutdown: CancellationToken,
    /// Told how far it is.
    pub progress: watch::Sender<Progress>,
    /// What stops cost on this host.
    pub fixed_cost: FixedCost,
    /// How long it is to stand still if nothing goes ahead; zero: nothing to that host was
    /// measured yet.
    pub predicted: Duration,
    /// Where memory is served that stays here.
    pub serving: Serving,
    /// How many lanes to use.
    pub lanes: u32,
}

impl Context {
    /// The report of a migration that ended before anything was touched.
    #[must_use]
    pub fn refused(self, cause: &MigrationError) -> Report {
        Record { context: self, tally: Tally::new() }.report_failure(cause, Phase::Planning)
    }

    fn counterpart(&self) -> Counterpart {
        Counterpart {
            migration: self.id,
            address: self.peer.address().to_owned(),
            host: self.peer_host,
        }
    }
}

/// The workload runs here, as before the migration; why it did not move.
pub struct Aborted {
    /// The workload.
    pub workload: Box<dyn Workload>,
    cause: MigrationError,
    phase: Phase,
    run: Record,
}

/// What outlives the phases: for the report.
struct Record {
    context: Context,
    tally: Tally,
}

/// How a migration ended, with the workload where there still is one.
pub enum End {
    /// It runs at the destination; nothing of it is left here.
    Moved(Report),
    /// It is here as before.
    Kept(Box<dyn Workload>, Report),
    /// It was given away and the peer can't be reached. It stands still here.
    InDoubt(Box<Released>, Report),
}

/// Moves `workload` to the peer.
pub async fn run(context: Context, workload: Box<dyn Workload>) -> End {
    match phases(context, workload).await {
        Err(aborted) => {
            let Aborted { workload, cause, phase, run } = aborted;
            let report = run.report_failure(&cause, phase);
            End::Kept(workload, report)
        }
        Ok((released, settled, run)) => released.end(settled, run).await,
    }
}

async fn phases(
    context: Context,
    workload: Box<dyn Workload>,
) -> Result<(Released, Settled, Record), Aborted> {
    let offered = offered::Offered::make(Run::new(context, workload)).await?;
    let copied = offered.precopy().await?;
    let stopped = copied.stop().await?;
    let sealed = stopped.seal().await?;
    let (mut released, mut run) = sealed.release().await?;
    let mut settled = released.settle_soon().await;
    if settled == Settled::Filling {
        settled = released.serve_the_rest(&mut run).await;
    }
    Ok((released, settled, run))
}

/// A migration that can still be aborted.
struct Run {
    record: Record,
    workload: Box<dyn Workload>,
    state: watch::Receiver<RunState>,
    deadline: Option<Instant>,
    lanes: Option<Box<dyn PageLanes>>,
    offered: bool,
    tracking: bool,
    /// Its devices were drained, or it was frozen.
    held: bool,
    /// Memory that stays here until the peer asks for it.
    serves: Option<Serves>,
    phase: Phase,
}

impl Run {
    fn new(context: Context, workload: Box<dyn Workload>) -> Self {
        let deadline = context.request.timeout.map(|t| Instant::now() + t);
        let state = workload.state();
        Self {
            record: Record { context, tally: Tally::new() },
            workload,
            state,
            deadline,
            lanes: None,
            offered: false,
            tracking: false,
            held: false,
            serves: None,
            phase: Phase::Planning,
        }
    }

    fn context(&self) -> &Context {
        &self.record.context
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        tracing::info!(%phase, "migration phase");
        self.record.context.progress.send_modify(|p| p.phase = phase);
        failpoint::reach(format_args!("source-{phase}"));
    }

    /// What may cut a wait short.
    fn interrupt(&self) -> Interrupt {
        Interrupt {
            cancel: self.context().cancel.clone(),
            shutdown: self.context().shutdown.clone(),
            deadline: self.deadline,
            timeout: self.context().request.timeout.unwrap_or_default(),
            state: self.state.clone(),
        }
    }

    /// Makes the workload run again and tells the peer; never fails.
    async fn abort(mut self, cause: MigrationError) -> Aborted {
        tracing::warn!(phase = %self.phase, error = %cause, "migration aborted");
        if let Some(lanes) = self.lanes.take() {
            drop(lanes);
        }
        self.serves = None;
        if self.held
            && let Err(error) = self.workload.thaw().await
        {
            tracing::error!(%error, "the workload could not be set running again");
        }
        if self.tracking
            && let Err(error) = self.workload.stop_tracking().await
        {
            tracing::warn!(%error, "page tracking could not be switched off");
        }
        if self.offered {
            let reason = cause.to_string();
            let told = self.context().peer.abandon(self.context().id, &reason);
            match tokio::time::timeout(ABANDON_WAIT, told).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::info!(%error, "the peer could not be told"),
                Err(_) => tracing::info!("the peer could not be told in time"),
            }
        }
        Aborted { workload: self.workload, cause, phase: self.phase, run: self.record }
    }

    /// Aborts with whatever `result` says, or gives its value.
    async fn or_abort<T, E: Into<MigrationError>>(
        self,
        result: Result<T, E>,
    ) -> Result<(Self, T), Aborted> {
        match result {
            Ok(value) => Ok((self, value)),
            Err(error) => Err(self.abort(error.into()).await),
        }
    }
}

/// How long the end of a workload may take to be heard of once its memory is gone.
const END_HEARD: Duration = Duration::from_secs(1);

/// Ends a wait early: cancelled, timed out, or the workload has ended.
struct Interrupt {
    cancel: CancellationToken,
    shutdown: CancellationToken,
    deadline: Option<Instant>,
    timeout: Duration,
    state: watch::Receiver<RunState>,
}

impl Interrupt {
    async fn guard<T, E: Into<MigrationError>>(
        &mut self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, MigrationError> {
        let deadline = self.deadline;
        let late = async move {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(MigrationError::Cancelled),
            () = self.shutdown.cancelled() => Err(MigrationError::ShuttingDown),
            reason = ended(&mut self.state) => Err(MigrationError::Ended(reason)),
            () = late => Err(MigrationError::TimedOut(self.timeout)),
            done = work => match done.map_err(Into::into) {
                Err(error @ MigrationError::Link(LinkError::Source(_))) => {
                    // Memory that is not there any more is that of a workload that has ended,
                    // which may be heard of a moment later.
                    match tokio::time::timeout(END_HEARD, ended(&mut self.state)).await {
                        Ok(reason) => Err(MigrationError::Ended(reason)),
                        Err(_) => Err(error),
                    }
                }
                done => done,
            },
        }
    }
}

/// `call`, for at most `wait`. A peer whose connection is well and which never
/// answers must not hold the workload for ever.
async fn within<T>(
    peer: &Arc<dyn Peer>,
    wait: Duration,
    call: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    match tokio::time::timeout(wait, call).await {
        Ok(answer) => answer,
        Err(_) => Err(LinkError::Lost {
            peer: peer.address().to_owned(),
            cause: format!("no answer within {wait:?}"),
        }),
    }
}

async fn ended(state: &mut watch::Receiver<RunState>) -> String {
    loop {
        if let RunState::Ended(reason) = &*state.borrow_and_update() {
            return reason.clone();
        }
        if state.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Queues every page of `pages`.
async fn send_pages(lanes: &mut dyn PageLanes, pages: &PageSet) -> Result<(), LinkError> {
    for (key, bitmap) in pages.iter() {
        for run in bitmap.runs() {
            lanes.send(key, run).await?;
        }
    }
    Ok(())
}

/// What `after` carried that `before` had not.
fn data_bytes(before: &LaneTotals, after: &LaneTotals) -> u64 {
    after.bytes_on_wire.saturating_sub(before.bytes_on_wire)
}

impl Record {
    fn report(self, outcome: Outcome, epoch: Epoch, failure: Option<Failure>) -> Report {
        let Self { context, tally } = self;
        Report {
            migration: context.id,
            workload: context.identity.name,
            mode: context.mode.mode,
            mode_reason: context.mode.why,
            outcome,
            source: context.here,
            destination: context.peer.address().to_owned(),
            epoch,
            total: tally.started.elapsed(),
            tally,
            failure,
            blockers: Vec::new(),
        }
    }

    fn report_failure(self, cause: &MigrationError, phase: Phase) -> Report {
        let outcome = match cause {
            MigrationError::Cancelled => Outcome::Cancelled,
            _ => Outcome::Failed,
        };
        let host = match cause {
            MigrationError::Link(_) | MigrationError::NotVerified => {
                self.context.peer.address().to_owned()
            }
            _ => self.context.here.clone(),
        };
        let failure = Failure { message: cause.to_string(), host, phase, remedy: cause.remedy() };
        let blockers = match cause {
            MigrationError::Refused(blockers) => blockers.clone(),
            _ => Vec::new(),
        };
        let epoch = self.context.epoch;
        Report { blockers, ..self.report(outcome, epoch, Some(failure)) }
    }
}
