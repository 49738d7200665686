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
    mem: Memory,
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
    Machine { vcpu, _vm: vm, mem }
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
    BootSpec { kernel, initrd: None, cmdline, cpus: 1, memory_bytes: RAM }
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
