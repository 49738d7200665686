//! What the daemon of another host asks for.

use std::sync::Arc;

use migr_proto::v1 as proto;
use migr_proto::v1::peer_server::Peer;
use tonic::{Request, Response, Status};

use super::control::to_the_end;
use super::convert::ms;
use super::status::{self, invalid};
use crate::migration::destination::{Arrivals, MAX_STREAMS};
use crate::migration::journal::Counterpart;
use crate::migration::link::{Activated, Offer, Pull, Pulled, SealOrder, Standing};
use crate::registry::Registry;
use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::wire::{PROTOCOL, limits, manifest_from_wire};
use crate::workload::process::Starts;
use crate::workload::vm::VmEngine;
use crate::workload::{Piece, StreamHash, StreamKey};

/// The longest address of a source that is taken, in bytes.
const MAX_ADDRESS: usize = 256;

/// The peer service of this host.
pub struct PeerService {
    registry: Registry,
    arrivals: Arrivals,
    processes: Arc<dyn Starts>,
}

impl PeerService {
    /// Takes what is offered into `arrivals`; `processes` makes process trees.
    #[must_use]
    pub fn new(registry: Registry, arrivals: Arrivals, processes: Arc<dyn Starts>) -> Self {
        Self { registry, arrivals, processes }
    }

    fn here(&self) -> &str {
        self.registry.here()
    }

    fn migration(&self, id: &str) -> Result<MigrationId, Status> {
        id.parse().map_err(|_| invalid(self.here(), "migration_id is not a UUID"))
    }

    /// Refuses what another daemon was to be asked: this one's journal says
    /// nothing of that.
    fn is_meant(&self, host: &str) -> Result<(), Status> {
        let here = self.registry.host_id();
        if host.parse() == Ok(here) {
            return Ok(());
        }
        let text = format!("this is host {here}, and host {host:.64} was meant");
        Err(status::Refusal {
            code: tonic::Code::FailedPrecondition,
            reason: "ANOTHER_HOST",
            message: text,
            host: self.here(),
            remedy: "bring back the migrd that was here, with its state directory",
        }
        .status())
    }

    fn pull_of(&self, request: &proto::PullRequest) -> Result<(Pull, HostId), Status> {
        let bad = |what: &str| invalid(self.here(), what);
        self.is_meant(&request.host_id)?;
        let asker = request.asker_id.parse().map_err(|_| bad("asker_id is not a UUID"))?;
        let pull = Pull {
            host: self.registry.host_id(),
            migration: self.migration(&request.migration_id)?,
            workload: request.workload_id.parse().map_err(|_| bad("workload_id is not a UUID"))?,
            epoch: Epoch(request.epoch),
            piece: Piece::checked(request.process, request.address, request.pages).map_err(bad)?,
        };
        Ok((pull, asker))
    }

    fn seal_order(&self, request: proto::SealRequest) -> Result<SealOrder, Status> {
        let proto::SealRequest { migration_id, lane_batches, state, state_crc32, hashes } = request;
        let bad = |what: &str| invalid(self.here(), what);
        if lane_batches.len() > limits::MAX_LANES || hashes.len() > MAX_STREAMS {
            return Err(bad("it speaks of more lanes or streams than are possible"));
        }
        if crc32fast::hash(&state) != state_crc32 {
            return Err(bad("the state was damaged on its way: its CRC-32 differs"));
        }
        let hash = |hash: proto::StreamHash| {
            let bytes = <[u8; 32]>::try_from(hash.blake3.as_ref())
                .map_err(|_| bad("a hash is not of 32 bytes"))?;
            Ok(StreamHash { key: StreamKey(hash.key), hash: bytes })
        };
        Ok(SealOrder {
            migration: self.migration(&migration_id)?,
            batches: lane_batches,
            state: state.to_vec(),
            hashes: hashes.into_iter().map(hash).collect::<Result<_, Status>>()?,
        })
    }
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn identify(
        &self,
        _: Request<proto::IdentifyRequest>,
    ) -> Result<Response<proto::IdentifyReply>, Status> {
        let (total, free, reserved) = self.registry.memory();
        let problem = VmEngine::problem();
        Ok(Response::new(proto::IdentifyReply {
            protocol: PROTOCOL,
            host_id: self.registry.host_id().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            memory_total_bytes: total,
            memory_free_bytes: free,
            memory_reserved_bytes: reserved,
            kvm: problem.is_none(),
            kvm_problem: problem.unwrap_or_default(),
            kernel: crate::sys::kernel_release(),
            cpus: crate::sys::cpus(),
            workloads: u32::try_from(self.registry.count()).unwrap_or(u32::MAX),
            criu: self.processes.version().unwrap_or_default(),
            criu_problem: self.processes.problem().unwrap_or_default(),
        }))
    }

    async fn offer(
        &self,
        request: Request<proto::OfferRequest>,
    ) -> Result<Response<proto::OfferReply>, Status> {
        let request = request.into_inner();
        if request.protocol != PROTOCOL {
            let text = format!(
                "this migrd speaks protocol {PROTOCOL}, the offer is of protocol {}",
                request.protocol
            );
            return Err(invalid(self.here(), text));
        }
        if request.source_address.is_empty() || request.source_address.len() > MAX_ADDRESS {
            return Err(invalid(self.here(), "the offer does not say where it comes from"));
        }
        let manifest = request.manifest.ok_or_else(|| invalid(self.here(), "no manifest"))?;
        let manifest = manifest_from_wire(manifest).map_err(|e| invalid(self.here(), e))?;
        let migration = self.migration(&request.migration_id)?;
        let offer = Offer {
            migration,
            epoch: Epoch(request.epoch),
            manifest,
            lanes: request.lanes,
            dry_run: request.dry_run,
        };
        let host = request
            .source_host_id
            .parse()
            .map_err(|_| invalid(self.here(), "source_host_id is not a UUID"))?;
        let from = Counterpart { migration, address: request.source_address, host };
        let arrivals = self.arrivals.clone();
        let blockers = to_the_end(async move { arrivals.offer(offer, from).await }).await;
        let problem = |b: crate::migration::link::Blocker| proto::OfferProblem {
            code: b.code,
            message: b.message,
            remedy: b.remedy,
        };
        let problems = blockers.into_iter().map(problem).collect();
        let reservation_ms = self.arrivals.reservation().as_millis();
        let reservation_ms = u64::try_from(reservation_ms).unwrap_or(u64::MAX);
        Ok(Response::new(proto::OfferReply { problems, reservation_ms }))
    }

    async fn seal(
        &self,
        request: Request<proto::SealRequest>,
    ) -> Result<Response<proto::SealReply>, Status> {
        let order = self.seal_order(request.into_inner())?;
        let sealed = self.arrivals.seal(order).await;
        let report = sealed.map_err(|e| status::arrival(self.here(), &e))?;
        Ok(Response::new(proto::SealReply {
            restore_ms: ms(report.restore),
            verify_ms: ms(report.verify),
            verified: report.verified,
        }))
    }

    async fn activate(
        &self,
        request: Request<proto::ActivateRequest>,
    ) -> Result<Response<proto::ActivateReply>, Status> {
        let request = request.into_inner();
        let migration = self.migration(&request.migration_id)?;
        self.is_meant(&request.host_id)?;
        let activated = self.arrivals.activate(migration, Epoch(request.epoch)).await;
        let Activated { took, filling } =
            activated.map_err(|e| status::arrival(self.here(), &e))?;
        Ok(Response::new(proto::ActivateReply { resume_ms: ms(took), filling }))
    }

    async fn abandon(
        &self,
        request: Request<proto::AbandonRequest>,
    ) -> Result<Response<proto::AbandonReply>, Status> {
        let request = request.into_inner();
        let migration = self.migration(&request.migration_id)?;
        let reason = request.reason.chars().take(500).collect();
        let abandoned = self.arrivals.abandon(migration, reason).await;
        abandoned.map_err(|e| status::arrival(self.here(), &e))?;
        Ok(Response::new(proto::AbandonReply {}))
    }

    async fn resolve(
        &self,
        request: Request<proto::ResolveRequest>,
    ) -> Result<Response<proto::ResolveReply>, Status> {
        let request = request.into_inner();
        let migration = self.migration(&request.migration_id)?;
        let workload: WorkloadId = request
            .workload_id
            .parse()
            .map_err(|_| invalid(self.here(), "workload_id is not a UUID"))?;
        self.is_meant(&request.host_id)?;
        let epoch = Epoch(request.epoch);
        let standing = if request.from_source {
            let resolved = self.arrivals.resolve(migration, workload, epoch).await;
            resolved.map_err(|e| status::arrival(self.here(), &e))?
        } else {
            let standing = self.registry.standing(migration, workload, epoch);
            standing.map_err(|e| status::journal(self.here(), &e))?
        };
        let standing = match standing {
            Standing::Pending => proto::Standing::Pending,
            Standing::Released => proto::Standing::Released,
            Standing::Aborted => proto::Standing::Aborted,
            Standing::Sealed => proto::Standing::Sealed,
            Standing::Owned => proto::Standing::Owned,
            Standing::Discarded => proto::Standing::Discarded,
            Standing::Filling => proto::Standing::Filling,
        };
        Ok(Response::new(proto::ResolveReply { standing: standing.into() }))
    }

    async fn pull(
        &self,
        request: Request<proto::PullRequest>,
    ) -> Result<Response<proto::PullReply>, Status> {
        let (pull, asker) = self.pull_of(&request.into_inner())?;
        let pulled = self.registry.pulled(&pull, asker).await;
        let pulled = pulled.map_err(|e| status::journal(self.here(), &e))?;
        let reply = match pulled {
            Pulled::Lost(why) => proto::pull_reply::Reply::Lost(why),
            Pulled::Later(why) => proto::pull_reply::Reply::Later(why),
            Pulled::Bytes(bytes) => {
                let zero = bytes.iter().all(|byte| *byte == 0);
                let data = if zero { Vec::new() } else { bytes };
                let pages = proto::PulledPages { crc32: crc32fast::hash(&data), data: data.into() };
                proto::pull_reply::Reply::Pages(pages)
            }
        };
        Ok(Response::new(proto::PullReply { reply: Some(reply) }))
    }
}
