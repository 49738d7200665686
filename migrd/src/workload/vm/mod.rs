//! Virtual machines as workloads.
//!
//! Owns the daemon's side of a VMM child, its view of the guest's memory and
//! the directory of each VM. May not touch tonic, the phases of
//! a migration, or KVM.
//!
//! A VM's streams are its memory regions, numbered from 0, its serial log
//! ([`LOG_STREAM`]), so that the log moves with it, and its disks where they
//! travel too ([`disks::stream`]).

mod arriving;
pub mod child;
mod contents;
pub mod cpu;
pub mod disks;
mod engine;
pub mod link;
pub mod nets;
mod running;
mod states;
mod terminal;

use child::ChildError;

use super::{StreamKey, StreamSpec, WorkloadError};
use crate::serial_log;
use crate::vmm::memory;
use migr_proto::v1::VmConfig;

pub use engine::{NewVm, Site, VmEngine};

/// The serial log's stream.
pub const LOG_STREAM: StreamKey = StreamKey(64);

/// The streams of a VM with so much memory, in bytes.
///
/// # Errors
/// When no VM can have that.
pub fn streams(memory_bytes: u64) -> Result<Vec<StreamSpec>, memory::MemoryError> {
    let extents = memory::extents(memory_bytes)?;
    let mut streams: Vec<_> = (0u32..)
        .zip(&extents)
        .map(|(number, extent)| StreamSpec {
            key: StreamKey(number),
            name: format!("ram{number}"),
            length: extent.length,
            used: 0,
        })
        .collect();
    streams.push(StreamSpec {
        key: LOG_STREAM,
        name: "serial-log".into(),
        length: serial_log::LENGTH,
        used: 0,
    });
    Ok(streams)
}

/// The streams of a VM, with its disks or without.
///
/// # Errors
/// When no VM can have so much memory.
pub fn all_streams(
    config: &VmConfig,
    with_disks: bool,
) -> Result<Vec<StreamSpec>, memory::MemoryError> {
    let mut all = streams(config.memory_bytes)?;
    if with_disks {
        all.extend(disks::streams(&config.disks));
    }
    Ok(all)
}

/// What a child said, as every workload's errors are told.
fn told(doing: &str) -> impl Fn(ChildError) -> WorkloadError + '_ {
    move |error| WorkloadError::new(format!("cannot {doing}: {}", chain(&error)))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn failed(doing: &str) -> impl Fn(std::io::Error) -> WorkloadError + '_ {
    move |error| WorkloadError::caused(format!("cannot {doing}: {error}"), error)
}
