//! What an operator's client asks for.

use std::sync::Arc;

use migr_proto::v1 as proto;
use migr_proto::v1::control_server::Control;
use prost::Message;
use tonic::{Request, Response, Status, Streaming};

use super::output::{Chunks, Events, events, tail};
use super::status::invalid;
use super::{adoption, container_orders, convert, orders, process_orders, status};
use crate::checkpoint;
use crate::migration::destination::Arrivals;
use crate::migration::journal::Identity;
use crate::migration::link::Blocker;
use crate::registry::{Registry, State};
use crate::units::{WorkloadId, unix_ms};
use crate::wire::Peers;
use crate::workload::process::Starts;
use crate::workload::vm::{VmEngine, streams};
use crate::workload::{Kind, Manifest, Workload, WorkloadError};

/// The control service of this host.
pub struct ControlService {
    pub(super) registry: Registry,
    arrivals: Arrivals,
    vms: VmEngine,
    pub(super) processes: Option<Arc<dyn Starts>>,
    containers: Option<Arc<dyn Starts>>,
    pub(super) peers: Peers,
}

impl ControlService {
    /// Serves what `registry` has. `processes` is what starts process trees;
    /// `None` on a host without CRIU.
    #[must_use]
    pub fn new(
        registry: Registry,
        arrivals: Arrivals,
        vms: VmEngine,
        processes: Option<Arc<dyn Starts>>,
        peers: Peers,
    ) -> Self {
        Self { registry, arrivals, vms, processes, containers: None, peers }
    }

    /// It starts containers too.
    #[must_use]
    pub fn with_containers(self, containers: Arc<dyn Starts>) -> Self {
        Self { containers: Some(containers), ..self }
    }

    fn refused(&self, error: &crate::registry::RegistryError) -> Status {
        status::registry(self.registry.here(), error)
    }

    pub(super) fn here(&self) -> &str {
        self.registry.here()
    }

    fn workload(
        &self,
        done: Result<crate::registry::Status, crate::registry::RegistryError>,
    ) -> Result<Response<proto::Workload>, Status> {
        let status = done.map_err(|e| self.refused(&e))?;
        Ok(Response::new(convert::workload(&status)))
    }

    /// What starts process trees.
    fn processes(&self) -> Result<Arc<dyn Starts>, Status> {
        match (&self.processes, self.criu_problem()) {
            (Some(processes), None) => Ok(processes.clone()),
            (_, problem) => Err(status::no_criu(self.here(), problem.unwrap_or_default())),
        }
    }

    /// What starts containers.
    fn containers(&self) -> Result<Arc<dyn Starts>, Status> {
        let Some(containers) = &self.containers else {
            return Err(status::no_criu(self.here(), self.criu_problem().unwrap_or_default()));
        };
        match containers.problem() {
            None => Ok(containers.clone()),
            Some(problem) => Err(status::no_containers(self.here(), problem)),
        }
    }

    /// Makes a new process tree or container.
    async fn start(
        &self,
        engine: Arc<dyn Starts>,
        kind: Kind,
        name: String,
        config: proto::ProcessConfig,
    ) -> Result<Response<proto::Workload>, Status> {
        let id = WorkloadId::random();
        let manifest = Manifest {
            workload: id,
            name: name.clone(),
            kind,
            // They are only known when it moves, and so is its memory.
            streams: Vec::new(),
            config: config.encode_to_vec(),
            memory_bytes: 0,
            cpus: 0,
            paused: false,
            created_unix_ms: unix_ms(),
            needs: Vec::new(),
            follows: false,
        };
        let made = async move { engine.create(id, &name, &config).await };
        self.create(manifest, made).await
    }

    /// Makes a new workload under the name and in the memory of `manifest`, and
    /// takes it in.
    async fn create(
        &self,
        manifest: Manifest,
        made: impl Future<Output = Result<Box<dyn Workload>, WorkloadError>> + Send + 'static,
    ) -> Result<Response<proto::Workload>, Status> {
        let claim = self.registry.claim_new(&manifest).map_err(|e| self.refused(&e))?;
        let registry = self.registry.clone();
        let created = to_the_end(async move {
            let workload = made.await.map_err(|e| status::workload(registry.here(), &e))?;
            let identity: Identity = crate::migration::destination::identity(&manifest);
            let created = registry.create(identity, workload).await;
            drop(claim);
            created.map_err(|e| status::registry(registry.here(), &e))
        });
        Ok(Response::new(convert::workload(&created.await?)))
    }
}

/// Does `work` whole, even if the client that asked for it has gone meanwhile
/// and nobody waits for the answer: half of it would leave a VM that no record
/// speaks of.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    type LogsStream = Chunks;
    type ConsoleStream = Chunks;
    type MigrateStream = Events;
    type WatchStream = Events;

    async fn run(
        &self,
        request: Request<proto::RunRequest>,
    ) -> Result<Response<proto::Workload>, Status> {
        let request = request.into_inner();
        let mut new = orders::new_vm(self.here(), &request)?;
        new.cpu = Some(orders::cpu_model(self.here(), request.cpu.as_ref()).await?);
        let measured = self.vms.measure(&mut new).await;
        measured.map_err(|e| invalid(self.here(), e.to_string()))?;
        new.check().map_err(|e| invalid(self.here(), e.to_string()))?;
        let id = WorkloadId::random();
        let streams = streams(new.memory_bytes);
        let manifest = Manifest {
            workload: id,
            name: request.name.clone(),
            kind: Kind::Vm,
            streams: streams.map_err(|e| invalid(self.here(), e.to_string()))?,
            config: new.config().encode_to_vec(),
            memory_bytes: new.memory_bytes,
            cpus: new.cpus,
            paused: false,
            created_unix_ms: unix_ms(),
            needs: Vec::new(),
            follows: false,
        };
        let vms = self.vms.clone();
        let name = manifest.name.clone();
        self.create(manifest, async move { vms.create(id, &name, &new).await }).await
    }

    async fn exec_process(
        &self,
        request: Request<proto::ExecProcessRequest>,
    ) -> Result<Response<proto::Workload>, Status> {
        let request = request.into_inner();
        let config = process_orders::process(self.here(), &request)?;
        let processes = self.processes()?;
        self.start(processes, Kind::Process, request.name, config).await
    }

    async fn run_container(
        &self,
        request: Request<proto::RunContainerRequest>,
    ) -> Result<Response<proto::Workload>, Status> {
        let request = request.into_inner();
        let (name, here) = (request.name.clone(), self.here().to_owned());
        let containers = self.containers()?;
        // The bundle may be on slow storage.
        let read = tokio::task::spawn_blocking(move || container_orders::read(&here, &request));
        let config = read.await.map_err(|e| Status::internal(e.to_string()))??;
        self.start(containers, Kind::Container, name, config).await
    }

    async fn adopt(
        &self,
        request: Request<proto::AdoptRequest>,
    ) -> Result<Response<proto::AdoptReply>, Status> {
        let request = request.into_inner();
        let processes = self.processes()?;
        let (candidate, blockers) = adoption::look(self.here(), &request).await?;
        if request.dry_run || !blockers.is_empty() {
            return Ok(Response::new(proto::AdoptReply { workload: None, blockers }));
        }
        let id = WorkloadId::random();
        let manifest = adoption::manifest(id, request.name, &candidate);
        let made = async move { processes.adopt(id, &candidate).await };
        let workload = Some(self.create(manifest, made).await?.into_inner());
        Ok(Response::new(proto::AdoptReply { workload, blockers }))
    }

    async fn list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<Response<proto::ListReply>, Status> {
        let all = request.into_inner().include_gone;
        let shown = self.registry.list().into_iter().filter(|s| all || s.state != State::Gone);
        let workloads = shown.map(|s| convert::workload(&s)).collect();
        Ok(Response::new(proto::ListReply { workloads }))
    }

    async fn inspect(
        &self,
        request: Request<proto::WorkloadName>,
    ) -> Result<Response<proto::InspectReply>, Status> {
        let name = request.into_inner().name;
        let status = self.registry.find(&name).map_err(|e| self.refused(&e))?;
        // An arrival has no owner yet, so nothing more is known of it.
        let footprint = self.registry.footprint(&name).await.unwrap_or_default();
        let last = self.registry.last_report(&name).unwrap_or_default();
        let common = proto::InspectReply {
            workload: Some(convert::workload(&status)),
            memory_populated_bytes: footprint.populated_bytes,
            vmm_overhead_bytes: footprint.overhead_bytes,
            log_bytes: footprint.log_bytes,
            log_dropped_bytes: footprint.log_dropped_bytes,
            last_migration: last.map(|report| convert::report(&report, status.identity.kind)),
            ..proto::InspectReply::default()
        };
        Ok(Response::new(match status.identity.kind {
            Kind::Vm => convert::vm(common, &status.identity.config, &footprint),
            Kind::Process | Kind::Container => {
                let identity = &status.identity;
                let rootfs = self.containers.as_ref().and_then(|all| all.rootfs_of(identity.id));
                convert::process(identity.id, common, &identity.config, &footprint, rootfs)
            }
        }))
    }

    async fn logs(
        &self,
        request: Request<proto::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let proto::LogsRequest { name, follow, from_offset } = request.into_inner();
        let (chunks, _) = tail(&self.registry, &name, Some(from_offset), follow)?;
        Ok(Response::new(chunks))
    }

    async fn console(
        &self,
        request: Request<Streaming<proto::ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?;
        let first = first.ok_or_else(|| invalid(self.here(), "the first message names nothing"))?;
        let (chunks, terminal) = tail(&self.registry, &first.name, first.from_offset, true)?;
        let name = first.name.clone();
        tokio::spawn(async move {
            let mut next = Some(first.data);
            while let (Some(data), Some(terminal)) = (next, &terminal) {
                if !data.is_empty()
                    && let Err(error) = terminal.input(&data).await
                {
                    tracing::info!(workload = name, %error, "input to the console was dropped");
                }
                next = match input.message().await {
                    Ok(message) => message.map(|m| m.data),
                    Err(_) => None,
                };
            }
        });
        Ok(Response::new(chunks))
    }

    async fn plan_migration(
        &self,
        request: Request<proto::MigrateRequest>,
    ) -> Result<Response<proto::MigrationPlan>, Status> {
        let request = request.into_inner();
        let (peer, order) = orders::migration(self.here(), &self.peers, &request)?;
        let plan = self.registry.plan(&request.name, peer, order).await;
        let plan = plan.map_err(|e| self.refused(&e))?;
        let status = self.registry.find(&request.name).map_err(|e| self.refused(&e))?;
        let footprint = self.registry.footprint(&request.name).await.unwrap_or_default();
        Ok(Response::new(convert::plan(&convert::Planned {
            status: &status,
            plan: &plan,
            here: self.here(),
            to: &request.to,
            populated_bytes: footprint.populated_bytes,
            max_downtime: order.max_downtime,
        })))
    }

    async fn migrate(
        &self,
        request: Request<proto::MigrateRequest>,
    ) -> Result<Response<Self::MigrateStream>, Status> {
        let request = request.into_inner();
        let kind = self.registry.find(&request.name).map_err(|e| self.refused(&e))?.identity.kind;
        let (peer, order) = orders::migration(self.here(), &self.peers, &request)?;
        let watching = self.registry.migrate(&request.name, peer, order).await;
        let watching = watching.map_err(|e| self.refused(&e))?;
        Ok(Response::new(events(watching, request.name, kind)))
    }

    async fn watch(
        &self,
        request: Request<proto::WorkloadName>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().name;
        let watching = self.registry.watching(&name).map_err(|e| self.refused(&e))?;
        let kind = self.registry.find(&name).map_err(|e| self.refused(&e))?.identity.kind;
        Ok(Response::new(events(watching, name, kind)))
    }

    async fn cancel(
        &self,
        request: Request<proto::WorkloadName>,
    ) -> Result<Response<proto::CancelReply>, Status> {
        let cancelled = self.registry.cancel(&request.into_inner().name).await;
        let id = cancelled.map_err(|e| self.refused(&e))?;
        Ok(Response::new(proto::CancelReply { migration_id: id.to_string() }))
    }

    async fn pause(
        &self,
        request: Request<proto::WorkloadName>,
    ) -> Result<Response<proto::Workload>, Status> {
        self.workload(self.registry.pause(&request.into_inner().name).await)
    }

    async fn resume(
        &self,
        request: Request<proto::WorkloadName>,
    ) -> Result<Response<proto::Workload>, Status> {
        self.workload(self.registry.resume(&request.into_inner().name).await)
    }

    async fn stop(
        &self,
        request: Request<proto::StopRequest>,
    ) -> Result<Response<proto::Workload>, Status> {
        let proto::StopRequest { name, force, timeout_ms } = request.into_inner();
        let stopped = if force {
            self.registry.stop(&name).await
        } else {
            self.registry.ask_to_end(&name, orders::patience(timeout_ms)).await
        };
        self.workload(stopped)
    }

    async fn remove(
        &self,
        request: Request<proto::WorkloadName>,
    ) -> Result<Response<proto::RemoveReply>, Status> {
        let removed = self.registry.remove(&request.into_inner().name).await;
        removed.map_err(|e| self.refused(&e))?;
        Ok(Response::new(proto::RemoveReply {}))
    }

    async fn checkpoint(
        &self,
        request: Request<proto::CheckpointRequest>,
    ) -> Result<Response<proto::CheckpointReply>, Status> {
        let request = request.into_inner();
        let directory = orders::absolute(self.here(), "directory", &request.directory)?;
        let options = orders::process_options(request.process.as_ref());
        let parent = match request.parent.as_str() {
            "" => None,
            parent => Some(orders::absolute(self.here(), "parent", parent)?),
        };
        if request.dry_run {
            let (name, parent) = (&request.name, parent.as_deref());
            let found = checkpoint::plan(&self.registry, name, &directory, options, parent).await;
            let found = found.map_err(|e| status::checkpoint(self.here(), &e))?;
            let found = found.into_iter().map(|problem| Blocker::found_on(self.here(), problem));
            return Ok(Response::new(proto::CheckpointReply {
                blockers: found.map(|b| convert::blocker(&b, self.here())).collect(),
                ..proto::CheckpointReply::default()
            }));
        }
        let registry = self.registry.clone();
        let written = to_the_end(async move {
            let how = checkpoint::How { process: options, ends: request.stop, parent };
            checkpoint::write(&registry, &request.name, &directory, how).await
        });
        let written = written.await.map_err(|e| status::checkpoint(self.here(), &e))?;
        Ok(Response::new(proto::CheckpointReply {
            bytes_written: written.bytes,
            pages_written: written.pages,
            paused_ms: convert::ms(written.paused),
            blockers: Vec::new(),
        }))
    }

    async fn restore(
        &self,
        request: Request<proto::RestoreRequest>,
    ) -> Result<Response<proto::Workload>, Status> {
        let request = request.into_inner();
        let directory = orders::absolute(self.here(), "directory", &request.directory)?;
        let name = (!request.name.is_empty()).then_some(request.name);
        let registry = self.registry.clone();
        let restored =
            to_the_end(async move { checkpoint::restore(&registry, &directory, name).await });
        let status = restored.await.map_err(|e| status::checkpoint(self.here(), &e))?;
        Ok(Response::new(convert::workload(&status)))
    }

    async fn force(
        &self,
        request: Request<proto::ForceRequest>,
    ) -> Result<Response<proto::Workload>, Status> {
        let request = request.into_inner();
        let run_here = match request.action() {
            proto::ForceAction::RunHere => true,
            proto::ForceAction::GiveUp => false,
            proto::ForceAction::Unspecified => {
                return Err(invalid(self.here(), "say what to do: run it here, or give it up"));
            }
        };
        if let Some(migration) = self.registry.arriving(&request.name) {
            let before = self.registry.find(&request.name).map_err(|e| self.refused(&e))?;
            let forced = self.arrivals.force(migration, run_here).await;
            forced.map_err(|e| status::arrival(self.here(), &e))?;
            let after = self.registry.find(&request.name).unwrap_or(before);
            return Ok(Response::new(convert::workload(&after)));
        }
        self.workload(self.registry.force(&request.name, run_here).await)
    }

    async fn host(
        &self,
        request: Request<proto::HostRequest>,
    ) -> Result<Response<proto::HostReply>, Status> {
        let peer = request.into_inner().peer;
        if peer.is_empty() {
            return Ok(Response::new(self.host_itself().await));
        }
        self.host_of_peer(peer).await.map(Response::new)
    }
}
