//! What this host is and has, and what a peer says of itself.

use migr_proto::v1 as proto;
use tonic::{Code, Status};

use super::ControlService;
use super::status::{Refusal, invalid};
use crate::units::HostId;
use crate::workload::vm::{VmEngine, cpu};

/// Why there is no CRIU, where nothing else says it.
const NO_CRIU: &str = "this daemon has no CRIU: install it, or name one that works with \
                       `migrd serve --criu PATH` (or MIGR_CRIU)";

impl ControlService {
    /// Why no process tree can be had here; `None` when it can.
    pub(super) fn criu_problem(&self) -> Option<String> {
        match &self.processes {
            Some(processes) => processes.problem(),
            None => Some(NO_CRIU.to_owned()),
        }
    }

    pub(super) async fn host_itself(&self) -> proto::HostReply {
        let (total, free, reserved) = self.registry.memory();
        let problem = VmEngine::problem();
        // Without KVM nothing is known of what guests could have.
        let cpu = cpu::host().await.ok();
        proto::HostReply {
            host_id: self.registry.host_id().to_string(),
            address: self.here().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: crate::wire::PROTOCOL,
            kernel: crate::sys::kernel_release(),
            cpus: crate::sys::cpus(),
            memory_total_bytes: total,
            memory_free_bytes: free,
            memory_reserved_bytes: reserved,
            kvm: problem.is_none(),
            kvm_problem: problem.unwrap_or_default(),
            workloads: u32::try_from(self.registry.count()).unwrap_or(u32::MAX),
            cpu: cpu.map(|cpu| proto::HostCpu {
                vendor: cpu.vendor(),
                features: cpu.names(),
                tsc_khz: cpu.tsc_khz(),
                tsc_scaling: cpu.scaling(),
            }),
            criu: self.processes.as_ref().and_then(|p| p.version()).unwrap_or_default(),
            criu_problem: self.criu_problem().unwrap_or_default(),
        }
    }

    pub(super) async fn host_of_peer(&self, peer: String) -> Result<proto::HostReply, Status> {
        let asked = self.peers.identify_whole(&peer, self.registry.host_id()).await;
        let found = asked.map_err(|e| {
            Refusal {
                code: Code::FailedPrecondition,
                reason: "PEER",
                message: e.to_string(),
                host: &peer,
                remedy: "check the address, and that migrd runs there",
            }
            .status()
        })?;
        let _: HostId = found.host_id.parse().map_err(|_| invalid(&peer, "it has no host id"))?;
        Ok(proto::HostReply {
            host_id: found.host_id,
            address: peer,
            version: found.version,
            protocol: found.protocol,
            kernel: found.kernel,
            cpus: found.cpus,
            memory_total_bytes: found.memory_total_bytes,
            memory_free_bytes: found.memory_free_bytes,
            memory_reserved_bytes: found.memory_reserved_bytes,
            kvm: found.kvm,
            kvm_problem: found.kvm_problem,
            workloads: found.workloads,
            // What a peer does not tell.
            cpu: None,
            criu: found.criu,
            criu_problem: found.criu_problem,
        })
    }
}
