//! Manifests as daemons send them to each other, field by field.

use migr_proto::v1 as proto;

use crate::units::WorkloadId;
use crate::workload::{Kind, Manifest, StreamKey, StreamSpec};

/// What a virtual machine is called on the wire.
const VM: &str = "vm";

/// A manifest for the wire.
#[must_use]
pub fn manifest_to_wire(manifest: &Manifest) -> proto::Manifest {
    let Manifest {
        workload,
        name,
        kind,
        streams,
        config,
        memory_bytes,
        cpus,
        paused,
        created_unix_ms,
    } = manifest;
    let spec = |spec: &StreamSpec| proto::StreamSpec {
        key: spec.key.0,
        name: spec.name.clone(),
        length: spec.length,
        used: spec.used,
    };
    proto::Manifest {
        workload_id: workload.to_string(),
        name: name.clone(),
        kind: match kind {
            Kind::Vm => VM.into(),
        },
        streams: streams.iter().map(spec).collect(),
        config: config.clone().into(),
        memory_bytes: *memory_bytes,
        cpus: *cpus,
        paused: *paused,
        created_unix_ms: *created_unix_ms,
    }
}

/// A manifest from the wire: only its form is checked here.
///
/// # Errors
/// What is not of the form, in words.
pub fn manifest_from_wire(manifest: proto::Manifest) -> Result<Manifest, String> {
    let proto::Manifest {
        workload_id,
        name,
        kind,
        streams,
        config,
        memory_bytes,
        cpus,
        paused,
        created_unix_ms,
    } = manifest;
    let workload: WorkloadId =
        workload_id.parse().map_err(|e: crate::units::NotAUuid| e.to_string())?;
    let kind = match kind.as_str() {
        VM => Kind::Vm,
        _ => return Err("the manifest is of a kind that this migrd does not know".into()),
    };
    let spec = |spec: proto::StreamSpec| StreamSpec {
        key: StreamKey(spec.key),
        name: spec.name,
        length: spec.length,
        used: spec.used,
    };
    Ok(Manifest {
        workload,
        name,
        kind,
        streams: streams.into_iter().map(spec).collect(),
        config: config.to_vec(),
        memory_bytes,
        cpus,
        paused,
        created_unix_ms,
    })
}
