//! The state in which the first vCPU enters the kernel.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryBackend;

use super::{BootError, Entry, layout, write};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: a guest that finds them off turns caching
/// off for memory it is unsure of.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Selectors that the Linux boot protocol prescribes (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

/// Writes what the first vCPU's registers point to.
pub(super) fn write_tables<M: GuestMemoryBackend>(mem: &M, entry: &Entry) -> Result<(), BootError> {
    let mut sregs = kvm_sregs::default();
    match entry {
        Entry::Pvh { .. } => set_segments(&mut sregs, Width::Protected32),
        Entry::Linux64 { .. } => {
            set_segments(&mut sregs, Width::Long64);
            write_page_tables(mem)?;
        }
    }
    write_gdt(mem, &sregs)
}

/// Points `vcpu`, the first one, at the kernel that [`super::load`] put into
/// its memory. The other vCPUs stay as KVM made them and wait for a start-up
/// interrupt.
///
/// # Errors
/// When KVM refuses the state.
pub fn configure_vcpu(vcpu: &VcpuFd, entry: &Entry) -> Result<(), BootError> {
    let vcpu_error = |what| move |source| BootError::Vcpu { what, source };
    let mut sregs = vcpu.get_sregs().map_err(vcpu_error("system registers"))?;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..kvm_regs::default() };
    match *entry {
        Entry::Pvh { entry } => {
            set_segments(&mut sregs, Width::Protected32);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            regs.rip = entry.into();
            regs.rbx = layout::START_INFO;
        }
        Entry::Linux64 { entry } => {
            set_segments(&mut sregs, Width::Long64);
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = entry;
            regs.rsi = layout::ZERO_PAGE;
        }
    }
    vcpu.set_sregs(&sregs).map_err(vcpu_error("system registers"))?;
    vcpu.set_regs(&regs).map_err(vcpu_error("registers"))?;
    set_memory_type(vcpu)
}

fn set_memory_type(vcpu: &VcpuFd) -> Result<(), BootError> {
    let entry =
        kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_WRITE_BACK, ..Default::default() };
    let refused = |source| BootError::Vcpu { what: "memory type", source };
    let msrs =
        Msrs::from_entries(&[entry]).map_err(|_| refused(kvm_ioctls::Error::new(libc::ENOMEM)))?;
    match vcpu.set_msrs(&msrs).map_err(refused)? {
        1 => Ok(()),
        _ => Err(refused(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Protected32,
    Long64,
}

/// Flat segments of the whole address space, and a task segment, without which
/// Intel CPUs refuse to run a guest.
fn set_segments(sregs: &mut kvm_sregs, width: Width) {
    let long = width == Width::Long64;
    let flat = |selector, type_, l: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!l),
        s: 1,
        l: u8::from(l),
        g: 1,
        ..kvm_segment::default()
    };
    let code = flat(CODE_SELECTOR, 0xb, long);
    let data = flat(DATA_SELECTOR, 0x3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 0xb,
        present: 1,
        ..kvm_segment::default()
    };
    // Two words for each of: two unused, code, data, task (which takes two).
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: 6 * 8 - 1, ..kvm_dtable::default() };
    sregs.idt = kvm_dtable::default();
}

/// Packs a segment into its 8-byte descriptor (Intel SDM 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flag = |value: u8, bit: u32| u64::from(value) << bit;
    (limit & 0xffff)
        | ((segment.base & 0xff_ffff) << 16)
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | ((limit >> 16 & 0xf) << 48)
        | flag(segment.avl, 52)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
        | ((segment.base >> 24 & 0xff) << 56)
}

fn write_gdt<M: GuestMemoryBackend>(mem: &M, sregs: &kvm_sregs) -> Result<(), BootError> {
    let entries = [0, 0, descriptor(&sregs.cs), descriptor(&sregs.ds), descriptor(&sregs.tr), 0];
    write(mem, layout::GDT, entries.map(u64::to_le_bytes).as_flattened(), "GDT")
}

/// Maps the first 4 GiB to themselves with 2 MiB pages: kernel, initrd, zero
/// page and command line all lie there.
fn write_page_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    const TABLE_BYTES: u64 = 4096;
    const DIRECTORIES: u64 = 4;
    let pointers = layout::PAGE_TABLES + TABLE_BYTES;
    let directory = |index| pointers + TABLE_BYTES * (1 + index);
    let put = |at, entries: Vec<u64>| {
        let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        write(mem, at, &bytes, "page tables")
    };
    put(layout::PAGE_TABLES, vec![pointers | PAGE_PRESENT_WRITABLE])?;
    put(pointers, (0..DIRECTORIES).map(|n| directory(n) | PAGE_PRESENT_WRITABLE).collect())?;
    put(
        directory(0),
        (0..DIRECTORIES * 512).map(|n| n << 21 | PAGE_LARGE | PAGE_PRESENT_WRITABLE).collect(),
    )
}
