//! The disks of a VM that is offered to this host: copies of them, where the
//! offer has their streams, else the images that its source has too.

use std::path::Path;

use migr_proto::v1::{DiskConfig, VmConfig};

use super::config::index_of;
use super::error::DiskError;
use super::holder::Holder;
use super::stream::DiskStreams;
use super::{apart, copies, shared_problems};
use crate::workload::{Manifest, Problem, StreamSpec, WorkloadError};

/// Whether disks are among `streams`.
#[must_use]
pub fn are_brought(streams: &[StreamSpec]) -> bool {
    streams.iter().any(|spec| index_of(spec.key).is_some())
}

/// How many bytes of each disk will come, in the order of the disks.
fn used(streams: &[StreamSpec]) -> Vec<u64> {
    let disks = streams.iter().filter(|spec| index_of(spec.key).is_some());
    disks.map(|spec| spec.used.min(spec.length)).collect()
}

/// What keeps the VM that `manifest` offers from having its disks here. The
/// manifest was checked against the VM's description. Touches nothing.
pub async fn problems(manifest: &Manifest, disks: Vec<DiskConfig>, by: Holder) -> Vec<Problem> {
    let (copied, used) = (are_brought(&manifest.streams), used(&manifest.streams));
    let found = apart(move || {
        let found = if copied {
            copies::problems(&disks, &used, &by)
        } else {
            shared_problems(&disks, &by)
        };
        Ok(found.iter().map(DiskError::problem).collect())
    });
    found.await.unwrap_or_else(|error| {
        vec![Problem::new("engine", error.to_string(), "see the log of this host's migrd")]
    })
}

/// Makes room for the disks that `manifest` says will come, if it does, for the
/// VM in `directory`.
///
/// # Errors
/// When a copy can't be made; [`super::undo`] clears away those that were.
pub async fn make_copies(
    manifest: &Manifest,
    config: &VmConfig,
    by: &Holder,
    directory: &Path,
) -> Result<Option<DiskStreams>, WorkloadError> {
    if !are_brought(&manifest.streams) {
        return Ok(None);
    }
    let (disks, by, directory) = (config.disks.clone(), by.clone(), directory.to_owned());
    apart(move || copies::prepare(&disks, &by, &directory)).await.map(Some)
}
