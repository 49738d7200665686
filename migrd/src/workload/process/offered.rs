//! What a peer or a snapshot offers, checked, and what of it this host has not.

use migr_proto::v1::{ProcessConfig, ProcessNeeds};
use prost::Message;

use super::engine::check;
use super::images::FIRST_STREAM;
use super::preflight::files;
use super::rootfs::ROOTFS_STREAM;
use super::{LOG_STREAM, MAX_IMAGE_STREAMS, carried, log_spec, versions};
use crate::host_memory::HostMemory;
use crate::workload::{Manifest, Problem, StreamSpec, WorkloadError};

/// What of a tree's needs this host, with its CRIU, has not. A peer wrote them.
pub(super) async fn lacking(needs: &[u8], own_criu: &str) -> Vec<Problem> {
    let remedy = "bring both daemons to the same version";
    let odd = |what: String| vec![Problem::new("engine", what, remedy)];
    let ProcessNeeds { files, resident_bytes, criu, rootfs: _ } = match ProcessNeeds::decode(needs)
    {
        Ok(needs) => needs,
        Err(error) => return odd(format!("what the process tree needs is damaged: {error}")),
    };
    let files = match files::from_wire(files) {
        Ok(files) => files,
        Err(error) => return odd(error.to_string()),
    };
    let compared = tokio::task::spawn_blocking(move || files::compare(&files)).await;
    let mut problems = compared.unwrap_or_else(|error| odd(error.to_string()));
    problems.extend(versions::older(own_criu, &criu));
    let (_, available) = HostMemory::of_this_host().read();
    // Its images are freed as its processes take their memory.
    if resident_bytes > available {
        let (needs, has) = (resident_bytes >> 20, available >> 20);
        let what = format!("its processes have {needs} MiB of memory and {has} MiB are free");
        let remedy = "stop or move something away from that host, or choose another";
        problems.push(Problem::new("memory", what, remedy));
    }
    problems
}

/// The stream of the root file system that comes along, if it does.
pub(super) fn rootfs_of(manifest: &Manifest) -> Option<&StreamSpec> {
    manifest.streams.iter().find(|spec| spec.key == ROOTFS_STREAM)
}

/// What a peer offers, checked.
pub(super) fn offered(manifest: &Manifest) -> Result<ProcessConfig, WorkloadError> {
    let config = ProcessConfig::decode(manifest.config.as_slice()).map_err(|e| {
        WorkloadError::caused("the configuration of the process tree is damaged", e)
    })?;
    check(&config)?;
    let odd = || WorkloadError::new("the streams of a process tree are not as they must be");
    let (mut images, mut others) = (Vec::new(), 1);
    for spec in &manifest.streams {
        match spec.key {
            LOG_STREAM if spec.length == log_spec().length => {}
            ROOTFS_STREAM if carried::is_carried(&config) => others += 1,
            _ => images.push(spec),
        }
    }
    let count = images.len();
    let right = images.iter().zip(FIRST_STREAM..).all(|(spec, key)| {
        spec.key.0 == key && Some(spec.length) == images.first().map(|first| first.length)
    });
    let few = u32::try_from(count).is_ok_and(|count| count <= MAX_IMAGE_STREAMS);
    if !right || !few || count + others != manifest.streams.len() {
        return Err(odd());
    }
    Ok(config)
}
