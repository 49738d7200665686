//! How a workload leaves: the migration's task, what it brings back, and what
//! is done while nobody knows whose it is.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::super::{RegistryError, Status, Watching};
use super::handle::{get, put};
use super::{Active, Back, Holding, Owner};
use crate::migration::journal::Event;
use crate::migration::link::{Blocker, Peer};
use crate::migration::mode::choose;
use crate::migration::phase::{MigrationError, Mode, Outcome, Phase, Progress, Report};
use crate::migration::plan::{Question, identify};
use crate::migration::policy::approximate;
use crate::migration::policy::copies::making;
use crate::migration::source;
use crate::migration::source::released::Settled;
use crate::migration::source::{Context, End, Request};
use crate::units::{MigrationId, PAGE_SIZE};
use crate::workload::{Kind, Manifest, Workload};

/// What must have been sent for its rate to be of use, in bytes.
const LEAST: u64 = 1 << 20;
/// The rate of this much or more replaces that of less, which has more of other costs in it.
const TELLING: u64 = 1 << 24;

impl Owner {
    pub(super) async fn question(
        &mut self,
        peer: &Arc<dyn Peer>,
        request: &Request,
    ) -> Result<Question, RegistryError> {
        let workload = self.live("migrated")?;
        workload.carry(request.carry()).await?;
        let found = workload.problems().await?;
        let mode = choose(request.mode, &workload.ahead(), &workload.follows())?;
        let follows = mode.mode == Mode::Postcopy;
        let (streams, needs) = (workload.streams(), workload.needs());
        let on_disks: u64 = streams.iter().map(|s| s.used).sum();
        let identity = &self.record.identity;
        let rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let populated = get(&self.published.terminal).map_or(0, |t| t.populated_bytes());
        let fixed_cost = self.shared.fixed_cost(identity.kind).get();
        Ok(Question {
            peer: peer.clone(),
            here: self.shared.host,
            problems: found
                .into_iter()
                .map(|problem| Blocker::found_on(&self.shared.here, problem))
                .collect(),
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
                needs: Vec::new(),
                follows,
            },
            needs,
            epoch: self.record.epoch.next(),
            mode,
            lanes: self.shared.lanes,
            populated_bytes: on_disks + populated,
            files_bytes: match identity.kind {
                // Disks go by rounds, or at the stop, as memory does.
                Kind::Vm => 0,
                Kind::Process | Kind::Container => on_disks,
            },
            known_rate: rates.get(peer.address()).copied().unwrap_or(0.0),
            fixed_cost: match identity.kind {
                Kind::Vm => fixed_cost,
                _ if follows => fixed_cost,
                Kind::Process | Kind::Container => fixed_cost + making(populated / PAGE_SIZE),
            },
        })
    }

    pub(super) async fn migrate(
        &mut self,
        peer: Arc<dyn Peer>,
        request: Request,
    ) -> Result<Watching, RegistryError> {
        if self.shared.shutdown.is_cancelled() {
            return Err(RegistryError::ShuttingDown);
        }
        let question = self.question(&peer, &request).await?;
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
            mode: question.mode.clone(),
            here: self.shared.here.clone(),
            peer,
            // Known when it has said who it is, which comes first.
            peer_host: self.shared.host,
            journal: self.shared.journal.clone(),
            cancel: cancel.clone(),
            shutdown: self.shared.shutdown.clone(),
            progress,
            fixed_cost: self.shared.fixed_cost(self.record.identity.kind).clone(),
            predicted: question.predicted().map_or(Duration::ZERO, |(_, downtime)| downtime),
            serving: self.shared.serving.clone(),
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
        let shared = self.shared.clone();
        let moving = async move {
            let end = moving(question, context, workload).await;
            let report = match &end {
                End::Moved(report) | End::Kept(_, report) | End::InDoubt(_, report) => report,
            };
            let report = Arc::new(report.clone());
            put(&published.last, Some(report.clone()));
            // Before the owner can start another: its peer asks about this one.
            shared.table().under_way.remove(&id);
            // The owner first, so that whoever hears the result finds the
            // workload in the state that the result speaks of.
            let _ = back.send(Back::Migrated(Box::new(end))).await;
            (report, result)
        };
        let status = self.published.status.subscribe();
        self.shared.tasks.spawn(
            async move {
                let (report, result) = moving.await;
                announced(status, id).await;
                result.send_replace(Some(report));
            }
            .instrument(span),
        );
        Ok(watching)
    }

    pub(super) fn cancel(&mut self) -> Result<MigrationId, RegistryError> {
        let Holding::Migrating(active) = &self.holding else {
            return Err(RegistryError::NotMigrating(self.name()));
        };
        if active.watching.progress.borrow().phase >= Phase::Released {
            return Err(RegistryError::TooLate(self.name()));
        }
        active.cancel.cancel();
        Ok(active.watching.id)
    }

    pub(super) async fn force(&mut self, run_here: bool) -> Result<(), RegistryError> {
        let Holding::Settling(interrupt) = &self.holding else {
            return Err(self.wrong("forced"));
        };
        interrupt.cancel();
        let released = loop {
            match self.back.1.recv().await {
                Some(Back::Interrupted(released)) => break released,
                // It was said before it was interrupted.
                Some(Back::Unsettled(_)) => {}
                Some(other) => {
                    // It settled by itself at this very moment: nothing to force.
                    self.take_back(other).await;
                    return Err(self.wrong("forced"));
                }
                None => return Err(RegistryError::ShuttingDown),
            }
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
    pub(super) fn settle(&mut self) {
        let interrupt = CancellationToken::new();
        let settling = Holding::Settling(interrupt.clone());
        let held = std::mem::replace(&mut self.holding, settling);
        let Holding::InDoubt(mut released) = held else {
            self.holding = held;
            return;
        };
        let (back, name) = (self.back.0.clone(), self.name());
        let unsettled = self.back.0.clone();
        self.shared.tasks.spawn(async move {
            let told = |settled: &Settled| {
                match settled {
                    Settled::InDoubt(why) => tracing::warn!(workload = name, why, "in doubt"),
                    settled => tracing::debug!(workload = name, ?settled, "not settled"),
                }
                // An owner that is behind hears of it the next time.
                let _ = unsettled.try_send(Back::Unsettled(settled.clone()));
            };
            let settled = released.settle(&interrupt, told).await;
            let news = match settled {
                Some(settled) => Back::Settled(settled, released),
                None => Back::Interrupted(released),
            };
            let _ = back.send(news).await;
        });
    }

    /// How a workload stands that is not settled.
    fn unsettled(&mut self, settled: Settled) {
        self.serves = settled == Settled::Filling;
        match settled {
            Settled::InDoubt(why) => self.doubt = why,
            Settled::Filling => {
                self.doubt = "it runs there, and memory of it is still here: this host is needed \
                    until it has all"
                    .into();
            }
            Settled::Gone | Settled::TakenBack => {}
        }
    }

    pub(super) async fn take_back(&mut self, back: Back) {
        if let Back::Unsettled(settled) = back {
            self.unsettled(settled);
            return self.publish();
        }
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
                    self.serves = false;
                    self.doubt = report.failure.map_or_else(String::new, |f| f.message);
                    self.hold(Holding::InDoubt(released));
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
            Back::Settled(settled @ (Settled::InDoubt(_) | Settled::Filling), released) => {
                self.unsettled(settled);
                self.hold(Holding::InDoubt(released));
            }
            Back::Interrupted(released) => self.hold(Holding::InDoubt(released)),
            Back::Unsettled(settled) => self.unsettled(settled),
        }
    }

    fn learn_rate(&self, report: &Report) {
        let tally = &report.tally;
        let largest = tally.rounds.iter().max_by_key(|r| r.bytes);
        let (bytes, took) = match (largest, report.mode) {
            (Some(round), _) => (round.bytes, round.took),
            (None, Mode::Stop) => {
                let (bytes, memory) = (tally.lanes.bytes_on_wire, tally.downtime.memory);
                let made = match self.record.identity.kind {
                    Kind::Vm => Duration::ZERO,
                    // Which is beside the rate in a prediction.
                    Kind::Process | Kind::Container => making(bytes / PAGE_SIZE),
                };
                (bytes, memory.saturating_sub(made).max(memory / 4))
            }
            // What follows goes as it is asked for.
            (None, Mode::Precopy | Mode::Postcopy) => return,
        };
        if bytes < LEAST || report.outcome != Outcome::Completed {
            return;
        }
        let rate = approximate(bytes) / took.as_secs_f64().max(1e-6);
        let mut rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes >= TELLING {
            rates.insert(report.destination.clone(), rate);
        } else {
            rates.entry(report.destination.clone()).or_insert(rate);
        }
    }
}

/// Waits until the owner has published the end of migration `id`.
async fn announced(mut status: watch::Receiver<Status>, id: MigrationId) {
    let _ = status.wait_for(|s| s.migration != Some(id)).await;
}

/// Checks who is there, then moves it.
async fn moving(question: Question, mut context: Context, workload: Box<dyn Workload>) -> End {
    if !question.problems.is_empty() {
        let cause = MigrationError::Refused(question.problems);
        return End::Kept(workload, context.refused(&cause));
    }
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
