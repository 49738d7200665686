//! One host of the world: what survives its daemon, and the daemon.

use super::{PAGES, World, lock};
use crate::migration::destination::{Arrivals, Claim, Host, Patience, Remembered};
use crate::migration::journal::{Journal, WorkloadRecord};
use crate::migration::link::{Blocker, Intake, LaneGate, Peer, Pull, Pulled, Standing};
use crate::migration::recovery::{Duty, duty, standing_at_source};
use crate::migration::source::released::{Released, Settled};
use crate::migration::source::serving::{Serving, not_served};
use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::workload::fake::{FakeArriving, FakeWorkload, Guest};
use crate::workload::{
    Arriving, ChunkSink, Engine, Kind, Manifest, Problem, StreamSpec, Workload, WorkloadError,
};
use async_trait::async_trait;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// One host: what survives its daemon, and the daemon.
pub struct TestHost {
    pub address: String,
    pub id: HostId,
    pub journal: Journal,
    pub(super) world: Weak<World>,
    pub guests: Mutex<HashMap<WorkloadId, Arc<Guest>>>,
    pub(super) daemon: Mutex<Option<Daemon>>,
    /// Workloads that something was set aside for.
    pub(super) arriving: Arc<Mutex<HashSet<WorkloadId>>>,
    /// Guests that are made here will refuse these.
    pub failing: Mutex<Vec<(crate::workload::fake::Op, u32)>>,
    pub never_loads: Mutex<bool>,
}

pub(super) struct Daemon {
    pub(super) serving: Serving,
    /// It has found what it has to do: before that it serves nobody.
    recovered: AtomicBool,
    pub(super) arrivals: Arrivals,
    pub(super) under_way: Mutex<Vec<MigrationId>>,
    pub(super) tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl TestHost {
    pub(super) fn world(&self) -> Arc<World> {
        self.world.upgrade().expect("the world")
    }

    pub(super) fn with_daemon<T>(&self, with: impl FnOnce(&Daemon) -> T) -> Option<T> {
        lock(&self.daemon).as_ref().map(with)
    }

    pub(super) fn arrivals(&self) -> Option<Arrivals> {
        self.with_daemon(|d| d.arrivals.clone())
    }

    /// Kills the daemon: its tasks end where they stand. Guests go on.
    pub fn die(&self) {
        if let Some(daemon) = lock(&self.daemon).take() {
            daemon.arrivals.abort_all();
            for task in lock(&daemon.tasks).drain(..) {
                task.abort();
            }
        }
    }

    /// Starts the daemon, which finds in its journal what it has to do.
    pub fn start(self: &Arc<Self>) {
        if lock(&self.daemon).is_some() {
            return;
        }
        let host: Arc<dyn Host> = Arc::new(Handle(self.clone()));
        let patience =
            Patience { idle: Duration::from_millis(400), ask: Duration::from_millis(20) };
        let arrivals = Arrivals::new(host, self.journal.clone(), Arc::new(Gate), patience);
        let daemon = Daemon {
            serving: Serving::default(),
            recovered: AtomicBool::new(false),
            arrivals: arrivals.clone(),
            under_way: Mutex::default(),
            tasks: Mutex::default(),
        };
        *lock(&self.daemon) = Some(daemon);
        let records = self.journal.all().expect("a journal");
        let known: Vec<_> = records.iter().map(|r| r.identity.id).collect();
        for record in records {
            self.recover(&arrivals, record);
        }
        self.with_daemon(|d| d.recovered.store(true, Ordering::SeqCst));
        // What no record speaks of was arriving when the daemon died.
        lock(&self.guests).retain(|id, guest| {
            let keep = known.contains(id);
            if !keep {
                guest.end("an orphan");
            }
            keep
        });
    }

    fn recover(self: &Arc<Self>, arrivals: &Arrivals, record: WorkloadRecord) {
        let id = record.identity.id;
        let guest = lock(&self.guests).get(&id).cloned();
        match duty(&record) {
            Duty::Run { paused, filling: _ } => {
                let lacks = guest.clone().and_then(|guest| FakeWorkload(guest).lacks());
                arrivals.fill(&record, lacks);
                if let Some(guest) = guest.filter(|_| !paused) {
                    guest.run();
                }
            }
            Duty::Settle(to) => {
                let workload = guest.map(|g| Box::new(FakeWorkload(g)) as Box<dyn Workload>);
                self.settle_later(Released::remembered(
                    record,
                    &to,
                    self.world().link(&self.address, &to.address),
                    self.journal.clone(),
                    workload,
                    &self.with_daemon(|d| d.serving.clone()).expect("a daemon"),
                ));
            }
            Duty::Await(_) => {
                let guest = guest.expect("the sealed copy");
                let workload = Box::new(FakeArriving(guest));
                arrivals.remember(Remembered { record, workload, claim: Box::new(()) });
            }
            Duty::Nothing => {
                if let Some(guest) = guest {
                    guest.end("not this host's");
                }
            }
        }
    }

    pub(super) fn settle_later(self: &Arc<Self>, mut released: Released) {
        let task = tokio::spawn(async move {
            let settled = released.settle(&CancellationToken::new(), |_| {}).await;
            if let (Some(Settled::Gone), Some(workload)) = (settled, released.into_workload()) {
                workload.discard().await;
            }
        });
        self.with_daemon(|d| lock(&d.tasks).push(task));
    }

    pub(super) async fn pulled(&self, pull: &Pull, asker: HostId) -> Pulled {
        let Pull { migration, workload, epoch, piece, host: _ } = *pull;
        let ready = |d: &Daemon| d.recovered.load(Ordering::SeqCst).then(|| d.serving.clone());
        let Some(serving) = self.with_daemon(ready).flatten() else {
            return Pulled::Later("it does not serve yet".into());
        };
        match serving.read(migration, asker, piece).await {
            Some(pulled) => pulled,
            None => not_served(self.standing(migration, workload, epoch)),
        }
    }

    pub(super) fn standing(
        &self,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
    ) -> Standing {
        let under_way =
            self.with_daemon(|d| lock(&d.under_way).contains(&migration)).unwrap_or(false);
        let record = self.journal.get(workload).expect("journal");
        standing_at_source(record.as_ref(), migration, epoch, under_way)
    }
}

/// A host as arrivals see it.
struct Handle(Arc<TestHost>);

struct FakeEngine(Arc<TestHost>);

#[async_trait]
impl Engine for FakeEngine {
    async fn clear(&self, id: WorkloadId) {
        lock(&self.0.guests).remove(&id);
    }

    async fn check(&self, _: &Manifest) -> Vec<Problem> {
        Vec::new()
    }

    async fn prepare(&self, manifest: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError> {
        let guest = Guest::empty(&self.0.world().census, PAGES);
        for (op, times) in lock(&self.0.failing).iter() {
            guest.failing_at(*op, *times);
        }
        if *lock(&self.0.never_loads) {
            guest.never_loads();
        }
        lock(&self.0.guests).insert(manifest.workload, guest.clone());
        Ok(Box::new(FakeArriving(guest)))
    }
}

#[async_trait]
impl Host for Handle {
    fn claim(&self, manifest: &Manifest, _: MigrationId, _: bool) -> Result<Claim, Blocker> {
        let workload = manifest.workload;
        if !lock(&self.0.arriving).insert(workload) {
            return Err(Blocker {
                code: "arriving".into(),
                message: "it is on its way here already".into(),
                remedy: String::new(),
                host: self.0.address.clone(),
            });
        }
        Ok(Box::new(Claimed { arriving: self.0.arriving.clone(), workload }))
    }

    async fn arrived(&self, _: WorkloadRecord, _: Box<dyn Workload>, _: Claim) {}

    fn engine(&self, _: Kind) -> Option<Arc<dyn Engine>> {
        Some(Arc::new(FakeEngine(self.0.clone())))
    }

    fn peer(&self, address: &str) -> Arc<dyn Peer> {
        self.0.world().link(&self.0.address, address)
    }
}

/// What was set aside for a workload, until it is dropped.
struct Claimed {
    pub(super) arriving: Arc<Mutex<HashSet<WorkloadId>>>,
    workload: WorkloadId,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        lock(&self.arriving).remove(&self.workload);
    }
}

struct Gate;

/// Counts what has arrived, like the real one.
pub(super) struct Everything {
    pub(super) since: Instant,
    pub(super) arrived: AtomicU64,
    pub(super) closed: AtomicBool,
}

#[async_trait]
impl Intake for Everything {
    async fn complete(&self, batches: &[u64]) -> Result<(), String> {
        let (sent, arrived) = (batches.iter().sum::<u64>(), self.arrived.load(Ordering::SeqCst));
        if sent == arrived { Ok(()) } else { Err(format!("{arrived} of {sent} batches arrived")) }
    }

    fn last_activity(&self) -> Instant {
        self.since
    }

    fn close(&self, _: &str) {
        self.closed.store(true, Ordering::SeqCst);
    }
}

/// Where the lanes of a migration put their pages.
type Sinks = HashMap<MigrationId, (Arc<dyn ChunkSink>, Arc<Everything>)>;
pub(super) static SINKS: Mutex<Option<Sinks>> = Mutex::new(None);

impl LaneGate for Gate {
    fn open(
        &self,
        migration: MigrationId,
        _: &[StreamSpec],
        sink: Arc<dyn ChunkSink>,
        _: u32,
    ) -> Arc<dyn Intake> {
        let (arrived, closed) = (AtomicU64::new(0), AtomicBool::new(false));
        let intake = Arc::new(Everything { since: Instant::now(), arrived, closed });
        lock(&SINKS).get_or_insert_default().insert(migration, (sink, intake.clone()));
        intake
    }
}
