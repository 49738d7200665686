//! The zero page of the Linux boot protocol (`Documentation/arch/x86/boot.rst`
//! and `zero-page.rst` in the kernel's sources).

use linux_loader::bootparam::{boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::{BootError, Span, layout, write};

/// A boot loader without an id of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// What is written to the zero page.
#[derive(Debug)]
pub(super) struct ZeroPage {
    /// Of a bzImage; empty for an ELF kernel, which has none.
    pub header: setup_header,
    pub initrd: Option<Span>,
    pub memory_bytes: u64,
    pub rsdp: u64,
}

impl ZeroPage {
    /// Writes it; the command line is in place.
    pub(super) fn write<M: GuestMemoryBackend>(self, mem: &M) -> Result<(), BootError> {
        let Self { header, initrd, memory_bytes, rsdp } = self;
        let mut params =
            boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..boot_params::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = low_address(layout::CMDLINE)?;
        if let Some(Span { start, end }) = initrd {
            params.hdr.ramdisk_image = low_address(start)?;
            params.hdr.ramdisk_size = low_address(end - start)?;
        }
        let map = layout::e820(memory_bytes);
        for (into, entry) in params.e820_table.iter_mut().zip(&map) {
            *into = *entry;
            params.e820_entries += 1;
        }
        write(mem, layout::ZERO_PAGE, params.as_slice(), "zero page")
    }
}

/// What the header of an ELF kernel would say if it had one: enough for the
/// kernel to believe the rest of the page.
pub(super) fn header_of_elf() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        kernel_alignment: 0x0100_0000,
        ..setup_header::default()
    }
}

/// Everything that is pointed to lies below the hole in RAM.
fn low_address(at: u64) -> Result<u32, BootError> {
    u32::try_from(at).map_err(|_| BootError::KernelOutsideMemory {
        start: at,
        end: at,
        ram_end: layout::LOW_RAM_END,
    })
}
