//! What users want to be taken over.

use migr_proto::v1 as proto;
use prost::Message;
use tonic::{Code, Status};

use super::convert;
use super::status::{Refusal, invalid};
use crate::migration::link::Blocker;
use crate::units::{WorkloadId, unix_ms};
use crate::workload::process::Candidate;
use crate::workload::{Kind, Manifest, ProcessOptions};

/// Looks at the process that is meant, and says what is in the way.
pub(super) async fn look(
    here: &str,
    request: &proto::AdoptRequest,
) -> Result<(Candidate, Vec<proto::Blocker>), Status> {
    let proto::AdoptRequest { name: _, pid, dry_run: _, ghost_limit_bytes } = request;
    if *pid == 0 {
        return Err(invalid(here, "say which process, by its number on the daemon's host"));
    }
    let options =
        ProcessOptions { ghost_limit_bytes: *ghost_limit_bytes, ..ProcessOptions::default() };
    let candidate = Candidate::look(*pid, options).await.map_err(|error| {
        let (code, reason, message) = (Code::NotFound, "UNKNOWN_PROCESS", error.to_string());
        let remedy = "name a process of the daemon's host, as `ps` there shows it";
        Refusal { code, reason, message, host: here, remedy }.status()
    })?;
    let found = candidate.problems.iter().cloned();
    let found = found.map(|problem| Blocker::found_on(here, problem));
    let blockers = found.map(|blocker| convert::blocker(&blocker, here)).collect();
    Ok((candidate, blockers))
}

/// What the workload will be.
pub(super) fn manifest(id: WorkloadId, name: String, candidate: &Candidate) -> Manifest {
    Manifest {
        workload: id,
        name,
        kind: Kind::Process,
        streams: Vec::new(),
        config: candidate.config().encode_to_vec(),
        memory_bytes: 0,
        cpus: 0,
        paused: false,
        created_unix_ms: unix_ms(),
        needs: Vec::new(),
        follows: false,
    }
}
