//! Released: the journal says that the workload is the peer's.
//!
//! The stopped copy is kept until the peer says that it runs. There is no way
//! back from here but the peer's durable promise never to run it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::copies::made_anew;
use super::stopped::fixed_part;
use super::{Context, End, Record, within};
use crate::migration::failpoint;
use crate::migration::journal::{
    Counterpart, Event, Identity, Journal, JournalError, WorkloadRecord,
};
use crate::migration::link::{Peer, Standing};
use crate::migration::phase::{Failure, Outcome, Phase};
use crate::units::{Epoch, HostId, MigrationId};
use crate::workload::Workload;

/// How long the peer has to answer one call.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// How long the user waits before the outcome is called in doubt.
const DOUBT_AFTER: Duration = Duration::from_secs(10);
/// The pause between two questions, at first and at most.
const ASK_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

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
    since: Instant,
    resume: Duration,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The peer owns it.
    Gone,
    /// The peer will never run it: it is this host's again.
    TakenBack,
    /// Nobody knows: why.
    InDoubt(String),
}

/// What the peer said.
enum Answer {
    /// It owns it.
    Taken,
    /// It will never run it.
    Never,
    /// Nothing that decides: why.
    None(String),
}

impl Released {
    pub(super) fn new(
        context: &Context,
        workload: Option<Box<dyn Workload>>,
        since: Instant,
    ) -> Self {
        Self {
            migration: context.id,
            identity: context.identity.clone(),
            epoch: context.epoch.next(),
            paused: context.paused,
            peer: context.peer.clone(),
            host: context.peer_host,
            journal: context.journal.clone(),
            workload,
            since,
            resume: Duration::ZERO,
        }
    }

    /// As the journal remembers it after a restart of the daemon; `workload`
    /// is the stopped copy, if it still lives.
    #[must_use]
    pub fn remembered(
        record: WorkloadRecord,
        to: &Counterpart,
        peer: Arc<dyn Peer>,
        journal: Journal,
        workload: Option<Box<dyn Workload>>,
    ) -> Self {
        let WorkloadRecord { identity, epoch, paused, .. } = record;
        let (migration, host) = (to.migration, to.host);
        let (since, resume) = (Instant::now(), Duration::ZERO);
        Self { migration, identity, epoch, paused, peer, host, journal, workload, since, resume }
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

    /// Tells and asks the peer until it has answered, however long that takes.
    /// `tell` hears why it is still in doubt. `None` after `interrupt`, which
    /// cuts short questions and pauses, but never what follows from an answer:
    /// the journal and the workload would part.
    pub async fn settle(
        &mut self,
        interrupt: &CancellationToken,
        mut tell: impl FnMut(&str) + Send,
    ) -> Option<Settled> {
        let mut pause = ASK_PAUSE.0;
        loop {
            let answer = interrupt.run_until_cancelled(self.ask()).await?;
            match self.follow(answer).await {
                Settled::InDoubt(why) => tell(&why),
                settled @ (Settled::Gone | Settled::TakenBack) => return Some(settled),
            }
            interrupt.run_until_cancelled(tokio::time::sleep(pause)).await?;
            pause = (pause * 2).min(ASK_PAUSE.1);
        }
    }

    /// One attempt: Activate, and if that gives no plain yes, Resolve.
    async fn ask(&self) -> Answer {
        let activate = self.peer.activate(self.host, self.migration, self.epoch);
        let failed = match within(&self.peer, ANSWER_WAIT, activate).await {
            Ok(_) => return Answer::Taken,
            Err(error) => error,
        };
        let asked =
            self.peer.resolve(self.host, self.migration, self.identity.id, self.epoch, true);
        match within(&self.peer, ANSWER_WAIT, asked).await {
            Ok(Standing::Owned) => Answer::Taken,
            Ok(Standing::Discarded) => Answer::Never,
            Ok(standing) => Answer::None(format!("{failed}; it says {standing:?}")),
            Err(error) => Answer::None(error.to_string()),
        }
    }

    /// Does what the peer's answer asks for.
    async fn follow(&mut self, answer: Answer) -> Settled {
        match answer {
            Answer::Taken => {
                self.resume = self.since.elapsed();
                self.confirmed().await
            }
            Answer::Never => self.take_back().await,
            Answer::None(why) => Settled::InDoubt(why),
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
        let (epoch, peer) = (self.epoch, self.peer.address().to_owned());
        match settled {
            Settled::Gone => {
                let made = made_anew(self.identity.kind, &run.tally);
                let seen = fixed_part(&run.tally.downtime).saturating_sub(made);
                run.context.fixed_cost.learn(seen);
                run.context.progress.send_modify(|p| p.phase = Phase::Running);
                let report = run.report(Outcome::Completed, epoch, None);
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
                End::InDoubt(self, report)
            }
        }
    }
}
