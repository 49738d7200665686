//! Boots hand-made kernels on real KVM, and feeds the loader damaged ones.

use std::fs::File;
use std::io::Write;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::*;

type Memory = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
const KERNEL_AT: u64 = 2 * MIB;
const DEBUG_PORT: u16 = 0x402;

fn memory(bytes: u64) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), usize::try_from(bytes).unwrap())]).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF executable of one segment at `at`, with a PVH note if asked for.
fn elf(at: u64, code: &[u8], pvh: bool) -> Vec<u8> {
    let note: Vec<u8> = [4_u32, 4, 18]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .chain(*b"Xen\0")
        .chain(u32::try_from(at).unwrap().to_le_bytes())
        .collect();
    let (code_at, note_at) = (0x1000_u64, 0x200_u64);
    let mut out = vec![0; 0x1000];
    out[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    out[16..18].copy_from_slice(&2_u16.to_le_bytes());
    out[18..20].copy_from_slice(&62_u16.to_le_bytes());
    out[24..32].copy_from_slice(&at.to_le_bytes());
    out[32..40].copy_from_slice(&64_u64.to_le_bytes());
    out[54..56].copy_from_slice(&56_u16.to_le_bytes());
    out[56..58].copy_from_slice(&if pvh { 2_u16 } else { 1 }.to_le_bytes());
    let length = u64::try_from(code.len()).unwrap();
    let mut header = |at: usize, kind: u32, offset: u64, address: u64, length: u64, memory: u64| {
        out[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (index, value) in [offset, 0, address, length, memory].into_iter().enumerate() {
            let at = at + 8 + index * 8;
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(64, 1, code_at, at, length, length + 64);
    if pvh {
        header(120, 4, note_at, 0, 20, 20);
        out[0x200..0x200 + note.len()].copy_from_slice(&note);
    }
    out.extend_from_slice(code);
    out
}

struct Machine {
    // Dropped before the memory it maps.
    vcpu: VcpuFd,
    _vm: VmFd,
    _mem: Memory,
}

fn machine(mem: Memory, entry: &Entry) -> Machine {
    let kvm = Kvm::new().expect("/dev/kvm must exist and be usable: load kvm_intel or kvm_amd");
    let vm = kvm.create_vm().unwrap();
    vm.set_tss_address(0xfffb_d000).unwrap();
    vm.create_irq_chip().unwrap();
    for (slot, region) in (0..).zip(mem.iter()) {
        let host = region.get_host_address(MemoryRegionAddress(0)).unwrap();
        crate::sys::kvm_state::map_test_memory(
            &vm,
            kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: u64::try_from(host.addr()).unwrap(),
                flags: 0,
            },
        );
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    configure_vcpu(&vcpu, entry).unwrap();
    Machine { vcpu, _vm: vm, _mem: mem }
}

/// Runs until `hlt` or an exit that is no output, and returns what the guest
/// wrote to the debug port.
fn output(machine: &mut Machine) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        match machine.vcpu.run().unwrap() {
            VcpuExit::IoOut(DEBUG_PORT, [0xff]) => return out,
            VcpuExit::IoOut(DEBUG_PORT, data) => out.extend_from_slice(data),
            other => panic!("unexpected exit after {out:?}: {other:?}"),
        }
    }
}

fn spec<'a>(kernel: &'a mut File, cmdline: &'a str) -> BootSpec<'a> {
    let (cpus, devices) = (1, &[]);
    BootSpec { kernel, initrd: None, cmdline, cpus, devices, memory_bytes: RAM, platform: true }
}

#[test]
fn pvh_kernel_runs_and_finds_its_start_info() {
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0x02, 0x04,       // mov dx, 0x402
        0x8b, 0x03, 0xef,             // mov eax, [ebx]; out dx, eax: magic
        0x8b, 0x43, 0x04, 0xef,       // mov eax, [ebx+4]; out dx, eax: version
        0x8b, 0x4b, 0x18,             // mov ecx, [ebx+0x18]: command line
        0x8b, 0x01, 0xef,             // mov eax, [ecx]; out dx, eax
        0xb0, 0xff, 0xee,             // mov al, 0xff; out dx, al
        0xf4,
    ];
    let mem = memory(RAM);
    let mut kernel = file(&elf(KERNEL_AT, &code, true));
    let entry = load(&mem, spec(&mut kernel, "root")).unwrap();
    assert_eq!(entry, Entry::Pvh { entry: u32::try_from(KERNEL_AT).unwrap() });
    let mut machine = machine(mem, &entry);
    assert_eq!(output(&mut machine), b"\x78\xc5\x6e\x33\x01\0\0\0root");
}

#[test]
fn bzimage_runs_at_its_64_bit_entry_and_finds_its_zero_page() {
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0x02, 0x04,             // mov dx, 0x402
        0x8b, 0x86, 0x02, 0x02, 0, 0, 0xef, // mov eax, [rsi+0x202]; out dx, eax: magic
        0x8b, 0x86, 0xe8, 0x01, 0, 0, 0xee, // mov eax, [rsi+0x1e8]; out dx, al: e820 entries
        0x8b, 0x8e, 0x28, 0x02, 0, 0,       // mov ecx, [rsi+0x228]: command line
        0x8b, 0x01, 0xef,                   // mov eax, [rcx]; out dx, eax
        0x8b, 0x8e, 0x18, 0x02, 0, 0,       // mov ecx, [rsi+0x218]: initrd
        0x8b, 0x01, 0xef,                   // mov eax, [rcx]; out dx, eax
        0x8b, 0x46, 0x70, 0x8b, 0x00, 0xef, // mov eax, [rsi+0x70]; mov eax, [rax]; out dx, eax: RSDP
        0xb0, 0xff, 0xee,                   // mov al, 0xff; out dx, al
        0xf4,
    ];
    let mem = memory(RAM);
    let mut kernel = file(&bzimage(&code));
    let mut initrd = file(b"disk");
    let spec = BootSpec { initrd: Some(&mut initrd), ..spec(&mut kernel, "root") };
    let entry = load(&mem, spec).unwrap();
    assert_eq!(entry, Entry::Linux64 { entry: MIB + 0x200 });
    let mut machine = machine(mem, &entry);
    assert_eq!(output(&mut machine), b"HdrS\x03rootdiskRSD ");
}

#[test]
fn jump_to_the_firmware_pulses_the_reset_line() {
    let mem = memory(RAM);
    let mut kernel = file(&elf(KERNEL_AT, &[0xf4], true));
    let entry = load(&mem, spec(&mut kernel, "")).unwrap();
    let mut machine = machine(mem, &entry);
    let mut sregs = machine.vcpu.get_sregs().unwrap();
    sregs.cr0 &= !1;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
        (segment.selector, segment.base, segment.limit, segment.g, segment.db) =
            (0, 0, 0xffff, 0, 0);
    }
    sregs.cs = sregs.ds;
    (sregs.cs.selector, sregs.cs.base) = (0xffff, 0xf_fff0);
    machine.vcpu.set_sregs(&sregs).unwrap();
    let mut regs = machine.vcpu.get_regs().unwrap();
    regs.rip = 0;
    machine.vcpu.set_regs(&regs).unwrap();
    match machine.vcpu.run().unwrap() {
        VcpuExit::IoOut(acpi::RESET_PORT, [acpi::RESET_VALUE]) => {}
        other => panic!("unexpected exit: {other:?}"),
    }
}

#[test]
fn elf_without_a_pvh_note_is_entered_in_long_mode() {
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0x02, 0x04,             // mov dx, 0x402
        0x48, 0xb8, 1, 0, 0, 0, 1, 0, 0, 0, // mov rax, 0x1_0000_0001
        0x48, 0xc1, 0xe8, 0x20,             // shr rax, 32
        0xee,                               // out dx, al: 1 only in long mode
        0x8b, 0x86, 0x02, 0x02, 0, 0, 0xef, // mov eax, [rsi+0x202]; out dx, eax
        0xb0, 0xff, 0xee,
        0xf4,
    ];
    let mem = memory(RAM);
    let mut kernel = file(&elf(KERNEL_AT, &code, false));
    let entry = load(&mem, spec(&mut kernel, "")).unwrap();
    let mut machine = machine(mem, &entry);
    assert_eq!(output(&mut machine), b"\x01HdrS");
}

/// A bzImage of one setup sector whose 64-bit entry is `code`.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 0x400 + 0x200];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x100_0000_u32.to_le_bytes());
    out.extend_from_slice(code);
    out
}

fn failure(kernel: &[u8]) -> BootError {
    load(&memory(RAM), spec(&mut file(kernel), "")).unwrap_err()
}

fn patched(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn file_that_is_no_kernel_is_refused() {
    assert!(matches!(failure(b""), BootError::UnknownFormat));
    assert!(matches!(failure(b"#!/bin/sh"), BootError::UnknownFormat));
    assert!(matches!(failure(&[0; 4096]), BootError::UnknownFormat));
}

#[test]
fn truncated_kernel_is_refused_before_anything_is_loaded() {
    let image = elf(KERNEL_AT, &[0xf4; 100], true);
    for length in [5, 63, 70, 0x1000, image.len() - 1] {
        let error = failure(&image[..length]);
        assert!(matches!(error, BootError::Truncated { .. }), "{length}: {error}");
    }
    let image = bzimage(&[0xf4; 16]);
    for length in [0x206, 0x230, 0x400, 0x600] {
        let error = failure(&image[..length]);
        assert!(matches!(error, BootError::Truncated { .. }), "{length}: {error}");
    }
}

#[test]
fn kernel_outside_memory_is_refused() {
    let error = failure(&elf(RAM, &[0xf4], true));
    assert!(matches!(error, BootError::KernelOutsideMemory { start: RAM, .. }), "{error}");
    let huge = patched(elf(KERNEL_AT, &[0xf4], true), 64 + 40, &u64::MAX.to_le_bytes());
    assert!(matches!(failure(&huge), BootError::KernelOutsideMemory { .. }));
    let unpacks_too_far = patched(bzimage(&[0xf4]), 0x260, &u32::MAX.to_le_bytes());
    assert!(matches!(failure(&unpacks_too_far), BootError::KernelOutsideMemory { .. }));
}

#[test]
fn kernel_over_the_boot_tables_is_refused() {
    let error = failure(&elf(0x7000, &[0xf4], true));
    assert!(matches!(error, BootError::KernelTooLow { start: 0x7000 }), "{error}");
}

#[test]
fn segments_that_overlap_are_refused() {
    let image = elf(KERNEL_AT, &[0xf4], true);
    let second: Vec<u8> = image[64..120].to_vec();
    let error = failure(&patched(image, 120, &second));
    assert!(matches!(error, BootError::SegmentsOverlap { at: KERNEL_AT }), "{error}");
}

#[test]
fn entry_outside_the_kernel_is_refused() {
    let image = patched(elf(KERNEL_AT, &[0xf4], false), 24, &0x50_0000_u64.to_le_bytes());
    assert!(matches!(failure(&image), BootError::EntryOutsideKernel { entry: 0x50_0000 }));
}

#[test]
fn elf_without_segments_is_refused() {
    let image = patched(elf(KERNEL_AT, &[0xf4], false), 56, &0_u16.to_le_bytes());
    assert!(matches!(failure(&image), BootError::NoSegments));
}

#[test]
fn elf_of_another_kind_is_refused() {
    let image = || elf(KERNEL_AT, &[0xf4], true);
    for (at, bytes) in [(4, [1, 1]), (5, [2, 1]), (16, [3, 0]), (18, [183, 0]), (54, [32, 0])] {
        let error = failure(&patched(image(), at, &bytes));
        assert!(matches!(error, BootError::ElfHeader { .. }), "{at}: {error}");
    }
}

#[test]
fn bzimage_that_cannot_be_entered_in_64_bit_mode_is_refused() {
    let image = || bzimage(&[0xf4]);
    for (at, bytes) in [(0x206, [9, 2]), (0x211, [0, 0]), (0x236, [0, 0])] {
        let error = failure(&patched(image(), at, &bytes));
        assert!(matches!(error, BootError::SetupHeader { .. }), "{at:#x}: {error}");
    }
}

#[test]
fn command_line_that_the_kernel_would_cut_is_refused() {
    let mut kernel = file(&elf(KERNEL_AT, &[0xf4], true));
    let fits = "x".repeat(layout::CMDLINE_MAX);
    load(&memory(RAM), spec(&mut kernel, &fits)).unwrap();
    let error = load(&memory(RAM), spec(&mut kernel, &format!("{fits}x"))).unwrap_err();
    assert!(matches!(error, BootError::CmdlineTooLong { length: 2048, limit: 2047 }), "{error}");
    let error = load(&memory(RAM), spec(&mut kernel, "a\0b")).unwrap_err();
    assert!(matches!(error, BootError::CmdlineNul { at: 1 }), "{error}");
    let takes_less = patched(bzimage(&[0xf4]), 0x238, &4_u32.to_le_bytes());
    let error = load(&memory(RAM), spec(&mut file(&takes_less), "quiet")).unwrap_err();
    assert!(matches!(error, BootError::CmdlineTooLong { length: 5, limit: 4 }), "{error}");
}

#[test]
fn initrd_that_does_not_fit_is_refused() {
    let mut kernel = file(&elf(KERNEL_AT, &[0xf4], true));
    let mut initrd = tempfile::tempfile().unwrap();
    for (length, fits) in [(RAM, false), (RAM - MIB, false), (RAM - 3 * MIB, true)] {
        initrd.set_len(length).unwrap();
        let spec = BootSpec { initrd: Some(&mut initrd), ..spec(&mut kernel, "") };
        match load(&memory(RAM), spec) {
            Ok(_) => assert!(fits, "{length}"),
            Err(error) => {
                assert!(!fits && matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
            }
        }
    }
    initrd.set_len(0).unwrap();
    let spec = BootSpec { initrd: Some(&mut initrd), ..spec(&mut kernel, "") };
    assert!(matches!(load(&memory(RAM), spec), Err(BootError::InitrdEmpty)));
}

#[test]
fn initrd_ends_where_the_kernel_says_it_must() {
    let image = patched(bzimage(&[0xf4]), 0x22c, &0x2ff_ffff_u32.to_le_bytes());
    let mem = memory(RAM);
    let mut initrd = file(b"disk");
    let mut kernel = file(&image);
    let spec = BootSpec { initrd: Some(&mut initrd), ..spec(&mut kernel, "") };
    load(&mem, spec).unwrap();
    let at: u32 = mem.read_obj(GuestAddress(layout::ZERO_PAGE + 0x218)).unwrap();
    assert_eq!(at, 0x2ff_f000);
}

#[test]
fn vcpus_that_cannot_be_described_are_refused() {
    let mut kernel = file(&elf(KERNEL_AT, &[0xf4], true));
    for (cpus, good) in [(0, false), (1, true), (255, true), (256, false), (u32::MAX, false)] {
        let result = load(&memory(RAM), BootSpec { cpus, ..spec(&mut kernel, "") });
        assert_eq!(result.is_ok(), good, "{cpus}");
        assert!(good || matches!(result, Err(BootError::Cpus { .. })));
    }
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let mut kernel = file(&elf(KERNEL_AT, &[0xf4], true));
    for memory_bytes in [0, 4096, MIB, RAM + MIB, 5 << 30, u64::MAX] {
        let result = load(&memory(RAM), BootSpec { memory_bytes, ..spec(&mut kernel, "") });
        assert!(matches!(result, Err(BootError::MemoryTooSmall { .. })), "{memory_bytes}");
    }
}

#[test]
fn memory_map_has_a_hole_below_4_gib() {
    let map = layout::e820(8 << 30);
    let spans: Vec<_> = map.iter().map(|e| (e.addr, e.addr + e.size, e.r#type)).collect();
    assert_eq!(spans[2..], [(MIB, 3 << 30, 1), (4 << 30, 9 << 30, 1)]);
    assert_eq!(layout::e820(3 << 30).len(), 3);
}

#[test]
fn acpi_tables_are_well_formed_and_list_every_vcpu() {
    for platform in [false, true] {
        check_acpi_tables(platform);
    }
}

fn check_acpi_tables(platform: bool) {
    let mem = memory(RAM);
    let described = acpi::Described { cpus: 255, platform, devices: &[] };
    let rsdp_at = acpi::write_tables(&mem, described).unwrap();
    let bytes = |at: u64, length: usize| {
        let mut bytes = vec![0; length];
        mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let rsdp = bytes(rsdp_at, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let table = |at: u64| {
        let length: u32 = mem.read_obj(GuestAddress(at + 4)).unwrap();
        let table = bytes(at, usize::try_from(length).unwrap());
        assert_eq!(sum(&table), 0, "checksum of the table at {at:#x}");
        assert!(at + u64::from(length) <= layout::KERNEL_START);
        table
    };
    let address =
        |table: &[u8], at: usize| u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
    let xsdt = table(address(&rsdp, 24));
    assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
    let fadt = table(address(&xsdt, 36));
    assert_eq!(&fadt[..4], b"FACP");
    let dsdt = table(address(&fadt, 140));
    assert_eq!(&dsdt[..4], b"DSDT");
    let describes = |what: &[u8]| dsdt.windows(what.len()).any(|name| name == what);
    assert!(describes(b"COM1"));
    assert_eq!(describes(b"ACPI0013") && describes(b"RTC_") && describes(b"PWRB"), platform);
    // The boot flags' bit that says that there is no CMOS clock.
    assert_eq!(fadt[109] & (1 << 5) == 0, platform);
    assert_eq!(fadt[108], if platform { 0x32 } else { 0 });
    let madt = table(address(&xsdt, 44));
    assert_eq!(&madt[..4], b"APIC");
    let mut entries = &madt[44..];
    let mut ids = Vec::new();
    while let [kind, length, rest @ ..] = entries {
        if *kind == 0 {
            assert_eq!(rest[2] & 1, 1, "enabled");
            ids.push(rest[1]);
        }
        entries = &entries[usize::from(*length)..];
    }
    assert_eq!(ids, (0..255).collect::<Vec<u8>>());
}

proptest::proptest! {
    #[test]
    fn damaged_headers_never_panic(
        of_elf: bool,
        changes in proptest::collection::vec((0_usize..0x280, proptest::num::u8::ANY), 1..12),
        length in 0_usize..0x1100,
    ) {
        let mut image = if of_elf { elf(KERNEL_AT, &[0xf4; 64], true) } else { bzimage(&[0xf4; 64]) };
        for (at, value) in changes {
            image[at] = value;
        }
        // Half of the cases keep their length.
        if length.is_multiple_of(2) {
            image.truncate(length);
        }
        let mem = memory(RAM);
        let mut kernel = file(&image);
        if let Ok(entry) = load(&mem, spec(&mut kernel, "x")) {
            let at = match entry {
                Entry::Pvh { entry } => u64::from(entry),
                Entry::Linux64 { entry } => entry,
            };
            proptest::prop_assert!((MIB..RAM).contains(&at), "{at:#x}");
        }
    }
}

#[test]
fn virtio_devices_are_announced_each_with_its_place_and_interrupt() {
    let mem = memory(RAM);
    let device = |address, gsi| acpi::MmioDevice { address, length: 0x1000, gsi };
    let write = |devices: &[_]| {
        acpi::write_tables(&mem, acpi::Described { cpus: 1, platform: true, devices })
    };
    write(&[device(0xd000_0000, 16), device(0xd000_1000, 5)]).unwrap();
    let mut tables = vec![0; 4096];
    mem.read_slice(&mut tables, GuestAddress(layout::ACPI_TABLES)).unwrap();
    let count = |wanted: &[u8]| tables.windows(wanted.len()).filter(|w| *w == wanted).count();
    assert_eq!(count(b"LNRO0005\0"), 2);
    // Memory32Fixed, 9 bytes, writable; Interrupt, 6 bytes, consumer and edge
    // (ACPI 6.5, 6.4.3.4 and 6.4.3.6).
    for (place, gsi) in [(0x00, 16), (0x10, 5)] {
        assert_eq!(count(&[0x86, 9, 0, 1, 0, place, 0, 0xd0, 0, 0x10, 0, 0]), 1);
        assert_eq!(count(&[0x89, 6, 0, 3, 1, gsi, 0, 0, 0]), 1);
    }
    let far = write(&[device(1 << 32, 16)]);
    assert!(matches!(far, Err(BootError::DeviceAddress { .. })));
}
