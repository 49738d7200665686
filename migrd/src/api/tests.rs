//! The control service with workloads that are only objects.

use std::sync::Arc;

use async_trait::async_trait;
use migr_proto::v1 as proto;
use migr_proto::v1::control_server::Control;
use migr_proto::v1::peer_server::Peer;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::{ControlService, PeerService};
use crate::migration::destination::{Arrivals, Patience};
use crate::migration::journal::Journal;
use crate::registry::{Registry, Setup};
use crate::units::{HostId, MigrationId, PAGE_SIZE, WorkloadId};
use crate::wire::Peers;
use crate::wire::receive::LaneDirectory;
use crate::workload::fake::{Census, FakeWorkload, Guest};
use crate::workload::process::{Candidate, Starts};
use crate::workload::vm::{Site, VmEngine};
use crate::workload::{LeftMemory, Piece, Problem, Workload, WorkloadError};

/// Starts guests instead of commands.
struct Guests {
    guest: Arc<Guest>,
    problem: Option<String>,
}

#[async_trait]
impl Starts for Guests {
    async fn create(
        &self,
        _: WorkloadId,
        name: &str,
        config: &proto::ProcessConfig,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        assert_eq!(name, "job");
        if config.argv == ["missing"] {
            return Err(WorkloadError::new("there is no program missing"));
        }
        Ok(Box::new(FakeWorkload(self.guest.clone())))
    }

    async fn adopt(
        &self,
        _: WorkloadId,
        candidate: &Candidate,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        assert_eq!(candidate.problems, []);
        Ok(Box::new(FakeWorkload(self.guest.clone())))
    }

    fn rootfs_of(&self, _: WorkloadId) -> Option<std::path::PathBuf> {
        None
    }

    fn problem(&self) -> Option<String> {
        self.problem.clone()
    }

    fn version(&self) -> Option<String> {
        Some("4.2".into())
    }
}

struct Daemon {
    control: ControlService,
    peer: PeerService,
    registry: Registry,
    guest: Arc<Guest>,
    directory: tempfile::TempDir,
}

/// A daemon whose process trees are started by what `starts` makes of a guest.
fn daemon(starts: impl FnOnce(Arc<Guest>) -> Option<Arc<dyn Starts>>) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(&directory.path().join("journal.redb")).unwrap();
    let host = journal.host_id().unwrap();
    let peers = Peers::new("127.0.0.1:1", host);
    let found = peers.clone();
    let registry = Registry::new(Setup {
        here: "127.0.0.1:1".into(),
        host,
        journal: journal.clone(),
        engines: Vec::new(),
        peers: Arc::new(move |address| found.find(address)),
        lanes: 1,
        shutdown: CancellationToken::new(),
    });
    let gate = Arc::new(LaneDirectory::default());
    let arrivals = Arrivals::new(Arc::new(registry.clone()), journal, gate, Patience::default());
    let site = Site { host, address: "127.0.0.1:1".into() };
    let vms = VmEngine::new(directory.path().join("vms"), site).unwrap();
    let guest = Guest::empty(&Arc::new(Census::default()), 4);
    let starts = starts(guest.clone());
    let processes: Arc<dyn Starts> = Arc::new(Guests { guest: guest.clone(), problem: None });
    let peer = PeerService::new(registry.clone(), arrivals.clone(), processes);
    let control = ControlService::new(registry.clone(), arrivals, vms, starts, peers);
    Daemon { control, peer, registry, guest, directory }
}

fn with_criu() -> Daemon {
    daemon(|guest| Some(Arc::new(Guests { guest, problem: None })))
}

fn order(argv: &[&str]) -> Request<proto::ExecProcessRequest> {
    Request::new(proto::ExecProcessRequest {
        name: "job".into(),
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        ..Default::default()
    })
}

fn job() -> Request<proto::WorkloadName> {
    Request::new(proto::WorkloadName { name: "job".into() })
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().expect("details").reason
}

#[tokio::test]
async fn a_command_becomes_a_workload_that_is_listed_with_what_it_is() {
    let daemon = with_criu();
    let made = daemon.control.exec_process(order(&["sleep", "9"])).await.unwrap().into_inner();
    assert_eq!(
        (made.kind(), made.state()),
        (proto::WorkloadKind::Process, proto::WorkloadState::Running)
    );
    assert!(daemon.guest.runs());
    let listed = daemon.control.list(Request::new(Default::default())).await.unwrap().into_inner();
    assert_eq!(listed.workloads, std::slice::from_ref(&made));
    let told = daemon.control.inspect(job()).await.unwrap().into_inner();
    let process = told.process.expect("what a process tree is");
    assert_eq!((process.argv, process.cwd), (vec!["sleep".into(), "9".into()], "/".into()));
    assert_eq!((told.vmm_pid, told.cpu), (0, None));
    let again = daemon.control.exec_process(order(&["x"])).await.unwrap_err();
    assert_eq!(reason(&again), "NAME_TAKEN");
}

#[tokio::test]
async fn a_command_that_cannot_be_started_leaves_nothing() {
    let daemon = with_criu();
    let refused = daemon.control.exec_process(order(&["missing"])).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "WORKLOAD"));
    assert!(
        daemon
            .control
            .list(Request::new(Default::default()))
            .await
            .unwrap()
            .into_inner()
            .workloads
            .is_empty()
    );
    // Neither is its name taken.
    daemon.control.exec_process(order(&["x"])).await.unwrap();
}

#[tokio::test]
async fn a_name_that_cannot_be_one_is_refused_before_anything_is_started() {
    let daemon = with_criu();
    let mut order = order(&["x"]);
    order.get_mut().name = "../job".into();
    let refused = daemon.control.exec_process(order).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::InvalidArgument, "BAD_NAME"));
    assert!(!daemon.guest.runs());
}

#[tokio::test]
async fn a_daemon_without_criu_says_how_to_give_it_one() {
    let without = daemon(|_| None);
    let refused = without.control.exec_process(order(&["x"])).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "NO_CRIU"));
    assert!(refused.message().contains("--criu"), "{}", refused.message());
    let host = without.control.host(Request::new(Default::default())).await.unwrap().into_inner();
    assert_eq!((host.criu.as_str(), host.criu_problem.as_str()), ("", refused.message()));

    let problem = Some("criu 3.11 is too old".to_owned());
    let old = daemon(|guest| Some(Arc::new(Guests { guest, problem })));
    let refused = old.control.exec_process(order(&["x"])).await.unwrap_err();
    assert!(refused.message().contains("too old"), "{}", refused.message());

    let host =
        with_criu().control.host(Request::new(Default::default())).await.unwrap().into_inner();
    assert_eq!((host.criu.as_str(), host.criu_problem.as_str()), ("4.2", ""));
}

#[tokio::test]
async fn what_is_in_the_way_of_a_workload_is_told_by_every_dry_run_and_stops_a_move() {
    let daemon = with_criu();
    daemon.control.exec_process(order(&["x"])).await.unwrap();
    daemon.guest.has(vec![Problem::new("vsock", "process 7 has a vsock socket", "close it")]);
    let here = "127.0.0.1:1";
    let found = proto::Blocker {
        code: "vsock".into(),
        message: "process 7 has a vsock socket".into(),
        remedy: "close it".into(),
        host: here.into(),
    };
    let process = Some(proto::ProcessOptions { drop_connections: true, ..Default::default() });
    let request = proto::CheckpointRequest {
        stop: false,
        name: "job".into(),
        directory: daemon.directory.path().join("snap").display().to_string(),
        dry_run: true,
        process,
        parent: String::new(),
    };
    let planned = daemon.control.checkpoint(Request::new(request.clone())).await.unwrap();
    assert_eq!(planned.into_inner().blockers, std::slice::from_ref(&found));
    assert!(daemon.guest.carried().process.drop_connections);
    let saved = proto::CheckpointRequest { dry_run: false, ..request };
    let refused = daemon.control.checkpoint(Request::new(saved)).await.unwrap_err();
    assert_eq!(reason(&refused), "CHECKPOINT");

    // Nobody listens there, which is told beside it.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    let to = proto::MigrateRequest { name: "job".into(), to: nobody, ..Default::default() };
    let plan = daemon.control.plan_migration(Request::new(to.clone())).await.unwrap().into_inner();
    let codes: Vec<_> = plan.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!((codes, &plan.blockers[0]), (vec!["vsock", "peer-unreachable"], &found));
    let events = daemon.control.migrate(Request::new(to)).await.unwrap().into_inner();
    let last = futures::StreamExt::collect::<Vec<_>>(events).await.pop().unwrap().unwrap();
    let Some(proto::migration_event::Event::Result(result)) = last.event else {
        panic!("the last event is no result")
    };
    assert_eq!(result.kind(), proto::WorkloadKind::Process);
    assert_eq!(result.blockers, [found]);
    assert!(daemon.guest.runs());
}

/// Memory in which every page from the eighth on is full of its number.
struct Numbered;

impl LeftMemory for Numbered {
    fn bytes(&self) -> u64 {
        0
    }

    fn read(&self, piece: Piece) -> Result<Vec<u8>, WorkloadError> {
        let first = piece.address / PAGE_SIZE;
        let pages = first..first + u64::from(piece.pages);
        let full = |page: u64| if page < 8 { 0 } else { u8::try_from(page % 256).unwrap() };
        Ok(pages.flat_map(|page| [full(page); 4096]).collect())
    }
}

#[tokio::test]
async fn memory_that_was_left_behind_is_given_to_its_host_whole_or_not_at_all() {
    let daemon = with_criu();
    let (migration, asker) = (MigrationId::random(), HostId::random());
    let serves = daemon.registry.serving().serve(migration, asker, Arc::new(Numbered));
    let good = proto::PullRequest {
        migration_id: migration.to_string(),
        workload_id: WorkloadId::random().to_string(),
        epoch: 2,
        host_id: daemon.registry.host_id().to_string(),
        asker_id: asker.to_string(),
        process: 1,
        address: 8 * PAGE_SIZE,
        pages: 2,
    };
    let pull = async |request: proto::PullRequest| {
        let answer = daemon.peer.pull(Request::new(request)).await;
        answer.map(|reply| reply.into_inner().reply.expect("an answer"))
    };
    let whole = pull(good.clone()).await.unwrap();
    let proto::pull_reply::Reply::Pages(pages) = whole else { panic!("{whole:?}") };
    assert_eq!(pages.data, [[8; 4096], [9; 4096]].concat());
    assert_eq!(pages.crc32, crc32fast::hash(&pages.data));
    let zeros = pull(proto::PullRequest { address: 0, ..good.clone() }).await.unwrap();
    let proto::pull_reply::Reply::Pages(pages) = zeros else { panic!("{zeros:?}") };
    assert!(pages.data.is_empty(), "zeros are not sent");
    for (pages, address) in [(0, 0), (257, 0), (1, 1), (1, u64::MAX - 4095)] {
        let refused = pull(proto::PullRequest { pages, address, ..good.clone() }).await;
        assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument, "{pages} at {address}");
    }
    let other = proto::PullRequest { host_id: HostId::random().to_string(), ..good.clone() };
    assert_eq!(pull(other).await.unwrap_err().code(), Code::FailedPrecondition);
    let stranger = proto::PullRequest { asker_id: HostId::random().to_string(), ..good.clone() };
    let answer = pull(stranger).await.unwrap();
    assert!(matches!(answer, proto::pull_reply::Reply::Later(_)), "{answer:?}");
    drop(serves);
    let answer = pull(good).await.unwrap();
    assert!(matches!(answer, proto::pull_reply::Reply::Later(_)), "{answer:?}");
}
