//! Manifests as daemons send them to each other, field by field.

use migr_proto::v1 as proto;

use crate::units::WorkloadId;
use crate::workload::{Kind, Manifest, StreamKey, StreamSpec};

/// What a virtual machine is called on the wire.
const VM: &str = "vm";
/// What a process tree is called on the wire.
const PROCESS: &str = "process";
/// What a container is called on the wire.
const CONTAINER: &str = "container";

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
        needs,
        follows,
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
            Kind::Process => PROCESS.into(),
            Kind::Container => CONTAINER.into(),
        },
        streams: streams.iter().map(spec).collect(),
        config: config.clone().into(),
        memory_bytes: *memory_bytes,
        cpus: *cpus,
        paused: *paused,
        created_unix_ms: *created_unix_ms,
        needs: needs.clone().into(),
        memory_follows: *follows,
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
        needs,
        memory_follows,
    } = manifest;
    let workload: WorkloadId =
        workload_id.parse().map_err(|e: crate::units::NotAUuid| e.to_string())?;
    let kind = match kind.as_str() {
        VM => Kind::Vm,
        PROCESS => Kind::Process,
        CONTAINER => Kind::Container,
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
        needs: needs.to_vec(),
        follows: memory_follows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_of_every_kind_arrives_as_it_was_sent() {
        for kind in [Kind::Vm, Kind::Process, Kind::Container] {
            let manifest = Manifest {
                workload: WorkloadId::random(),
                name: "job".into(),
                kind,
                streams: vec![StreamSpec {
                    key: StreamKey(7),
                    name: "pages-1".into(),
                    length: 8192,
                    used: 1,
                }],
                config: vec![1, 2, 3],
                memory_bytes: 4096,
                cpus: 2,
                paused: true,
                created_unix_ms: -1,
                needs: vec![4, 5],
                follows: kind == Kind::Process,
            };
            assert_eq!(manifest_from_wire(manifest_to_wire(&manifest)), Ok(manifest));
        }
    }

    #[test]
    fn a_manifest_of_a_kind_that_is_not_known_is_refused() {
        for kind in ["", "VM", "pod", "process "] {
            let sent = proto::Manifest {
                workload_id: WorkloadId::random().to_string(),
                kind: kind.into(),
                ..proto::Manifest::default()
            };
            assert!(manifest_from_wire(sent).unwrap_err().contains("does not know"), "{kind:?}");
        }
    }
}
