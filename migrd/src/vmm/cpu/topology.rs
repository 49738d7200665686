//! Leaves as one vCPU sees them: which of how many it is, and what the VMM sets
//! for every guest whatever the host has.
//!
//! - The topology is one package of `cpus` single-threaded cores, whose APIC
//!   ids count from 0, as the ACPI tables say.
//! - The hypervisor bit is set and KVM's own leaves are kept, so that a guest
//!   finds kvmclock.
//! - The TSC deadline timer and x2APIC are offered, which the in-kernel APIC
//!   emulates whether or not the host has them.

use kvm_bindings::kvm_cpuid_entry2;

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

/// Which vCPU it is for.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub index: u32,
    pub cpus: u32,
    /// Whether KVM emulates the TSC deadline timer.
    pub deadline: bool,
}

/// Number of bits that tell `cpus` cores apart.
fn id_bits(cpus: u32) -> u32 {
    cpus.max(1).next_power_of_two().trailing_zeros()
}

pub(super) fn patched(supported: &[kvm_cpuid_entry2], place: Place) -> Vec<kvm_cpuid_entry2> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = leaves.iter().filter(|l| l.function == function && l.index == index);
        let leaf = *found.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        leaf
    }

    fn host(vendor: [u8; 4]) -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0x0, 0, [0xd, u32::from_le_bytes(vendor), 0, 0]),
            leaf(0x1, 0, [0xf11, 0x0510_0800, 0, 1 << 28]),
            leaf(0x4, 0, [0xfc00_4121, 0, 0, 0]),
            leaf(0x4, 2, [0xfc03_c163, 0, 0, 0]),
            leaf(0x4, 3, [0, 0, 0, 0]),
            leaf(0xb, 0, [1, 2, 0x100, 9]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x8000_0001, 0, [0, 0, 0, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x7017, 0]),
            leaf(0x8000_001e, 0, [9, 0x109, 0x201, 0]),
        ]
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_in_one_package() {
        for index in 0..3 {
            let leaves = patched(&host(*b"Auth"), Place { index, cpus: 3, deadline: true });
            assert_eq!(find(&leaves, 0x1, 0).ebx, index << 24 | 4 << 16 | 0x0800);
            let (threads, cores) = (find(&leaves, 0xb, 0), find(&leaves, 0xb, 1));
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, index));
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, index));
            assert_eq!(find(&leaves, 0xb, 2).ecx, 2);
            assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 2 << 12 | 2);
            assert_eq!(find(&leaves, 0x8000_001e, 0).eax, index);
            assert!(leaves.iter().all(|leaf| leaf.function != 0x1f), "beyond the highest leaf");
        }
    }

    #[test]
    fn only_the_last_cache_level_is_shared() {
        let leaves = patched(&host(*b"Genu"), Place { index: 0, cpus: 4, deadline: true });
        assert_eq!(find(&leaves, 0x4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(find(&leaves, 0x4, 2).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(find(&leaves, 0x4, 3).eax, 0);
    }

    #[test]
    fn leaves_of_amd_are_left_alone_on_other_cpus() {
        let leaves = patched(&host(*b"Genu"), Place { index: 1, cpus: 4, deadline: true });
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 0x7017);
        assert_eq!(find(&leaves, 0x8000_001e, 0).eax, 9);
    }

    #[test]
    fn lone_vcpu_claims_no_siblings() {
        let leaves = patched(&host(*b"Auth"), Place { index: 0, cpus: 1, deadline: false });
        let features = find(&leaves, 0x1, 0);
        assert_eq!((features.ebx, features.edx), (1 << 16 | 0x0800, 0));
        assert_eq!(features.ecx, HYPERVISOR | X2APIC);
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 0);
    }
}
