//! Two hosts in memory, joined by a link that can fail at any call, each of
//! which can lose its daemon at any call and start it again.

mod host;
mod link;

use crate::migration::journal::{Counterpart, Event, Identity, Journal, WorkloadRecord};
use crate::migration::link::{Offer, Peer};
use crate::migration::mode::choose;
use crate::migration::phase::{Mode, Progress, Report};
use crate::migration::recovery::{Duty, duty};
use crate::migration::source::{self, Context, End, FixedCost, Request};
use crate::units::{Epoch, HostId, MigrationId, PAGE_SIZE, WorkloadId};
use crate::workload::fake::{Census, FakeWorkload, Guest, STREAM};
use crate::workload::{Kind, Manifest, ProcessOptions, StreamSpec, Workload};
use host::{SINKS, TestHost};
use link::Link;
pub use link::{Call, Fault};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Pages of the test's workload.
pub const PAGES: u64 = 512;

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
    deaf: Mutex<bool>,
    pub cancel: CancellationToken,
    pub calls: Mutex<Vec<Call>>,
}

impl World {
    pub fn new() -> Arc<Self> {
        let world = Arc::new(Self {
            census: Arc::default(),
            hosts: Mutex::default(),
            plan: Mutex::default(),
            seen: Mutex::default(),
            cut: Mutex::new(false),
            deaf: Mutex::new(false),
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
                never_loads: Mutex::default(),
                arriving: Arc::default(),
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
        *lock(&self.deaf) = false;
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
                mode: {
                    let fake = FakeWorkload(guest.clone());
                    choose(request.mode, &fake.ahead(), &fake.follows()).expect("a mode")
                },
                here: task_host.address.clone(),
                peer: world.link(&task_host.address, &to),
                peer_host: world.host(&to).id,
                journal: task_host.journal.clone(),
                cancel: world.cancel.clone(),
                shutdown: CancellationToken::new(),
                progress: watch::Sender::new(Progress::default()),
                fixed_cost: FixedCost::default(),
                predicted: Duration::ZERO,
                serving: task_host.with_daemon(|d| d.serving.clone()).expect("a daemon"),
                lanes: 2,
            };
            let end = source::run(context, Box::new(FakeWorkload(guest))).await;
            task_host.with_daemon(|d| lock(&d.under_way).retain(|m| *m != id));
            let found = match end {
                End::Moved(report) | End::Kept(_, report) => report,
                End::InDoubt(released, report) => {
                    task_host.settle_later(*released);
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
            let unsettled =
                lock(&self.hosts).iter().flat_map(|h| h.journal.all().expect("journal")).any(|r| {
                    let settles = matches!(duty(&r), Duty::Settle(_) | Duty::Await(_));
                    settles || r.filling.is_some()
                });
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

/// What most tests ask for.
pub fn request(mode: Mode) -> Request {
    let max_downtime = Some(Duration::from_millis(50));
    let process = ProcessOptions::default();
    // What comes later can't be compared before it runs.
    let verify = mode != Mode::Postcopy;
    let mode = Some(mode);
    Request { mode, max_downtime, timeout: None, verify, copy_disks: false, process }
}

impl World {
    pub fn guest(&self, host: &str, id: WorkloadId) -> Arc<Guest> {
        lock(&self.host(host).guests).get(&id).expect("a guest").clone()
    }

    /// Guests made on `host` from now on refuse `op` so many times.
    pub fn fail_at(&self, host: &str, op: crate::workload::fake::Op, times: u32) {
        *lock(&self.host(host).failing) = vec![(op, times)];
    }

    /// Guests made on `host` from now on are never loaded to the end.
    pub fn never_loads(&self, host: &str) {
        *lock(&self.host(host).never_loads) = true;
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
            needs: Vec::new(),
            follows: false,
        };
        let offer = Offer { migration, epoch: Epoch(epoch), manifest, lanes: 2, dry_run: true };
        let from = Counterpart { migration, address: "a".into(), host: self.host("a").id };
        let arrivals = self.host("b").arrivals().expect("a daemon");
        arrivals.offer(offer, from).await.into_iter().map(|b| b.code).collect()
    }
}
