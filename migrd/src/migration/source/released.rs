//! Released: the journal says that the workload is the peer's.
//!
//! The stopped copy is kept until the peer says that it runs. There is no way
//! back from here but the peer's durable promise never to run it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::copies::made_anew;
use super::serving::{Serves, Serving};
use super::stopped::fixed_part;
use super::{Context, End, Record, within};
use crate::migration::failpoint;
use crate::migration::journal::{
    Counterpart, Event, Identity, Journal, JournalError, WorkloadRecord,
};
use crate::migration::link::{Activated, Peer, Standing};
use crate::migration::phase::{Failure, Outcome, Phase};
use crate::units::{Epoch, HostId, MigrationId, PAGE_SIZE};
use crate::workload::Workload;

/// How long the peer has to answer one call.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// How long the user waits before the outcome is called in doubt.
const DOUBT_AFTER: Duration = Duration::from_secs(10);
/// The pause between two questions, at first and at most.
const ASK_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// The same while the peer takes what of memory is here.
const SERVE_PAUSE: Duration = Duration::from_millis(50);

/// A workload that was given away and whose new owner has not confirmed.
pub struct Released {
    migration: MigrationId,
    identity: Identity,
    /// The epoch the peer owns it in, if it does.
    epoch: Epoch,
    paused: bool,
    peer: Arc<dyn Peer>,
    host: HostId,
    journal: Journal,
    workload: Option<Box<dyn Workload>>,
    /// Memory of it that the peer may ask for.
    serves: Option<Serves>,
    since: Instant,
    resume: Duration,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The peer owns it, and has everything.
    Gone,
    /// The peer owns it and runs it, and memory of it is still here: this copy is needed.
    Filling,
    /// The peer will never run it: it is this host's again.
    TakenBack,
    /// Nobody knows: why.
    InDoubt(String),
}

/// What the peer said.
enum Answer {
    /// It owns it.
    Taken,
    /// It owns it, and still takes memory from here.
    Filling,
    /// It will never run it.
    Never,
    /// Nothing that decides: why.
    None(String),
}

impl Released {
    pub(super) fn new(
        context: &Context,
        workload: Option<Box<dyn Workload>>,
        serves: Option<Serves>,
        since: Instant,
    ) -> Self {
        if let Some(serves) = &serves {
            serves.is_released();
        }
        Self {
            migration: context.id,
            identity: context.identity.clone(),
            epoch: context.epoch.next(),
            paused: context.paused,
            peer: context.peer.clone(),
            host: context.peer_host,
            journal: context.journal.clone(),
            workload,
            serves,
            since,
            resume: Duration::ZERO,
        }
    }

    /// As the journal remembers it after a restart of the daemon; `workload`
    /// is the stopped copy, if it still lives. Its memory is served again.
    #[must_use]
    pub fn remembered(
        record: WorkloadRecord,
        to: &Counterpart,
        peer: Arc<dyn Peer>,
        journal: Journal,
        workload: Option<Box<dyn Workload>>,
        serving: &Serving,
    ) -> Self {
        let memory = workload.as_ref().and_then(|workload| workload.left_behind());
        let serves = memory.map(|memory| serving.serve(to.migration, to.host, memory));
        serves.iter().for_each(Serves::is_released);
        let WorkloadRecord { identity, epoch, paused, .. } = record;
        let (migration, host) = (to.migration, to.host);
        let (since, resume) = (Instant::now(), Duration::ZERO);
        Self {
            migration,
            identity,
            epoch,
            paused,
            peer,
            host,
            journal,
            workload,
            serves,
            since,
            resume,
        }
    }

    /// Tells and asks the peer until it has answered, or for as long as a user
    /// would wait.
    pub(super) async fn settle_soon(&mut self) -> Settled {
        let deadline = Instant::now() + DOUBT_AFTER;
        let mut pause = ASK_PAUSE.0;
        loop {
            let answer = self.ask().await;
            let settled = self.follow(answer).await;
            if !matches!(settled, Settled::InDoubt(_)) || Instant::now() >= deadline {
                return settled;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_PAUSE.1);
        }
    }

    /// The peer runs it: serves what of its memory is still here, and tells how much that
    /// was, until the peer has all. Ends before that with the daemon, and when the peer is
    /// not heard of for as long as a user would wait; it is served all the same.
    pub(super) async fn serve_the_rest(&mut self, run: &mut Record) -> Settled {
        run.context.progress.send_modify(|p| p.phase = Phase::Running);
        tracing::info!("it runs at the peer and takes the rest of its memory from here");
        let shutdown = run.context.shutdown.clone();
        let (before, all) = (run.context.progress.borrow().sent, self.left_bytes());
        let mut heard = Instant::now();
        loop {
            let waited = shutdown.run_until_cancelled(tokio::time::sleep(SERVE_PAUSE)).await;
            if waited.is_none() {
                return Settled::Filling;
            }
            let served = self.serves.as_ref().map_or(0, Serves::pages) * PAGE_SIZE;
            run.context.progress.send_modify(|progress| {
                progress.sent = before + served;
                progress.remaining = all.saturating_sub(served);
            });
            let Some(answer) = shutdown.run_until_cancelled(self.resolve()).await else {
                return Settled::Filling;
            };
            match answer {
                Answer::Filling => heard = Instant::now(),
                // It goes on when the peer is back; a user is not to wait for that.
                Answer::None(why) if heard.elapsed() >= DOUBT_AFTER => {
                    return Settled::InDoubt(format!(
                        "it runs there and takes the rest of its memory from here; {why}"
                    ));
                }
                Answer::None(why) => tracing::debug!(why, "the peer does not answer"),
                answer @ (Answer::Taken | Answer::Never) => {
                    let settled = self.follow(answer).await;
                    if !matches!(settled, Settled::InDoubt(_)) {
                        return settled;
                    }
                }
            }
        }
    }

    fn left_bytes(&self) -> u64 {
        self.serves.as_ref().map_or(0, Serves::bytes)
    }

    /// Tells and asks the peer until it has answered, however long that takes.
    /// `tell` hears how it stands as long as it is not settled. `None` after `interrupt`, which
    /// cuts short questions and pauses, but never what follows from an answer:
    /// the journal and the workload would part.
    pub async fn settle(
        &mut self,
        interrupt: &CancellationToken,
        mut tell: impl FnMut(&Settled) + Send,
    ) -> Option<Settled> {
        let mut pause = ASK_PAUSE.0;
        loop {
            let answer = interrupt.run_until_cancelled(self.ask()).await?;
            let settled = self.follow(answer).await;
            let wait = match settled {
                Settled::InDoubt(_) => pause,
                Settled::Filling => ASK_PAUSE.0,
                Settled::Gone | Settled::TakenBack => return Some(settled),
            };
            tell(&settled);
            interrupt.run_until_cancelled(tokio::time::sleep(wait)).await?;
            pause = (wait * 2).min(ASK_PAUSE.1);
        }
    }

    /// One attempt: Activate, and if that gives no plain yes, Resolve.
    async fn ask(&self) -> Answer {
        let activate = self.peer.activate(self.host, self.migration, self.epoch);
        let failed = match within(&self.peer, ANSWER_WAIT, activate).await {
            Ok(Activated { filling: true, .. }) => return Answer::Filling,
            Ok(Activated { filling: false, .. }) => return Answer::Taken,
            Err(error) => error,
        };
        match self.resolve().await {
            Answer::None(why) => Answer::None(format!("{failed}; {why}")),
            answer => answer,
        }
    }

    /// How it stands at the peer.
    async fn resolve(&self) -> Answer {
        let asked =
            self.peer.resolve(self.host, self.migration, self.identity.id, self.epoch, true);
        match within(&self.peer, ANSWER_WAIT, asked).await {
            Ok(Standing::Owned) => Answer::Taken,
            Ok(Standing::Filling) => Answer::Filling,
            Ok(Standing::Discarded) => Answer::Never,
            Ok(standing) => Answer::None(format!("it says {standing:?}")),
            Err(error) => Answer::None(error.to_string()),
        }
    }

    /// Does what the peer's answer asks for.
    async fn follow(&mut self, answer: Answer) -> Settled {
        match answer {
            Answer::Taken => {
                self.runs_there();
                self.confirmed().await
            }
            Answer::Filling => {
                self.runs_there();
                Settled::Filling
            }
            Answer::Never => self.take_back().await,
            Answer::None(why) => Settled::InDoubt(why),
        }
    }

    /// Notes when the peer was first known to run it.
    fn runs_there(&mut self) {
        if self.resume.is_zero() {
            self.resume = self.since.elapsed();
        }
    }

    async fn confirmed(&mut self) -> Settled {
        failpoint::reach(format_args!("source-activated"));
        match self.journal(Event::Confirmed(self.migration)).await {
            Ok(()) => Settled::Gone,
            Err(error) => {
                // The peer runs it, so nothing is at stake but this host's
                // memory of that: it will ask again after a restart.
                tracing::error!(%error, "the peer's confirmation could not be journalled");
                Settled::Gone
            }
        }
    }

    async fn take_back(&mut self) -> Settled {
        self.serves = None;
        if let Err(error) = self.journal(Event::TakenBack(self.migration)).await {
            return Settled::InDoubt(error.to_string());
        }
        if let Some(workload) = &mut self.workload {
            if let Err(error) = workload.thaw().await {
                tracing::error!(%error, "the workload could not be set running again");
            }
            if let Err(error) = workload.stop_tracking().await {
                tracing::warn!(%error, "page tracking could not be switched off");
            }
        }
        Settled::TakenBack
    }

    async fn journal(&self, event: Event) -> Result<(), JournalError> {
        let (journal, identity) = (self.journal.clone(), self.identity.clone());
        let written =
            tokio::task::spawn_blocking(move || journal.record(&identity, &event).map(drop));
        written.await.unwrap_or_else(|_| Err(JournalError::Damaged(self.identity.name.clone())))
    }

    /// The workload, after the matter was settled or an operator decided it.
    #[must_use]
    pub fn into_workload(self) -> Option<Box<dyn Workload>> {
        self.workload
    }

    /// Whether it was paused when it was given away.
    #[must_use]
    pub fn paused(&self) -> bool {
        self.paused
    }

    pub(super) async fn end(self, settled: Settled, mut run: Record) -> End {
        run.tally.downtime.resume = self.resume;
        run.tally.after_switch = self.serves.as_ref().map_or(0, Serves::pages);
        let (epoch, peer) = (self.epoch, self.peer.address().to_owned());
        match settled {
            Settled::Gone => {
                let made = made_anew(self.identity.kind, &run.tally);
                let seen = fixed_part(&run.tally.downtime).saturating_sub(made);
                run.context.fixed_cost.learn(seen);
                run.context.progress.send_modify(|p| p.phase = Phase::Running);
                let report = match self.serves.as_ref().and_then(Serves::lost) {
                    None => run.report(Outcome::Completed, epoch, None),
                    Some(why) => {
                        let failure = lost_on_the_way(&peer, &why);
                        run.report(Outcome::InDoubt, epoch, Some(failure))
                    }
                };
                if let Some(workload) = self.workload {
                    workload.discard().await;
                }
                End::Moved(report)
            }
            Settled::TakenBack => {
                let failure = Failure {
                    message: format!(
                        "{peer} could not run it and has promised never to; it runs here again"
                    ),
                    host: peer.clone(),
                    phase: Phase::Released,
                    remedy: format!("see the log of the migrd at {peer}"),
                };
                let report = run.report(Outcome::Failed, epoch.next(), Some(failure));
                match self.workload {
                    Some(workload) => End::Kept(workload, report),
                    None => End::Moved(report),
                }
            }
            Settled::Filling => {
                let failure = Failure {
                    message: format!(
                        "it runs at {peer}, and memory of it is still here: it stands still there \
                         where it lacks that, until this migrd is back"
                    ),
                    host: run.context.here.clone(),
                    phase: Phase::Running,
                    remedy: "start this migrd again, and keep both hosts up until it is done"
                        .to_owned(),
                };
                let report = run.report(Outcome::InDoubt, epoch, Some(failure));
                End::InDoubt(Box::new(self), report)
            }
            Settled::InDoubt(why) => {
                let failure = Failure {
                    message: format!("given to {peer}, which has not confirmed: {why}"),
                    host: peer.clone(),
                    phase: Phase::Released,
                    remedy: format!(
                        "bring {peer} back: this migrd keeps asking it and settles by itself; if \
                         {peer} is lost for good, `migctl force {} --run-here`",
                        self.identity.name
                    ),
                };
                let report = run.report(Outcome::InDoubt, epoch, Some(failure));
                End::InDoubt(Box::new(self), report)
            }
        }
    }
}

/// Memory that was still here when it ran at the peer is gone, and so is the workload.
fn lost_on_the_way(peer: &str, why: &str) -> Failure {
    Failure {
        message: format!(
            "it ran at {peer}, and was ended there, since the rest of its memory can't be given \
             any more: {why}"
        ),
        host: peer.to_owned(),
        phase: Phase::Running,
        remedy: "start it anew; until all its memory has followed both hosts are needed".into(),
    }
}
