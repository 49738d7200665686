//! Where things lie in guest-physical memory.

use linux_loader::bootparam::boot_e820_entry;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::BootError;

/// RAM below this is contiguous from 0; what does not fit goes to
/// [`HIGH_RAM_START`]. The hole between holds the IOAPIC, the local APICs, the
/// pages KVM needs for itself and every MMIO device.
pub const LOW_RAM_END: u64 = 3 << 30;
/// RAM that does not fit below [`LOW_RAM_END`] starts here.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// Kernels are loaded from here on; all below is for what the loader writes.
pub const KERNEL_START: u64 = 1 << 20;

pub(super) const GDT: u64 = 0x500;
pub(super) const START_INFO: u64 = 0x6000;
pub(super) const MODULE_LIST: u64 = 0x6040;
pub(super) const MEMORY_MAP: u64 = 0x6100;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const PAGE_TABLES: u64 = 0x9000;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// The first byte that is not free below the BIOS area (a PC keeps its EBDA
/// there).
pub(super) const LOW_RESERVED: u64 = 0x9_fc00;
/// ACPI tables, in the window that a guest without a pointer to them searches
/// for the RSDP (ACPI 6.5, 5.2.5.1).
pub(super) const ACPI_TABLES: u64 = 0xe_0000;
/// Where a PC's firmware starts, `ffff:0` in real mode.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;
/// Room for the tables at [`ACPI_TABLES`].
pub(super) const ACPI_LENGTH: u64 = RESET_VECTOR - ACPI_TABLES;

/// The longest command line in bytes without its NUL. Linux on x86 keeps 2048
/// bytes and drops the rest without a word, so more is refused here.
pub const CMDLINE_MAX: usize = 2047;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// End of the RAM below the hole, in bytes, for a VM of `memory_bytes`.
pub(super) fn low_ram_end(memory_bytes: u64) -> u64 {
    memory_bytes.min(LOW_RAM_END)
}

/// The memory map in e820 terms.
pub(super) fn e820(memory_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, type_| boot_e820_entry { addr, size: end - addr, r#type: type_ };
    let mut map = vec![
        entry(0, LOW_RESERVED, E820_RAM),
        entry(LOW_RESERVED, KERNEL_START, E820_RESERVED),
        entry(KERNEL_START, low_ram_end(memory_bytes), E820_RAM),
    ];
    if let Some(high) = memory_bytes.checked_sub(LOW_RAM_END).filter(|high| *high > 0) {
        map.push(entry(HIGH_RAM_START, HIGH_RAM_START + high, E820_RAM));
    }
    map
}

/// Refuses a VM whose memory can't hold what the loader itself writes.
pub(super) fn check_memory<M: GuestMemoryBackend>(
    mem: &M,
    memory_bytes: u64,
) -> Result<(), BootError> {
    let low = low_ram_end(memory_bytes);
    let high = memory_bytes - low;
    let holds = |start, length: u64| {
        usize::try_from(length).is_ok_and(|length| mem.check_range(GuestAddress(start), length))
    };
    if low <= KERNEL_START || !holds(0, low) || (high > 0 && !holds(HIGH_RAM_START, high)) {
        return Err(BootError::MemoryTooSmall { memory_bytes });
    }
    Ok(())
}
