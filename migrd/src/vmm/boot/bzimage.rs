//! Reads and loads a Linux bzImage.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::{BootError, Span, copy, file_length, layout};

/// Where the magic number is.
pub(super) const MAGIC_AT: u64 = 0x202;
/// The magic number.
pub(super) const MAGIC: [u8; 4] = *b"HdrS";

const HEADER_AT: u64 = 0x1f1;
/// The header's length is told by the jump over it, in this byte.
const JUMP_LENGTH_AT: u64 = 0x201;
const SECTOR: u64 = 512;
/// The first with `xloadflags`, which tell of the 64-bit entry (Linux 3.8).
const VERSION_MIN: u16 = 0x20c;
/// Loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// There is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// A bzImage that is in guest memory.
pub(super) struct Image {
    /// Everything the kernel uses before it looks at the memory map.
    pub span: Span,
    /// The 64-bit entry point.
    pub entry: u64,
    /// Its setup header, for the zero page.
    pub header: setup_header,
    /// Where an initrd must end at the latest.
    pub initrd_end: u64,
    /// Most bytes of a command line.
    pub cmdline_max: usize,
}

/// Loads `file` below `ram_end`. Nothing is written before its headers were
/// found good.
pub(super) fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    ram_end: u64,
) -> Result<Image, BootError> {
    let length = file_length(file, "kernel")?;
    let header = read_header(file, length)?;
    check(&header)?;
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup = (sectors + 1) * SECTOR;
    let Some(code) = length.checked_sub(setup).filter(|code| *code > ENTRY_64) else {
        return Err(BootError::Truncated {
            what: "the kernel proper",
            end: setup + ENTRY_64,
            length,
        });
    };

    let start = layout::KERNEL_START;
    let span = Span { start, end: used_until(&header, start, code) };
    if span.end > ram_end {
        return Err(BootError::KernelOutsideMemory { start, end: span.end, ram_end });
    }
    copy(mem, start, file, setup, code, "kernel")?;
    Ok(Image {
        span,
        entry: start + ENTRY_64,
        initrd_end: (u64::from(header.initrd_addr_max) + 1).min(ram_end),
        cmdline_max: usize::try_from(header.cmdline_size).unwrap_or(usize::MAX),
        header,
    })
}

/// End of what a kernel of `code` bytes at `start` takes: it unpacks itself at
/// its preferred address, or at its own if that is higher and it may.
fn used_until(header: &setup_header, start: u64, code: u64) -> u64 {
    let aligned = match header.kernel_alignment {
        0 => start,
        alignment => start.next_multiple_of(u64::from(alignment)),
    };
    let unpacked_at = match header.relocatable_kernel {
        0 => header.pref_address,
        _ => header.pref_address.max(aligned),
    };
    let unpacked_end = unpacked_at.saturating_add(u64::from(header.init_size));
    unpacked_end.max(start.saturating_add(code))
}

/// Reads the header as long as it says it is; a kernel newer than this program
/// may have more fields, which stay unknown, one that is older has fewer.
fn read_header(file: &File, length: u64) -> Result<setup_header, BootError> {
    let read = |buffer: &mut [u8], at| {
        file.read_exact_at(buffer, at).map_err(|source| BootError::Read { what: "kernel", source })
    };
    let mut header = setup_header::default();
    let known = header.as_slice().len();
    let least = MAGIC_AT + 4;
    if length < least {
        return Err(BootError::Truncated { what: "the setup header", end: least, length });
    }
    let mut jump = [0];
    read(&mut jump, JUMP_LENGTH_AT)?;
    let end = MAGIC_AT + u64::from(jump[0]);
    if end > length {
        return Err(BootError::Truncated { what: "the setup header", end, length });
    }
    let says = usize::try_from(end - HEADER_AT).unwrap_or(known);
    let mut bytes = vec![0; known];
    read(&mut bytes[..says.min(known)], HEADER_AT)?;
    header.as_mut_slice().copy_from_slice(&bytes);
    Ok(header)
}

fn check(header: &setup_header) -> Result<(), BootError> {
    let refuse = |what| Err(BootError::SetupHeader { what });
    if header.header != u32::from_le_bytes(MAGIC) {
        return refuse("its setup header ends before its magic number");
    }
    if header.version < VERSION_MIN {
        return refuse("its boot protocol is older than 2.12: use Linux 3.8 or newer");
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return refuse("it is a zImage, made to be loaded below 1 MiB");
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return refuse("it has no 64-bit entry point: use an x86-64 kernel");
    }
    Ok(())
}
