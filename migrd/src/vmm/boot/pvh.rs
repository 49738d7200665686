//! The start info of the PVH boot protocol (Xen's `start_info.h`, version 1).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::{BootError, Span, layout, write};

const MAGIC: u32 = 0x336e_c578;

/// Writes the start info and what it points to; the command line is in place.
pub(super) fn write_start_info<M: GuestMemoryBackend>(
    mem: &M,
    initrd: Option<Span>,
    memory_bytes: u64,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut map = Vec::new();
    let mut entries = 0;
    for entry in layout::e820(memory_bytes) {
        let entry = hvm_memmap_table_entry {
            addr: entry.addr,
            size: entry.size,
            type_: entry.r#type,
            reserved: 0,
        };
        map.extend_from_slice(entry.as_slice());
        entries += 1;
    }
    write(mem, layout::MEMORY_MAP, &map, "memory map")?;
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: entries,
        ..hvm_start_info::default()
    };
    if let Some(Span { start, end }) = initrd {
        let module =
            hvm_modlist_entry { paddr: start, size: end - start, cmdline_paddr: 0, reserved: 0 };
        write(mem, layout::MODULE_LIST, module.as_slice(), "module list")?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::MODULE_LIST;
    }
    write(mem, layout::START_INFO, info.as_slice(), "start info")
}
