//! A daemon that answers from a script, and migctl run against it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use migr_proto::v1::control_server::{Control, ControlServer};
use migr_proto::v1::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

type Answer<T> = Result<Response<T>, Status>;
type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the daemon answers. What is left out is refused or empty.
#[derive(Default)]
pub struct Script {
    /// Reports of `Migrate` and `Watch`.
    pub events: Vec<MigrationEvent>,
    /// After its events the report goes on until cancelled, and then says this.
    pub when_cancelled: Option<MigrationEvent>,
    /// `Migrate` and `PlanMigration` answer with this error.
    pub migrate_error: Option<Status>,
    /// `Cancel` answers with this error.
    pub cancel_error: Option<Status>,
    /// `ExecProcess` answers with this error.
    pub exec_error: Option<Status>,
    /// What stands in the way of `Checkpoint`, for a dry run.
    pub checkpoint_blockers: Vec<Blocker>,
    /// A migration is there to be watched.
    pub watchable: bool,
    /// The report, or the log, stays open after what it has.
    pub hold: bool,
    pub plan: MigrationPlan,
    pub workloads: Vec<Workload>,
    pub inspect: Option<InspectReply>,
    pub logs: Vec<LogChunk>,
    /// `Console` answers the first input with these, and echoes if there are none.
    pub console: Option<Vec<LogChunk>>,
    pub host: HostReply,
}

struct Service {
    script: Script,
    requests: Arc<Mutex<Vec<String>>>,
    cancelled: Arc<Notify>,
}

/// A fake daemon on a loopback port. Dropping it cuts every connection.
pub struct Fake {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Fake {
    pub fn start(script: Script) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), script)
    }

    pub fn start_at(address: SocketAddr, script: Script) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let service =
            Service { script, requests: requests.clone(), cancelled: Arc::new(Notify::new()) };
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(ControlServer::new(service))
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
        );
        Self { address, requests, runtime: Some(runtime) }
    }

    /// Every request so far, as Rust prints it.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    pub fn migctl(&self, args: &[&str]) -> Finished {
        run(Command::new(BINARY).env("MIGCTL_HOST", self.address.to_string()).args(args))
    }

    pub fn spawn(&self, args: &[&str]) -> Running {
        let mut command = Command::new(BINARY);
        command.env("MIGCTL_HOST", self.address.to_string()).args(args);
        Running::start(command)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waits for its tasks to be dropped, and their sockets with them.
            drop(runtime);
        }
    }
}

pub const BINARY: &str = env!("CARGO_BIN_EXE_migctl");

/// A finished migctl.
pub struct Finished {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// The one object on stdout.
    pub fn object(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} / {}", self.stdout, self.stderr))
    }

    /// The objects on stderr, which must be nothing else.
    pub fn side_objects(&self) -> Vec<Value> {
        self.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().expect("not ended by a signal"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub fn run(command: &mut Command) -> Finished {
    command.stdin(Stdio::null()).output().unwrap().into()
}

pub fn migctl(args: &[&str]) -> Finished {
    run(Command::new(BINARY).env_remove("MIGCTL_HOST").args(args))
}

/// A migctl that is still running.
pub struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    stdout: BufReader<ChildStdout>,
    printed: String,
    seen: String,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stderr, stdout, printed: String::new(), seen: String::new() }
    }

    /// Waits for a line with `text` on stderr.
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let mut line = String::new();
            assert_ne!(self.stderr.read_line(&mut line).unwrap(), 0, "ended: {}", self.seen);
            self.seen.push_str(&line);
            if line.contains(text) {
                return;
            }
        }
    }

    /// Waits for a line on stdout.
    pub fn wait_for_output(&mut self) {
        assert_ne!(self.stdout.read_line(&mut self.printed).unwrap(), 0, "ended: {}", self.seen);
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Writes to its stdin and, if `close`, ends it.
    pub fn type_in(&mut self, text: &str, close: bool) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
        if close {
            drop(self.child.stdin.take());
        }
    }

    pub fn end(mut self) -> Finished {
        self.stdout.read_to_string(&mut self.printed).unwrap();
        self.stderr.read_to_string(&mut self.seen).unwrap();
        let status = self.child.wait().unwrap().code().expect("not ended by a signal");
        Finished { status, stdout: self.printed, stderr: self.seen }
    }
}

/// An error as migrd sends it.
pub fn refusal(code: Code, reason: &str, message: &str, metadata: &[(&str, &str)]) -> Status {
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let details = ErrorDetails::with_error_info(
        reason,
        "migr",
        metadata.collect::<std::collections::HashMap<_, _>>(),
    );
    Status::with_error_details(code, message, details)
}

pub fn progress(round: u32, sent: u64, total: u64) -> MigrationEvent {
    let progress = MigrationProgress {
        migration_id: "m-1".into(),
        workload: "web".into(),
        phase: MigrationPhase::Precopy.into(),
        round,
        bytes_sent: sent,
        bytes_remaining: total - sent,
        bytes_total: total,
        rate_bytes_per_s: 1 << 30,
        predicted_downtime_ms: 8.5,
        ..Default::default()
    };
    MigrationEvent { event: Some(migration_event::Event::Progress(progress)) }
}

pub fn result(outcome: MigrationOutcome) -> MigrationResult {
    MigrationResult {
        migration_id: "m-1".into(),
        workload: "web".into(),
        kind: WorkloadKind::Vm.into(),
        mode: MigrationMode::Precopy.into(),
        outcome: outcome.into(),
        source: "a:1".into(),
        destination: "b:1".into(),
        epoch: 2,
        total_ms: 812.4,
        downtime_ms: 9.1,
        downtime_breakdown: Some(DowntimeBreakdown {
            pause_ms: 0.3,
            memory_ms: 6.0,
            state_ms: 0.9,
            verify_ms: 0.0,
            restore_ms: 1.2,
            resume_ms: 0.7,
        }),
        predicted_downtime_ms: 8.5,
        rounds: vec![MigrationRound {
            pages: 139_264,
            bytes: 570_425_344,
            ms: 640.0,
            dirty_after: 4096,
        }],
        pages_sent: 143_360,
        pages_zero: 12,
        pages_skipped: 118_772,
        bytes_on_wire: 587_333_120,
        ..Default::default()
    }
}

pub fn event(result: MigrationResult) -> MigrationEvent {
    MigrationEvent { event: Some(migration_event::Event::Result(result)) }
}

pub fn workload(name: &str, state: WorkloadState) -> Workload {
    Workload {
        id: format!("id-{name}"),
        name: name.into(),
        kind: WorkloadKind::Vm.into(),
        state: state.into(),
        epoch: 2,
        memory_bytes: 1 << 30,
        cpus: 1,
        ..Default::default()
    }
}

pub fn chunk(offset: u64, data: &str, line_unix_ns: i64) -> LogChunk {
    LogChunk { data: data.to_owned().into(), offset, line_unix_ns, ..Default::default() }
}

pub fn moved(to: SocketAddr, offset: u64) -> LogChunk {
    LogChunk { moved_to: to.to_string(), offset, ..Default::default() }
}

/// The keys of an object, sorted.
pub fn keys(object: &Value) -> Vec<&str> {
    let map: BTreeMap<&str, &Value> =
        object.as_object().unwrap().iter().map(|(key, value)| (key.as_str(), value)).collect();
    map.into_keys().collect()
}

impl Service {
    fn note(&self, request: &impl std::fmt::Debug) {
        self.requests.lock().unwrap().push(format!("{request:?}"));
    }

    fn report(&self) -> Flow<MigrationEvent> {
        let (sender, receiver) = mpsc::channel(64);
        for event in self.script.events.clone() {
            sender.try_send(Ok(event)).unwrap();
        }
        let (after, cancelled) = (self.script.when_cancelled.clone(), self.cancelled.clone());
        let hold = self.script.hold;
        tokio::spawn(async move {
            if let Some(after) = after {
                cancelled.notified().await;
                let _ = sender.send(Ok(after)).await;
            } else if hold {
                sender.closed().await;
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }

    fn found(&self, request: &WorkloadName) -> Answer<Workload> {
        self.note(request);
        let found = self.script.workloads.iter().find(|workload| workload.name == request.name);
        found.cloned().map(Response::new).ok_or_else(|| {
            let message = format!("there is no workload {}", request.name);
            refusal(Code::NotFound, "no-such-workload", &message, &[("remedy", "see the list")])
        })
    }
}

#[tonic::async_trait]
impl Control for Service {
    type LogsStream = Flow<LogChunk>;
    type ConsoleStream = Flow<LogChunk>;
    type MigrateStream = Flow<MigrationEvent>;
    type WatchStream = Flow<MigrationEvent>;

    async fn run(&self, request: Request<RunRequest>) -> Answer<Workload> {
        let request = request.into_inner();
        self.note(&request);
        Ok(Response::new(Workload {
            memory_bytes: request.memory_bytes,
            cpus: request.cpus,
            ..workload(&request.name, WorkloadState::Running)
        }))
    }

    async fn exec_process(&self, request: Request<ExecProcessRequest>) -> Answer<Workload> {
        let request = request.into_inner();
        self.note(&request);
        if let Some(error) = &self.script.exec_error {
            return Err(error.clone());
        }
        Ok(Response::new(Workload {
            kind: WorkloadKind::Process.into(),
            memory_bytes: 0,
            cpus: 0,
            ..workload(&request.name, WorkloadState::Running)
        }))
    }

    async fn run_container(&self, request: Request<RunContainerRequest>) -> Answer<Workload> {
        let request = request.into_inner();
        self.note(&request);
        Ok(Response::new(Workload {
            kind: WorkloadKind::Container.into(),
            memory_bytes: 0,
            cpus: 0,
            ..workload(&request.name, WorkloadState::Running)
        }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Answer<ListReply> {
        let all = request.into_inner().include_gone;
        let mut workloads = self.script.workloads.clone();
        workloads.retain(|workload| all || workload.state() != WorkloadState::Gone);
        Ok(Response::new(ListReply { workloads }))
    }

    async fn inspect(&self, request: Request<WorkloadName>) -> Answer<InspectReply> {
        match &self.script.inspect {
            Some(reply) => Ok(Response::new(reply.clone())),
            None => Err(self.found(&request.into_inner()).err().unwrap_or(Status::internal("?"))),
        }
    }

    async fn logs(&self, request: Request<LogsRequest>) -> Answer<Self::LogsStream> {
        self.note(request.get_ref());
        let chunks = self.script.logs.clone().into_iter().map(Ok);
        if self.script.hold {
            let held = tokio_stream::iter(chunks).chain(tokio_stream::pending());
            return Ok(Response::new(Box::pin(held)));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
    }

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Answer<Self::ConsoleStream> {
        let mut inputs = request.into_inner();
        let hello = inputs.message().await?.unwrap();
        self.note(&hello);
        if let Some(chunks) = self.script.console.clone() {
            let rest = inputs.take(0).map(|_| Ok(LogChunk::default()));
            return Ok(Response::new(Box::pin(
                tokio_stream::iter(chunks.into_iter().map(Ok)).chain(rest),
            )));
        }
        let echo = inputs.filter_map(Result::ok);
        Ok(Response::new(Box::pin(
            echo.map(|input| Ok(LogChunk { data: input.data, ..Default::default() }))
                .chain(tokio_stream::pending()),
        )))
    }

    async fn plan_migration(&self, request: Request<MigrateRequest>) -> Answer<MigrationPlan> {
        self.note(request.get_ref());
        match &self.script.migrate_error {
            Some(error) => Err(error.clone()),
            None => Ok(Response::new(self.script.plan.clone())),
        }
    }

    async fn migrate(&self, request: Request<MigrateRequest>) -> Answer<Self::MigrateStream> {
        self.note(request.get_ref());
        match &self.script.migrate_error {
            Some(error) => Err(error.clone()),
            None => Ok(Response::new(self.report())),
        }
    }

    async fn watch(&self, _: Request<WorkloadName>) -> Answer<Self::WatchStream> {
        if self.script.watchable {
            return Ok(Response::new(self.report()));
        }
        Err(refusal(Code::FailedPrecondition, "not-migrating", "no migration is running", &[]))
    }

    async fn cancel(&self, request: Request<WorkloadName>) -> Answer<CancelReply> {
        self.note(request.get_ref());
        if let Some(error) = &self.script.cancel_error {
            return Err(error.clone());
        }
        self.cancelled.notify_one();
        Ok(Response::new(CancelReply { migration_id: "m-1".into() }))
    }

    async fn pause(&self, request: Request<WorkloadName>) -> Answer<Workload> {
        self.found(&request.into_inner())
    }

    async fn resume(&self, request: Request<WorkloadName>) -> Answer<Workload> {
        self.found(&request.into_inner())
    }

    async fn stop(&self, request: Request<StopRequest>) -> Answer<Workload> {
        self.note(request.get_ref());
        self.found(&WorkloadName { name: request.into_inner().name })
    }

    async fn remove(&self, request: Request<WorkloadName>) -> Answer<RemoveReply> {
        self.found(&request.into_inner()).map(|_| Response::new(RemoveReply {}))
    }

    async fn adopt(&self, request: Request<AdoptRequest>) -> Answer<AdoptReply> {
        let request = request.into_inner();
        self.note(&request);
        let blockers = self.script.checkpoint_blockers.clone();
        let adopted = !request.dry_run && blockers.is_empty();
        let workload = adopted.then(|| workload(&request.name, WorkloadState::Running));
        Ok(Response::new(AdoptReply { workload, blockers }))
    }

    async fn checkpoint(&self, request: Request<CheckpointRequest>) -> Answer<CheckpointReply> {
        self.note(request.get_ref());
        if request.into_inner().dry_run {
            let blockers = self.script.checkpoint_blockers.clone();
            return Ok(Response::new(CheckpointReply { blockers, ..Default::default() }));
        }
        Ok(Response::new(CheckpointReply {
            bytes_written: 4096,
            pages_written: 1,
            paused_ms: 1.5,
            blockers: Vec::new(),
        }))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Answer<Workload> {
        self.note(request.get_ref());
        Ok(Response::new(workload("restored", WorkloadState::Running)))
    }

    async fn force(&self, request: Request<ForceRequest>) -> Answer<Workload> {
        self.note(request.get_ref());
        self.found(&WorkloadName { name: request.into_inner().name })
    }

    async fn host(&self, request: Request<HostRequest>) -> Answer<HostReply> {
        let peer = request.into_inner().peer;
        let own = self.script.host.clone();
        Ok(Response::new(if peer.is_empty() { own } else { HostReply { address: peer, ..own } }))
    }
}
