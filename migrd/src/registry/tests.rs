//! The registry with a workload that is only an object.

use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::migration::destination::{Host as _, identity};
use crate::migration::journal::Ownership;
use crate::workload::fake::{Census, FakeWorkload, Guest};
use crate::workload::{Address, Arriving, Manifest, NetAddress, Problem, WorkloadError};

/// Longer than any test waits.
const LONG: Duration = Duration::from_secs(600);
const NAME: &str = "web";

/// Makes nothing: the tests bring their workload. A configuration of four bytes is an
/// address in one bridge.
struct Nothing;

#[async_trait]
impl Engine for Nothing {
    fn addresses(&self, config: &[u8]) -> Vec<NetAddress> {
        let ip = <[u8; 4]>::try_from(config).ok().map(|ip| Address::Ip(ip.into()));
        let known = ip.map(|address| NetAddress { bridge: "br0".into(), address });
        known.into_iter().collect()
    }

    async fn check(&self, _: &Manifest) -> Vec<Problem> {
        Vec::new()
    }

    async fn clear(&self, _: WorkloadId) {}

    async fn prepare(&self, _: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError> {
        Err(WorkloadError::new("nothing can be made here"))
    }
}

/// What is offered, or made, with an address.
fn with_address(name: &str, address: [u8; 4]) -> Manifest {
    Manifest {
        workload: WorkloadId::random(),
        name: name.into(),
        kind: Kind::Vm,
        streams: Vec::new(),
        config: address.to_vec(),
        memory_bytes: 4096,
        cpus: 1,
        paused: false,
        created_unix_ms: 0,
        needs: Vec::new(),
        follows: false,
    }
}

/// A host with one workload, which runs.
struct Host {
    registry: Registry,
    guest: Arc<Guest>,
    _directory: tempfile::TempDir,
}

/// A host that knows nothing yet but what is in its journal.
fn over(journal: Journal) -> Registry {
    Registry::new(Setup {
        here: "a:1".into(),
        host: journal.host_id().unwrap(),
        journal,
        engines: vec![(Kind::Vm, Arc::new(Nothing) as Arc<dyn Engine>)],
        peers: Arc::new(|address| panic!("nobody is asked for {address}")),
        lanes: 1,
        shutdown: CancellationToken::new(),
    })
}

async fn host() -> Host {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(&directory.path().join("journal.redb")).unwrap();
    let registry = over(journal);
    let guest = Guest::empty(&Arc::new(Census::default()), 1);
    let identity = Identity {
        id: WorkloadId::random(),
        name: NAME.into(),
        kind: Kind::Vm,
        config: Vec::new(),
        memory_bytes: 4096,
        cpus: 1,
        created_unix_ms: 0,
    };
    registry.create(identity, Box::new(FakeWorkload(guest.clone()))).await.unwrap();
    Host { registry, guest, _directory: directory }
}

#[tokio::test]
async fn a_workload_that_is_asked_to_end_is_stopped_when_it_has_ended() {
    let host = host().await;
    let status = host.registry.ask_to_end(NAME, LONG).await.unwrap();
    assert_eq!((status.state, status.reason.as_str()), (State::Stopped, "ended when asked to"));
    let again = host.registry.ask_to_end(NAME, LONG).await.unwrap_err();
    assert!(matches!(again, RegistryError::WrongState { .. }), "{again}");
}

#[tokio::test]
async fn while_a_workload_takes_its_time_to_end_its_owner_serves_others() {
    let host = host().await;
    host.guest.takes_its_time();
    let registry = host.registry.clone();
    let asked = tokio::spawn(async move { registry.ask_to_end(NAME, LONG).await });
    let paused = host.registry.pause(NAME).await.unwrap();
    assert_eq!(paused.state, State::Paused);
    host.registry.resume(NAME).await.unwrap();
    host.guest.end("done at last");
    let status = asked.await.unwrap();
    // The end may have come before the question.
    match status {
        Ok(status) => assert_eq!(status.reason, "done at last"),
        Err(error) => assert!(matches!(error, RegistryError::WrongState { .. }), "{error}"),
    }
}

#[tokio::test]
async fn a_workload_that_has_not_ended_in_time_goes_on_and_the_user_is_told_what_to_do() {
    let host = host().await;
    host.guest.takes_its_time();
    let error = host.registry.ask_to_end(NAME, Duration::from_millis(1)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("--timeout") && text.contains("migctl stop web --force"), "{text}");
    assert!(host.guest.runs());
    assert_eq!(host.registry.find(NAME).unwrap().state, State::Running);
    let stopped = host.registry.stop(NAME).await.unwrap();
    assert_eq!(stopped.state, State::Stopped);
}

#[tokio::test]
async fn why_a_workload_has_ended_is_known_to_the_next_daemon() {
    for wish in [true, false] {
        let host = host().await;
        if wish {
            host.registry.stop(NAME).await.unwrap();
        } else {
            host.guest.end("it exited with status 3");
            let ended = |status: &Status| status.state == State::Stopped;
            host.registry.follow(NAME).unwrap().wait_for(ended).await.unwrap();
        }
        let known = host.registry.find(NAME).unwrap();
        host.registry.shut_down().await;
        let journal = host.registry.shared.journal.clone();
        let record = journal.get(known.identity.id).unwrap().unwrap();

        let next = over(journal);
        next.take_in(record, None);
        let found = next.find(NAME).unwrap();
        assert_eq!((found.state, found.reason), (State::Stopped, known.reason));
        assert!(next.resume(NAME).await.is_err());
        next.remove(NAME).await.unwrap();
    }
}

#[tokio::test]
async fn two_workloads_of_a_host_never_have_one_address() {
    let host = host().await;
    let registry = &host.registry;
    let first = with_address("first", [10, 0, 0, 5]);
    let claim = registry.claim_new(&first).unwrap();
    let again = with_address("second", [10, 0, 0, 5]);
    let refused = registry.claim_new(&again).err().unwrap();
    let text = refused.to_string();
    assert!(matches!(refused, RegistryError::AddressTaken(_)), "{text}");
    assert!(text.contains("first has the address 10.0.0.5 in the bridge br0"), "{text}");

    let guest = Guest::empty(&Arc::new(Census::default()), 1);
    registry.create(identity(&first), Box::new(FakeWorkload(guest))).await.unwrap();
    drop(claim);
    for dry_run in [true, false] {
        let refused = registry.claim(&again, MigrationId::random(), dry_run).err().unwrap();
        assert_eq!(refused.code, "address-taken");
    }
    registry.claim(&with_address("third", [10, 0, 0, 6]), MigrationId::random(), false).unwrap();
    registry.stop("first").await.unwrap();
    registry.claim_new(&again).unwrap();
}

#[tokio::test]
async fn a_workload_that_is_stopped_before_it_runs_is_never_there() {
    let host = host().await;
    let registry = &host.registry;
    let new = with_address("new", [10, 0, 0, 7]);
    let claim = registry.claim_new(&new).unwrap();
    let too_early = registry.pause("new").await.unwrap_err();
    assert!(matches!(too_early, RegistryError::NotHereYet(_)), "{too_early}");
    let stopping = registry.clone();
    let stopped = tokio::spawn(async move { stopping.stop("new").await });
    while !registry.shared.table().starting(new.workload).unwrap().called_off.is_cancelled() {
        tokio::task::yield_now().await;
    }
    let guest = Guest::empty(&Arc::new(Census::default()), 1);
    let made = registry.create(identity(&new), Box::new(FakeWorkload(guest))).await;
    let refused = made.unwrap_err();
    assert!(matches!(refused, RegistryError::CalledOff(_)), "{refused}");
    assert!(!stopped.is_finished(), "something of it is still claimed");
    drop(claim);
    let stopped = stopped.await.unwrap().unwrap();
    assert_eq!(stopped.state, State::Stopped);
    assert!(registry.find("new").is_err(), "{:?}", registry.list());
    let ownership = registry.shared.journal.get(new.workload).unwrap().unwrap().ownership;
    assert!(matches!(ownership, Ownership::Removed(_)), "{ownership:?}");
}
