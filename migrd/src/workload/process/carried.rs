//! The root file system of a container that moves with it, as its source has it, and
//! the directories of those that came here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use migr_proto::v1 as proto;
use prost::Message;
use tokio::task::JoinHandle;

use super::rootfs::{self, Devices, Leaving, ROOTFS_STREAM, RootfsError};
use super::{container_of, failed};
use crate::keeper::container::Spec;
use crate::pages::{PageBitmap, PageSet};
use crate::workload::{Problem, StreamSpec, WorkloadError};

/// What of it was sent.
#[derive(Default)]
pub(super) struct Carried {
    leaving: Option<Arc<Leaving>>,
    /// Why it can't be sent.
    problem: Option<Problem>,
    /// Which file is the next to be sent while the container runs.
    next: usize,
    /// What is sent when it stands still.
    rest: Rest,
    /// What the container had open for writing when it was looked at, by its paths in
    /// the root.
    pub(super) written: Vec<PathBuf>,
}

#[derive(Default)]
enum Rest {
    #[default]
    NotLooked,
    Looking(JoinHandle<Result<PageBitmap, RootfsError>>),
    Given,
}

/// Whether a container's root file system moves with it.
pub(super) fn is_carried(config: &proto::ProcessConfig) -> bool {
    config.container.as_ref().is_some_and(|container| container.rootfs_copied)
}

fn devices(spec: &Spec) -> Devices {
    Devices::and(spec.device_numbers())
}

/// The same for what a peer has sent, or a user has ordered.
pub(super) fn devices_of(config: &proto::ProcessConfig) -> Result<Devices, WorkloadError> {
    Ok(container_of(config)?.as_ref().map(devices).unwrap_or_default())
}

/// What a host makes a container of whose root file system came to `place`.
pub(super) fn at_home(
    config: &proto::ProcessConfig,
    place: &Path,
) -> Result<proto::ProcessConfig, WorkloadError> {
    let mut config = config.clone();
    if let (Some(spec), Some(container)) = (container_of(&config)?, &mut config.container) {
        container.spec = spec.with_rootfs(&rootfs::root_in(place)).into();
    }
    Ok(config)
}

/// Deletes the root file system that came with the container of `directory`, if one did.
pub(super) async fn clear(directory: &Path) {
    let place = rootfs::place_of(directory);
    let removing = place.clone();
    let removed = tokio::task::spawn_blocking(move || rootfs::remove(&removing)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(place = %place.display(), %error, "a root file system stays behind");
    }
}

/// The list in what a container needs. A peer wrote it.
pub(super) fn list_in(needs: &[u8]) -> Option<proto::RootfsList> {
    proto::ProcessNeeds::decode(needs).ok()?.rootfs
}

impl Carried {
    /// Looks at the root file system of a container that is to move, if it goes along.
    pub(super) async fn begin(
        config: &proto::ProcessConfig,
        written: Vec<PathBuf>,
    ) -> Result<Self, WorkloadError> {
        let Some(spec) = container_of(config)?.filter(|_| is_carried(config)) else {
            return Ok(Self::default());
        };
        let looked =
            tokio::task::spawn_blocking(move || Leaving::begin(spec.rootfs(), devices(&spec)));
        let looked = looked
            .await
            .map_err(|e| WorkloadError::caused("looking at its root file system failed", e))?;
        let (leaving, problem) = match looked {
            Ok(leaving) => (Some(Arc::new(leaving)), None),
            Err(error) => {
                let (code, remedy) = match &error {
                    RootfsError::Unfit { code, remedy, .. } => (*code, *remedy),
                    _ => ("rootfs", "see that migrd can read all of it"),
                };
                (None, Some(Problem::new(code, error.to_string(), remedy)))
            }
        };
        Ok(Self { leaving, problem, written, ..Self::default() })
    }

    /// What reads it, if it moves.
    pub(super) fn leaving(&self) -> Option<Arc<Leaving>> {
        self.leaving.clone()
    }

    /// Its stream, if it moves.
    pub(super) fn spec(&self) -> Option<StreamSpec> {
        self.leaving.as_ref().map(|leaving| leaving.spec())
    }

    /// Why it can't be sent.
    pub(super) fn problem(&self) -> Option<Problem> {
        self.problem.clone()
    }

    /// The next part to send while the container runs.
    pub(super) async fn ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        if let Some(Problem { message, remedy, .. }) = &self.problem {
            return Err(WorkloadError::new(format!("{message}: {remedy}")));
        }
        let Some(leaving) = self.leaving.clone() else { return Ok(None) };
        let mut next = self.next;
        let (next, part) =
            rootfs::apart(move || leaving.ahead(&mut next).map(|part| (next, part))).await?;
        self.next = next;
        Ok(part.map(part_of))
    }

    /// Has it looked through once more, now that the container stands still.
    pub(super) fn look_again(&mut self) {
        let (Some(leaving), Rest::NotLooked) = (self.leaving.clone(), &self.rest) else { return };
        let written = self.written.clone();
        self.rest = Rest::Looking(tokio::task::spawn_blocking(move || leaving.rest(&written)));
    }

    /// What was found then; `None` when it was given already.
    pub(super) async fn rest(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        self.look_again();
        let Rest::Looking(looking) = &mut self.rest else { return Ok(None) };
        let looked = looking.await;
        self.rest = Rest::Given;
        let pages = looked.map_err(|error| {
            failed("look at its root file system")(std::io::Error::other(error))
        })??;
        Ok(Some(part_of(pages)))
    }
}

fn part_of(pages: PageBitmap) -> PageSet {
    let mut part = PageSet::default();
    part.set(ROOTFS_STREAM, pages);
    part
}
