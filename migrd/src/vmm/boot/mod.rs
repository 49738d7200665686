//! Puts a kernel into fresh guest memory and points the first vCPU at it.
//!
//! Owns what the guest finds at its first instruction: kernel, initrd, command
//! line, memory map, ACPI tables, registers. May not touch devices, nor open
//! files: it reads the ones it is given, and believes nothing they say.
//!
//! Three ways in, by what the file is:
//!
//! | file | entry |
//! |---|---|
//! | ELF with the note `XEN_ELFNOTE_PHYS32_ENTRY` | PVH: 32-bit, paging off |
//! | any other ELF | Linux 64-bit boot protocol at the ELF entry |
//! | bzImage | Linux 64-bit boot protocol at 0x200 in the loaded part |
//!
//! Why the other vCPUs are described by ACPI: `docs/decisions/0002-smp-tables.md`.

pub mod acpi;
mod bzimage;
mod elf;
mod error;
pub mod layout;
mod mp;
mod pvh;
mod vcpu;
mod zero_page;

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use error::BootError;
pub use vcpu::configure_vcpu;
use zero_page::ZeroPage;

/// All the firmware there is: a reset, in 16-bit code. Linux, finding
/// hardware-reduced ACPI and no EFI, reboots by jumping here rather than by
/// the reset register.
#[rustfmt::skip]
const RESET_CODE: [u8; 7] = [
    0xb0, acpi::RESET_VALUE, // mov al, 0xfe
    0xe6, 0x64,              // out 0x64, al
    0xf4, 0xeb, 0xfd,        // hlt; jmp to the hlt
];

/// What to boot.
#[derive(Debug)]
pub struct BootSpec<'a> {
    /// The kernel: ELF or bzImage.
    pub kernel: &'a mut File,
    /// The initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What the guest can't find by probing.
    pub devices: &'a [acpi::MmioDevice],
    /// Size of the VM's RAM in bytes, laid out as [`layout`] says.
    pub memory_bytes: u64,
    /// It has a clock chip and a power button.
    pub platform: bool,
}

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode, paging off, EBX points to the start info.
    Pvh {
        /// Physical address of the first instruction.
        entry: u32,
    },
    /// Linux 64-bit boot protocol: long mode on identity page tables, RSI
    /// points to the zero page.
    Linux64 {
        /// Physical address of the first instruction.
        entry: u64,
    },
}

/// An address range that something occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: u64,
    end: u64,
}

/// Loads everything a guest needs to boot into `mem`, which must be fresh:
/// what is not written is taken to be zero.
///
/// # Errors
/// When the specification or a file is not usable; see [`BootError`].
pub fn load<M: GuestMemoryBackend>(mem: &M, spec: BootSpec<'_>) -> Result<Entry, BootError> {
    let BootSpec { kernel, initrd, cmdline, cpus, devices, memory_bytes, platform } = spec;
    layout::check_memory(mem, memory_bytes)?;
    check_cmdline(cmdline, layout::CMDLINE_MAX)?;
    acpi::check_cpus(cpus)?;
    let rsdp = acpi::write_tables(mem, acpi::Described { cpus, platform, devices })?;
    mp::write_pointer(mem)?;
    write(mem, layout::CMDLINE, cmdline.as_bytes(), "command line")?;
    let entry = match format(kernel)? {
        Format::Elf => load_elf(mem, kernel, initrd, memory_bytes, rsdp)?,
        Format::BzImage => {
            let ram_end = layout::low_ram_end(memory_bytes);
            let image = bzimage::load(mem, kernel, ram_end)?;
            check_cmdline(cmdline, image.cmdline_max.min(layout::CMDLINE_MAX))?;
            let initrd = place_initrd(mem, initrd, image.span.end, image.initrd_end)?;
            ZeroPage { header: image.header, initrd, memory_bytes, rsdp }.write(mem)?;
            Entry::Linux64 { entry: image.entry }
        }
    };
    vcpu::write_tables(mem, &entry)?;
    write(mem, layout::RESET_VECTOR, &RESET_CODE, "reset vector")?;
    Ok(entry)
}

fn load_elf<M: GuestMemoryBackend>(
    mem: &M,
    kernel: &mut File,
    initrd: Option<&mut File>,
    memory_bytes: u64,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let ram_end = layout::low_ram_end(memory_bytes);
    let image = elf::load(mem, kernel, ram_end)?;
    let initrd = place_initrd(mem, initrd, image.span.end, ram_end)?;
    if let Some(entry) = image.pvh_entry {
        pvh::write_start_info(mem, initrd, memory_bytes, rsdp)?;
        return Ok(Entry::Pvh { entry });
    }
    let header = zero_page::header_of_elf();
    ZeroPage { header, initrd, memory_bytes, rsdp }.write(mem)?;
    Ok(Entry::Linux64 { entry: image.entry })
}

enum Format {
    Elf,
    BzImage,
}

fn format(kernel: &File) -> Result<Format, BootError> {
    let read = |what, at| {
        let mut magic = [0; 4];
        match kernel.read_exact_at(&mut magic, at) {
            Ok(()) => Ok(Some(magic)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(source) => Err(BootError::Read { what, source }),
        }
    };
    if read("kernel", 0)? == Some(elf::MAGIC) {
        Ok(Format::Elf)
    } else if read("kernel", bzimage::MAGIC_AT)? == Some(bzimage::MAGIC) {
        Ok(Format::BzImage)
    } else {
        Err(BootError::UnknownFormat)
    }
}

fn check_cmdline(cmdline: &str, limit: usize) -> Result<(), BootError> {
    if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { at });
    }
    if cmdline.len() > limit {
        return Err(BootError::CmdlineTooLong { length: cmdline.len(), limit });
    }
    Ok(())
}

/// Reads the initrd to the highest pages that end at or below `limit`, so that
/// a kernel that unpacks itself upwards does not meet it.
fn place_initrd<M: GuestMemoryBackend>(
    mem: &M,
    initrd: Option<&mut File>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<Span>, BootError> {
    const PAGE_MASK: u64 = crate::units::PAGE_SIZE - 1;
    let Some(file) = initrd else { return Ok(None) };
    let length = file_length(file, "initrd")?;
    if length == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let floor = (kernel_end + PAGE_MASK) & !PAGE_MASK;
    let room = limit.saturating_sub(floor);
    let start = limit.checked_sub(length).map(|start| start & !PAGE_MASK);
    let Some(start) = start.filter(|start| *start >= floor) else {
        return Err(BootError::InitrdTooLarge { length, room, limit });
    };
    copy(mem, start, file, 0, length, "initrd")?;
    Ok(Some(Span { start, end: start + length }))
}

fn file_length(file: &File, what: &'static str) -> Result<u64, BootError> {
    let metadata = file.metadata().map_err(|source| BootError::Read { what, source })?;
    Ok(metadata.len())
}

/// Copies `length` bytes of `file` from `offset` on to guest address `at`. The
/// caller has checked that both exist.
fn copy<M: GuestMemoryBackend>(
    mem: &M,
    at: u64,
    file: &mut File,
    offset: u64,
    length: u64,
    what: &'static str,
) -> Result<(), BootError> {
    file.seek(SeekFrom::Start(offset)).map_err(|source| BootError::Read { what, source })?;
    let length = usize::try_from(length).map_err(|_| BootError::KernelOutsideMemory {
        start: at,
        end: u64::MAX,
        ram_end: 0,
    })?;
    mem.read_exact_volatile_from(GuestAddress(at), file, length)
        .map_err(|source| BootError::GuestMemory { what, source })
}

fn write<M: GuestMemoryBackend>(
    mem: &M,
    at: u64,
    bytes: &[u8],
    what: &'static str,
) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::GuestMemory { what, source })
}

#[cfg(test)]
mod tests;
