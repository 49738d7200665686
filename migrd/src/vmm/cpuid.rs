//! What a guest's CPUs say of themselves.
//!
//! The base is what this host's KVM supports, unfiltered: a guest gets the
//! features of the host it is started on and keeps them when it moves. (On a
//! KVM that itself runs in a VM, these are the outer machine's features as far
//! as that KVM can emulate them.) On top of it:
//!
//! - the topology is one package of `cpus` single-threaded cores, whose APIC
//!   ids count from 0, as the ACPI tables say;
//! - the hypervisor bit is set and KVM's own leaves are kept, so that a guest
//!   finds kvmclock;
//! - the TSC deadline timer and x2APIC are offered, which the in-kernel APIC
//!   emulates whether or not the host has them.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// CPUID can't be made for a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not tell what it supports.
    #[error("KVM did not tell which CPU features it supports")]
    Unknown(#[source] kvm_ioctls::Error),
    /// More leaves than KVM takes.
    #[error("the CPU features need more leaves than KVM takes")]
    TooMany,
}

const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the ids of several logical processors are in EBX.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: several processors in a package (AMD).
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0, EBX: how the vendor names of AMD and of Hygon begin. Some leaves
/// mean something on their CPUs only.
const AMD_LIKE: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// The CPUID of vCPU `index` of `cpus`.
///
/// # Errors
/// When KVM does not tell what it supports.
pub fn for_vcpu(kvm: &Kvm, index: u32, cpus: u32) -> Result<CpuId, CpuidError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Unknown)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let place = Place { index, cpus, deadline };
    let leaves = patched(supported.as_slice(), place);
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany)
}

/// Which vCPU it is for.
#[derive(Clone, Copy)]
struct Place {
    index: u32,
    cpus: u32,
    /// Whether KVM emulates the TSC deadline timer.
    deadline: bool,
}

/// Number of bits that tell `cpus` cores apart.
fn id_bits(cpus: u32) -> u32 {
    cpus.max(1).next_power_of_two().trailing_zeros()
}

fn patched(supported: &[kvm_cpuid_entry2], place: Place) -> Vec<kvm_cpuid_entry2> {
    // KVM may give one empty subleaf of these, or the host's.
    let topology = [0xb, 0x1f];
    let first = supported.iter().find(|leaf| leaf.function == 0);
    let highest = first.map_or(0, |leaf| leaf.eax);
    let amd = first.is_some_and(|leaf| AMD_LIKE.contains(&leaf.ebx));
    let mut leaves: Vec<_> = supported
        .iter()
        .filter(|leaf| !topology.contains(&leaf.function))
        .map(|leaf| patch(*leaf, place, amd))
        .collect();
    for function in topology.into_iter().filter(|function| *function <= highest) {
        leaves.extend(topology_leaves(function, place));
    }
    leaves
}

fn patch(mut leaf: kvm_cpuid_entry2, place: Place, amd: bool) -> kvm_cpuid_entry2 {
    let Place { index, cpus, deadline } = place;
    let several = cpus > 1;
    let set = |word: &mut u32, bit: u32, on: bool| {
        if on { *word |= bit } else { *word &= !bit }
    };
    match leaf.function {
        0x1 => {
            // Intel SDM 2A, CPUID leaf 1: APIC id and id count; 8 stands for
            // the 64 bytes of a cache line.
            let count = cpus.next_power_of_two().min(0xff);
            leaf.ebx = (leaf.ebx & 0x0000_ffff) | count << 16 | (index & 0xff) << 24;
            set(&mut leaf.ecx, X2APIC, true);
            set(&mut leaf.ecx, HYPERVISOR, true);
            set(&mut leaf.ecx, TSC_DEADLINE, deadline);
            set(&mut leaf.edx, HTT, several);
        }
        // No cache: no subleaf. Otherwise ids of cores (31:26) and of those
        // that share the cache (25:14), less one; only the last level is shared.
        0x4 if leaf.eax & 0x1f != 0 => {
            let cores = (1_u32 << id_bits(cpus)) - 1;
            let shared = if leaf.eax >> 5 & 7 >= 3 { cores } else { 0 };
            leaf.eax = (leaf.eax & 0x3fff) | shared.min(0xfff) << 14 | cores.min(0x3f) << 26;
        }
        0x8000_0001 if amd => set(&mut leaf.ecx, CMP_LEGACY, several),
        // AMD APM 3, E.4.7: bits of the id, and cores less one.
        0x8000_0008 if amd => {
            leaf.ecx = (leaf.ecx & !0xf0ff) | id_bits(cpus) << 12 | (cpus.max(1) - 1).min(0xff);
        }
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let cores = (1_u32 << id_bits(cpus)) - 1;
            let shared = if leaf.eax >> 5 & 7 >= 3 { cores } else { 0 };
            leaf.eax = (leaf.eax & 0x3fff) | shared.min(0xfff) << 14;
        }
        // AMD APM 3, E.4.16: APIC id; one thread a core; one node.
        0x8000_001e if amd => (leaf.eax, leaf.ebx, leaf.ecx) = (index, index & 0xff, 0),
        _ => {}
    }
    leaf
}

/// The subleaves of leaf 0xb or 0x1f: threads of a core, cores of the package,
/// the end (Intel SDM 2A, CPUID leaf 0xb).
fn topology_leaves(function: u32, place: Place) -> [kvm_cpuid_entry2; 3] {
    let Place { index, cpus, deadline: _ } = place;
    const SIGNIFICANT_INDEX: u32 = 1;
    let level = |subleaf: u32, bits: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index: subleaf,
        flags: SIGNIFICANT_INDEX,
        eax: bits,
        ebx: count,
        ecx: kind << 8 | subleaf,
        edx: index,
        ..kvm_cpuid_entry2::default()
    };
    [level(0, 0, 1, 1), level(1, id_bits(cpus), cpus, 2), level(2, 0, 0, 0)]
}
