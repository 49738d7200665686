//! Where guest memory lies: in guest-physical addresses and in the memfd.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};

use crate::sys::mapping::{Extent, advise_region};
use crate::sys::vm::Memory;
use crate::units::PAGE_SIZE;

/// Where memory gives way to the local APIC, the I/O APIC and firmware.
const HOLE_START: u64 = 3 << 30;
/// Where memory goes on.
const HOLE_END: u64 = 4 << 30;

/// Memory that cannot be had as asked.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a size that a guest can have.
    #[error("{0} bytes of guest memory: use a multiple of {PAGE_SIZE}, at least one page")]
    Size(u64),
    /// The memfd could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory: {reason}")]
    Map {
        /// How much.
        bytes: u64,
        /// What the system said.
        reason: String,
    },
}

/// The extents of the memfd that are the guest's memory regions, in order.
/// Region `i` is stream `i` of a migration.
///
/// # Errors
/// When no guest can have that much memory.
pub fn extents(memory_bytes: u64) -> Result<Vec<Extent>, MemoryError> {
    let fits = isize::try_from(memory_bytes).is_ok();
    if memory_bytes == 0 || !memory_bytes.is_multiple_of(PAGE_SIZE) || !fits {
        return Err(MemoryError::Size(memory_bytes));
    }
    let low = memory_bytes.min(HOLE_START);
    let mut extents = vec![Extent { offset: 0, length: low }];
    if memory_bytes > low {
        extents.push(Extent { offset: low, length: memory_bytes - low });
    }
    Ok(extents)
}

/// Guest-physical address of a region's first byte.
fn address(extent: Extent) -> GuestAddress {
    GuestAddress(if extent.offset == 0 { 0 } else { HOLE_END })
}

/// Maps the guest's memory from its memfd.
///
/// # Errors
/// When the size is impossible or the mapping fails.
pub fn map(file: File, memory_bytes: u64) -> Result<Memory, MemoryError> {
    let failed =
        |e: &dyn std::fmt::Display| MemoryError::Map { bytes: memory_bytes, reason: e.to_string() };
    let file = Arc::new(file);
    let mut ranges = Vec::new();
    for extent in extents(memory_bytes)? {
        let length = usize::try_from(extent.length).map_err(|e| failed(&e))?;
        let source = FileOffset::from_arc(Arc::clone(&file), extent.offset);
        ranges.push((address(extent), length, Some(source)));
    }
    let memory = Memory::from_ranges_with_files(ranges).map_err(|e| failed(&e))?;
    memory.iter().for_each(advise_region);
    Ok(memory)
}
