//! Two hosts in memory, joined by a link that can fail at any call, each of
//! which can lose its daemon at any call and start it again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::migration::destination::{Arrivals, Claim, Host, Patience, Remembered};
use crate::migration::journal::{Counterpart, Event, Identity, Journal, WorkloadRecord};
use crate::migration::link::{
    Blocker, Intake, LaneGate, LaneTotals, LinkError, Offer, PageLanes, Peer, PeerFacts, SealOrder,
    SealReport, Standing,
};
use crate::migration::phase::{Mode, Progress, Report};
use crate::migration::recovery::{Duty, duty, standing_at_source};
use crate::migration::source::released::{Released, Settled};
use crate::migration::source::{self, Context, End, FixedCost, Request};
use crate::units::{Epoch, HostId, MigrationId, PAGE_SIZE, PageRun, WorkloadId};
use crate::workload::fake::{Census, FakeArriving, FakeWorkload, Guest, STREAM};
use crate::workload::{
    Arriving, ChunkSink, ChunkSource, Engine, Kind, Manifest, Problem, StreamKey, StreamSpec,
    Workload, WorkloadError,
};

/// Pages of the test's workload.
pub const PAGES: u64 = 512;

/// A call over the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    Offer,
    Lanes,
    Send,
    Flush,
    Seal,
    Activate,
    Abandon,
    Resolve,
}

/// What goes wrong at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request does not arrive.
    RequestLost,
    /// The request is carried out, the answer does not arrive.
    ReplyLost,
    /// The destination's daemon dies before the request.
    TakerDiesBefore,
    /// The destination's daemon dies after the request.
    TakerDiesAfter,
    /// The source's daemon dies before the request leaves.
    GiverDiesBefore,
    /// The source's daemon dies after the request was carried out.
    GiverDiesAfter,
    /// Both die after the request.
    BothDie,
    /// From this call on the network is cut.
    Cut,
    /// The user cancels at that moment.
    Cancel,
    /// The connection is well and no answer ever comes.
    Silence,
    /// It is said to have arrived and has not.
    Swallowed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The two hosts and what connects them.
pub struct World {
    pub census: Arc<Census>,
    hosts: Mutex<Vec<Arc<TestHost>>>,
    plan: Mutex<Vec<(Call, u32, Fault)>>,
    seen: Mutex<HashMap<Call, u32>>,
    cut: Mutex<bool>,
    pub cancel: CancellationToken,
    pub calls: Mutex<Vec<Call>>,
}

/// One host: what survives its daemon, and the daemon.
pub struct TestHost {
    pub address: String,
    pub id: HostId,
    pub journal: Journal,
    world: Weak<World>,
    pub guests: Mutex<HashMap<WorkloadId, Arc<Guest>>>,
    daemon: Mutex<Option<Daemon>>,
    /// Guests that are made here will refuse these.
    pub failing: Mutex<Vec<(crate::workload::fake::Op, u32)>>,
}

struct Daemon {
    arrivals: Arrivals,
    under_way: Mutex<Vec<MigrationId>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl World {
    pub fn new() -> Arc<Self> {
        let world = Arc::new(Self {
            census: Arc::default(),
            hosts: Mutex::default(),
            plan: Mutex::default(),
            seen: Mutex::default(),
            cut: Mutex::new(false),
            cancel: CancellationToken::new(),
            calls: Mutex::default(),
        });
        for address in ["a", "b"] {
            let memory = redb::backends::InMemoryBackend::new();
            let database = redb::Database::builder().create_with_backend(memory).expect("redb");
            let host = Arc::new(TestHost {
                address: address.into(),
                id: HostId::random(),
                journal: Journal::over(database).expect("a journal"),
                world: Arc::downgrade(&world),
                guests: Mutex::default(),
                daemon: Mutex::default(),
                failing: Mutex::default(),
            });
            lock(&world.hosts).push(host.clone());
            host.start();
        }
        world
    }

    pub fn host(&self, address: &str) -> Arc<TestHost> {
        let hosts = lock(&self.hosts);
        hosts.iter().find(|h| h.address == address).expect("a host").clone()
    }

    /// Plans `fault` at the `nth` call (from 1) of that kind.
    pub fn plan(&self, call: Call, nth: u32, fault: Fault) {
        lock(&self.plan).push((call, nth, fault));
    }

    /// Whether every planned fault has happened.
    pub fn all_happened(&self) -> bool {
        lock(&self.plan).is_empty()
    }

    /// The network works and nothing more is planned.
    pub fn heal(&self) {
        lock(&self.plan).clear();
        *lock(&self.cut) = false;
    }

    /// Whether the next call of that kind is to be swallowed.
    fn next_is_swallowed(&self, call: Call) -> bool {
        let next = lock(&self.seen).get(&call).copied().unwrap_or_default() + 1;
        lock(&self.plan).contains(&(call, next, Fault::Swallowed))
    }

    /// Whether the lanes of `migration` were closed.
    pub fn lanes_are_closed(&self, migration: MigrationId) -> bool {
        let sinks = lock(&SINKS);
        let found = sinks.as_ref().and_then(|s| s.get(&migration));
        found.is_some_and(|(_, intake)| intake.closed.load(Ordering::SeqCst))
    }

    fn fault(&self, call: Call) -> Option<Fault> {
        lock(&self.calls).push(call);
        let nth = {
            let mut seen = lock(&self.seen);
            let nth = seen.entry(call).or_default();
            *nth += 1;
            *nth
        };
        let mut plan = lock(&self.plan);
        let index = plan.iter().position(|(c, n, _)| *c == call && *n == nth)?;
        Some(plan.remove(index).2)
    }

    /// A workload that runs on host `a`, writing `dirties` pages all the time.
    pub fn workload(self: &Arc<Self>, dirties: u64) -> Identity {
        let identity = Identity {
            id: WorkloadId::random(),
            name: "web".into(),
            kind: Kind::Vm,
            config: vec![1],
            memory_bytes: PAGES * PAGE_SIZE,
            cpus: 1,
            created_unix_ms: 1,
        };
        let host = self.host("a");
        host.journal.record(&identity, &Event::Created).expect("a fresh record");
        let guest = Guest::dirtying(&self.census, PAGES, dirties);
        for page in 0..PAGES / 2 {
            guest.write_page(page, u8::try_from(page % 250 + 1).expect("a byte"));
        }
        guest.run();
        lock(&host.guests).insert(identity.id, guest);
        identity
    }

    /// Sends the workload from one host to the other; `None` if the source's
    /// daemon died meanwhile.
    pub async fn migrate(
        self: &Arc<Self>,
        identity: &Identity,
        from: &str,
        to: &str,
        request: Request,
    ) -> Option<Report> {
        let host = self.host(from);
        let (report, wait) = tokio::sync::oneshot::channel();
        let (world, identity, to) = (self.clone(), identity.clone(), to.to_owned());
        let task_host = host.clone();
        let task = tokio::spawn(async move {
            let record = task_host.journal.get(identity.id).expect("journal").expect("record");
            let guest = lock(&task_host.guests).get(&identity.id).expect("a guest").clone();
            let id = MigrationId::random();
            task_host.with_daemon(|d| lock(&d.under_way).push(id));
            let context = Context {
                id,
                identity: identity.clone(),
                epoch: record.epoch,
                paused: record.paused,
                request,
                here: task_host.address.clone(),
                peer: world.link(&task_host.address, &to),
                peer_host: world.host(&to).id,
                journal: task_host.journal.clone(),
                cancel: world.cancel.clone(),
                shutdown: CancellationToken::new(),
                progress: watch::Sender::new(Progress::default()),
                fixed_cost: FixedCost::default(),
                lanes: 2,
            };
            let end = source::run(context, Box::new(FakeWorkload(guest))).await;
            task_host.with_daemon(|d| lock(&d.under_way).retain(|m| *m != id));
            let found = match end {
                End::Moved(report) | End::Kept(_, report) => report,
                End::InDoubt(released, report) => {
                    task_host.settle_later(released);
                    report
                }
            };
            let _ = report.send(found);
        });
        host.with_daemon(|d| lock(&d.tasks).push(task));
        wait.await.ok()
    }

    fn link(self: &Arc<Self>, from: &str, to: &str) -> Arc<dyn Peer> {
        let (from, to) = (self.host(from), self.host(to));
        Arc::new(Link { world: Arc::downgrade(self), from, to })
    }

    /// After everything is healed and both daemons run: exactly one guest runs
    /// in the end, and never two did.
    pub async fn assert_exactly_one_runs(self: &Arc<Self>, story: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let (now, most) = self.census.counts();
            assert!(most <= 1, "{story}: {most} ran at once");
            let owners = lock(&self.hosts)
                .iter()
                .flat_map(|h| h.journal.all().expect("journal"))
                .filter(WorkloadRecord::owned)
                .count();
            let unsettled = lock(&self.hosts)
                .iter()
                .flat_map(|h| h.journal.all().expect("journal"))
                .any(|r| matches!(duty(&r), Duty::Settle(_) | Duty::Await(_)));
            if now == 1 && owners == 1 && !unsettled {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{story}: {now} run, {owners} own it, unsettled: {unsettled}: {:?}",
                lock(&self.hosts).iter().map(|h| h.journal.all()).collect::<Vec<_>>()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl TestHost {
    fn world(&self) -> Arc<World> {
        self.world.upgrade().expect("the world")
    }

    fn with_daemon<T>(&self, with: impl FnOnce(&Daemon) -> T) -> Option<T> {
        lock(&self.daemon).as_ref().map(with)
    }

    fn arrivals(&self) -> Option<Arrivals> {
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
            Duty::Run { paused } => {
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

    fn settle_later(self: &Arc<Self>, mut released: Released) {
        let task = tokio::spawn(async move {
            let settled = released.settle(&CancellationToken::new(), |_| {}).await;
            if let (Some(Settled::Gone), Some(workload)) = (settled, released.into_workload()) {
                workload.discard().await;
            }
        });
        self.with_daemon(|d| lock(&d.tasks).push(task));
    }

    fn standing(&self, migration: MigrationId, workload: WorkloadId, epoch: Epoch) -> Standing {
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
        lock(&self.0.guests).insert(manifest.workload, guest.clone());
        Ok(Box::new(FakeArriving(guest)))
    }
}

#[async_trait]
impl Host for Handle {
    fn claim(&self, _: &Manifest, _: MigrationId, _: bool) -> Result<Claim, Blocker> {
        Ok(Box::new(()))
    }

    async fn arrived(&self, _: WorkloadRecord, _: Box<dyn Workload>, _: Claim) {}

    fn engine(&self, _: Kind) -> Option<Arc<dyn Engine>> {
        Some(Arc::new(FakeEngine(self.0.clone())))
    }

    fn peer(&self, address: &str) -> Arc<dyn Peer> {
        self.0.world().link(&self.0.address, address)
    }
}

struct Gate;

/// Counts what has arrived, like the real one.
struct Everything {
    since: Instant,
    arrived: AtomicU64,
    closed: AtomicBool,
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
static SINKS: Mutex<Option<Sinks>> = Mutex::new(None);

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

/// The way from one host to the other.
struct Link {
    world: Weak<World>,
    from: Arc<TestHost>,
    to: Arc<TestHost>,
}

impl Link {
    fn lost(&self, cause: &str) -> LinkError {
        LinkError::Lost { peer: self.to.address.clone(), cause: cause.into() }
    }

    /// Carries one call, with whatever is planned to go wrong.
    async fn carry<T>(
        &self,
        call: Call,
        work: impl Future<Output = Result<T, LinkError>>,
    ) -> Result<T, LinkError> {
        let Some(world) = self.world.upgrade() else { return Err(self.lost("the end")) };
        let fault = world.fault(call);
        // A daemon's death must not be waited for by what dies with it.
        let crash = |host: &Arc<TestHost>| host.die();
        match fault {
            Some(Fault::RequestLost) => return Err(self.lost("request lost")),
            Some(Fault::Cut) => *lock(&world.cut) = true,
            Some(Fault::TakerDiesBefore) => crash(&self.to),
            Some(Fault::GiverDiesBefore) => {
                crash(&self.from);
                tokio::task::yield_now().await;
                return Err(self.lost("died"));
            }
            Some(Fault::Cancel) => world.cancel.cancel(),
            Some(Fault::Silence) => return std::future::pending().await,
            Some(
                Fault::ReplyLost
                | Fault::TakerDiesAfter
                | Fault::GiverDiesAfter
                | Fault::BothDie
                | Fault::Swallowed,
            )
            | None => {}
        }
        if *lock(&world.cut) {
            return Err(self.lost("the network is cut"));
        }
        if self.to.arrivals().is_none() {
            return Err(self.lost("nobody listens"));
        }
        let done = work.await;
        match fault {
            Some(Fault::ReplyLost) => Err(self.lost("reply lost")),
            Some(Fault::TakerDiesAfter) => {
                crash(&self.to);
                Err(self.lost("died"))
            }
            Some(Fault::GiverDiesAfter) => {
                crash(&self.from);
                tokio::task::yield_now().await;
                done
            }
            Some(Fault::BothDie) => {
                crash(&self.to);
                crash(&self.from);
                tokio::task::yield_now().await;
                Err(self.lost("died"))
            }
            _ => done,
        }
    }

    fn taker(&self) -> Result<Arrivals, LinkError> {
        self.to.arrivals().ok_or_else(|| self.lost("nobody listens"))
    }

    /// Another daemon than the one that is meant refuses.
    fn is(&self, host: HostId) -> Result<(), LinkError> {
        if self.to.id == host { Ok(()) } else { Err(self.rejected("another host")) }
    }

    fn rejected(&self, error: impl ToString) -> LinkError {
        LinkError::Rejected { peer: self.to.address.clone(), message: error.to_string() }
    }
}

struct Lanes {
    link: Link,
    sink: Arc<dyn ChunkSink>,
    intake: Arc<Everything>,
    chunks: Arc<dyn ChunkSource>,
    totals: LaneTotals,
}

#[async_trait]
impl PageLanes for Lanes {
    async fn send(&mut self, key: StreamKey, run: PageRun) -> Result<(), LinkError> {
        let (sink, chunks) = (self.sink.clone(), self.chunks.clone());
        let swallowed = self.link.world.upgrade().is_some_and(|w| w.next_is_swallowed(Call::Send));
        let intake = self.intake.clone();
        let put = async move {
            assert_eq!(key, STREAM);
            if swallowed {
                return Ok(());
            }
            intake.arrived.fetch_add(1, Ordering::SeqCst);
            let mut bytes = vec![0; usize::try_from(run.len_bytes()).expect("small")];
            chunks.read(key, run.offset(), &mut bytes).expect("within the stream");
            sink.write(key, run.offset(), &bytes).expect("within the stream");
            Ok(())
        };
        self.link.carry(Call::Send, put).await?;
        self.totals.batches[0] += 1;
        self.totals.data_pages += run.count;
        self.totals.bytes_on_wire += run.len_bytes();
        Ok(())
    }

    async fn flush(&mut self) -> Result<LaneTotals, LinkError> {
        self.link.carry(Call::Flush, async { Ok(()) }).await?;
        Ok(self.totals.clone())
    }
}

#[async_trait]
impl Peer for Link {
    fn address(&self) -> &str {
        &self.to.address
    }

    async fn identify(&self) -> Result<PeerFacts, LinkError> {
        let (version, memory_free_bytes) = ("test".into(), 1 << 40);
        Ok(PeerFacts { host: HostId::random(), version, memory_free_bytes })
    }

    async fn offer(&self, offer: &Offer) -> Result<Vec<Blocker>, LinkError> {
        let from = Counterpart {
            migration: offer.migration,
            address: self.from.address.clone(),
            host: self.from.id,
        };
        self.carry(Call::Offer, async { Ok(self.taker()?.offer(offer.clone(), from).await) }).await
    }

    async fn lanes(
        &self,
        migration: MigrationId,
        _: &[StreamSpec],
        chunks: Arc<dyn ChunkSource>,
        lanes: u32,
    ) -> Result<Box<dyn PageLanes>, LinkError> {
        self.carry(Call::Lanes, async { Ok(()) }).await?;
        let sink = lock(&SINKS).as_ref().and_then(|s| s.get(&migration).cloned());
        let (sink, intake) = sink.ok_or_else(|| self.rejected("unknown migration"))?;
        let link = Self { world: self.world.clone(), from: self.from.clone(), to: self.to.clone() };
        let batches = vec![0; usize::try_from(lanes).expect("few")];
        let totals = LaneTotals { batches, ..LaneTotals::default() };
        Ok(Box::new(Lanes { link, sink, intake, chunks, totals }))
    }

    async fn seal(&self, order: &SealOrder) -> Result<SealReport, LinkError> {
        let work = async { self.taker()?.seal(order.clone()).await.map_err(|e| self.rejected(e)) };
        self.carry(Call::Seal, work).await
    }

    async fn activate(
        &self,
        host: HostId,
        migration: MigrationId,
        epoch: Epoch,
    ) -> Result<Duration, LinkError> {
        self.is(host)?;
        let work =
            async { self.taker()?.activate(migration, epoch).await.map_err(|e| self.rejected(e)) };
        self.carry(Call::Activate, work).await
    }

    async fn abandon(&self, migration: MigrationId, reason: &str) -> Result<(), LinkError> {
        let work = async {
            let told = self.taker()?.abandon(migration, reason.into()).await;
            told.map_err(|e| self.rejected(e))
        };
        self.carry(Call::Abandon, work).await
    }

    async fn resolve(
        &self,
        host: HostId,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
        from_source: bool,
    ) -> Result<Standing, LinkError> {
        let work = async {
            self.is(host)?;
            if from_source {
                let asked = self.taker()?.resolve(migration, workload, epoch).await;
                asked.map_err(|e| self.rejected(e))
            } else {
                Ok(self.to.standing(migration, workload, epoch))
            }
        };
        self.carry(Call::Resolve, work).await
    }
}

/// What most tests ask for.
pub fn request(mode: Mode) -> Request {
    let max_downtime = Duration::from_millis(50);
    Request { mode, max_downtime, timeout: None, verify: true, copy_disks: false }
}

impl World {
    pub fn guest(&self, host: &str, id: WorkloadId) -> Arc<Guest> {
        lock(&self.host(host).guests).get(&id).expect("a guest").clone()
    }

    /// Guests made on `host` from now on refuse `op` so many times.
    pub fn fail_at(&self, host: &str, op: crate::workload::fake::Op, times: u32) {
        *lock(&self.host(host).failing) = vec![(op, times)];
    }

    pub fn pause(&self, host: &str, identity: &Identity) {
        let guest = self.guest(host, identity.id);
        self.host(host).journal.record(identity, &Event::Paused(true)).expect("owned");
        guest.pause();
    }
}

impl World {
    /// The codes of what host `b` says to an offer in `epoch`.
    pub async fn offer_in(&self, identity: &Identity, epoch: u64) -> Vec<String> {
        let migration = MigrationId::random();
        let stream =
            StreamSpec { key: STREAM, name: "fake".into(), length: PAGES * PAGE_SIZE, used: 0 };
        let manifest = Manifest {
            workload: identity.id,
            name: identity.name.clone(),
            kind: identity.kind,
            streams: vec![stream],
            config: identity.config.clone(),
            memory_bytes: identity.memory_bytes,
            cpus: identity.cpus,
            paused: false,
            created_unix_ms: identity.created_unix_ms,
        };
        let offer = Offer { migration, epoch: Epoch(epoch), manifest, lanes: 2, dry_run: true };
        let from = Counterpart { migration, address: "a".into(), host: self.host("a").id };
        let arrivals = self.host("b").arrivals().expect("a daemon");
        arrivals.offer(offer, from).await.into_iter().map(|b| b.code).collect()
    }
}
