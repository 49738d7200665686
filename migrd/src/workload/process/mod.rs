//! Process trees as workloads.
//!
//! Owns the daemon's side of a tree: its [`keeper`], its [`images`] on their way
//! through CRIU, its network ([`net`]), and what the traits of
//! [`workload`](super) mean for it. May not touch tonic, KVM or the phases of a
//! migration.
//!
//! A container is a process tree with more around it ([`container`]).
//!
//! [`engine`] makes trees and finds them again, [`running`] is one of this host,
//! [`looking`] says whether it can move, [`leaving`] is one that does, [`arriving`] one
//! that is on its way here.

mod adopting;
mod ahead;
mod alive;
mod arriving;
mod carried;
mod chains;
mod container;
pub mod engine;
mod follow;
pub mod images;
mod keeper;
mod lacking;
mod leaving;
mod left;
mod letting_go;
mod looking;
pub mod net;
mod offered;
pub mod preflight;
mod receiving;
mod recovering;
mod remains;
pub mod rootfs;
mod running;
mod streams;
mod terminal;
mod versions;

use std::path::PathBuf;

use async_trait::async_trait;
use migr_proto::v1::ProcessConfig;

pub use adopting::Candidate;
pub use engine::ProcessEngine;

use super::{ProcessOptions, StreamKey, StreamSpec, Workload, WorkloadError};
use crate::keeper::container::Spec;
use crate::serial_log;
use crate::units::{PAGE_SIZE, WorkloadId};
use images::{FIRST_STREAM, ImagesError};
use keeper::KeeperError;

/// The stream of the log of what a tree prints.
pub const LOG_STREAM: StreamKey = StreamKey(64);
/// The most streams of images that one tree announces.
pub const MAX_IMAGE_STREAMS: u32 = 900;

/// Starts commands as workloads.
#[async_trait]
pub trait Starts: Send + Sync {
    /// Makes the process tree `id` of `config`. It stands still until
    /// [`Workload::resume`].
    ///
    /// # Errors
    /// When it can't be made here; nothing is left of it.
    async fn create(
        &self,
        id: WorkloadId,
        name: &str,
        config: &ProcessConfig,
    ) -> Result<Box<dyn Workload>, WorkloadError>;

    /// Makes the process tree `id` of one that runs already. It stands still until
    /// [`Workload::resume`], which ends the original.
    ///
    /// # Errors
    /// When it can't be made; the original goes on, and nothing is left of the copy.
    async fn adopt(
        &self,
        id: WorkloadId,
        candidate: &Candidate,
    ) -> Result<Box<dyn Workload>, WorkloadError>;

    /// Where the root file system of a container is that it brought along, if it did.
    fn rootfs_of(&self, id: WorkloadId) -> Option<PathBuf>;

    /// Why no process tree can be had here, and what to do; `None` when it can.
    fn problem(&self) -> Option<String>;

    /// The version of the CRIU that works here.
    fn version(&self) -> Option<String>;
}

/// The stream of the log.
#[must_use]
pub fn log_spec() -> StreamSpec {
    StreamSpec { key: LOG_STREAM, name: "output-log".into(), length: serial_log::LENGTH, used: 0 }
}

/// A stream of images, of at most `length` bytes.
#[must_use]
pub fn image_spec(number: u32, length: u64) -> StreamSpec {
    StreamSpec {
        key: StreamKey(FIRST_STREAM + number),
        name: format!("images-{number}"),
        length,
        used: 0,
    }
}

/// Streams that a tree of so many processes can need at its stop.
fn spare_streams(processes: u32) -> u32 {
    processes.saturating_mul(2).saturating_add(16)
}

/// What a tree of so many processes and so much resident memory announces: images
/// may come to more while it runs on, so there is room for twice as much. Where memory
/// can go ahead there are files of each round, too.
fn image_streams(processes: u32, resident: u64, tracks: bool) -> Vec<StreamSpec> {
    let room = resident.saturating_mul(2).max(resident.saturating_add(256 << 20));
    let length = room.div_ceil(PAGE_SIZE) * PAGE_SIZE;
    let rounds = if tracks { spare_streams(processes).saturating_mul(3) } else { 0 };
    let count = spare_streams(processes).saturating_add(rounds).min(MAX_IMAGE_STREAMS);
    (0..count).map(|number| image_spec(number, length)).collect()
}

fn to_wire(options: ProcessOptions) -> migr_proto::v1::ProcessOptions {
    let ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } = options;
    migr_proto::v1::ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections }
}

/// What makes a tree a container, if it is one.
fn container_of(config: &ProcessConfig) -> Result<Option<Spec>, WorkloadError> {
    let Some(container) = &config.container else { return Ok(None) };
    let spec = Spec::parse(&container.spec);
    spec.map(Some).map_err(|e| WorkloadError::caused("what the container is made of is damaged", e))
}

fn told(doing: &str) -> impl Fn(KeeperError) -> WorkloadError + '_ {
    move |error| WorkloadError::new(format!("cannot {doing}: {error}"))
}

fn failed(doing: &str) -> impl Fn(std::io::Error) -> WorkloadError + '_ {
    move |error| WorkloadError::caused(format!("cannot {doing}: {error}"), error)
}

impl From<ImagesError> for WorkloadError {
    fn from(error: ImagesError) -> Self {
        Self::new(error.to_string())
    }
}
