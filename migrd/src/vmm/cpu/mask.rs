//! Leaves without the features that a model leaves out.

use std::collections::BTreeMap;

use kvm_bindings::kvm_cpuid_entry2;

use super::Model;
use super::features::{self, Place, Register};
use super::host::{register, register_mut};

/// Leaves that say nothing but how a feature is done.
const DESCRIBED_BY: &[(&str, &[u32])] = &[
    ("pdcm", &[0xa]),
    ("cqm", &[0xf]),
    ("rdt_a", &[0x10]),
    ("sgx", &[0x12]),
    ("intel_pt", &[0x14]),
    ("key_locker", &[0x19]),
    ("arch_lbr", &[0x1c]),
    ("amx_tile", &[0x1d, 0x1e]),
    ("arch_perfmon_ext", &[0x23]),
    ("avx10", &[0x24]),
    ("ibs", &[0x8000_001b]),
    ("lwp", &[0x8000_001c]),
    ("topoext", &[0x8000_001d, 0x8000_001e]),
    ("sev", &[0x8000_001f]),
    ("perfmon_v2", &[0x8000_0022]),
];

/// The leaf of the XSAVE area's shape.
const XSAVE_LEAF: u32 = 0xd;
/// Size of the area's legacy region and header (Intel SDM 1, 13.4).
const XSAVE_LEGACY: u32 = 576;

/// `leaves` with no feature beyond those of the model. Where nothing is taken
/// away nothing changes.
pub(super) fn masked(leaves: &[kvm_cpuid_entry2], model: &Model) -> Vec<kvm_cpuid_entry2> {
    let mut masked = leaves.to_vec();
    let mut taken: BTreeMap<Place, u32> = BTreeMap::new();
    for (place, bits) in &model.words {
        let managed = features::word_at(*place).map_or(0, |word| word.managed);
        let here = masked.iter_mut().filter(|leaf| is_at(leaf, *place));
        for leaf in here {
            let word = register_mut(leaf, *place);
            *taken.entry(*place).or_default() |= *word & !bits & !managed;
            *word &= bits | managed;
        }
    }
    taken.retain(|_, bits| *bits != 0);
    let is_taken = |(word, bit): (&features::Word, u32)| {
        taken.get(&word.place).is_some_and(|bits| bits & bit != 0)
    };
    for (name, functions) in DESCRIBED_BY {
        let gone = features::find(name).is_some_and(is_taken);
        masked.retain(|leaf| !(gone && functions.contains(&leaf.function)));
    }
    if taken.keys().any(|place| place.function == XSAVE_LEAF) {
        reshape(&mut masked);
    }
    masked
}

fn is_at(leaf: &kvm_cpuid_entry2, place: Place) -> bool {
    leaf.function == place.function && leaf.index == place.index
}

/// Makes leaf 0xd tell of an area with only the components that are left. What
/// depends on what the guest has switched on, EBX of subleaves 0 and 1, is
/// KVM's to keep.
fn reshape(leaves: &mut Vec<kvm_cpuid_entry2>) {
    let word = |leaves: &[kvm_cpuid_entry2], place: Place| {
        leaves.iter().find(|leaf| is_at(leaf, place)).map_or(0, |leaf| register(leaf, place))
    };
    let user = [features::XCR0_LOW, features::XCR0_HIGH].map(|place| word(leaves, place));
    let supervisor = [features::XSS_LOW, features::XSS_HIGH].map(|place| word(leaves, place));
    if user == [0, 0] {
        leaves.retain(|leaf| leaf.function != XSAVE_LEAF);
        return;
    }
    let has = |words: [u32; 2], component: u32| match component {
        0..32 => words[0] >> component & 1 != 0,
        32..64 => words[1] >> (component - 32) & 1 != 0,
        _ => false,
    };
    leaves.retain(|leaf| {
        let component = leaf.index;
        leaf.function != XSAVE_LEAF
            || component < 2
            || has(user, component)
            || has(supervisor, component)
    });
    let ends = leaves
        .iter()
        .filter(|leaf| leaf.function == XSAVE_LEAF && leaf.index >= 2 && has(user, leaf.index));
    let size = ends.map(|leaf| leaf.ebx.saturating_add(leaf.eax)).fold(XSAVE_LEGACY, u32::max);
    let sizes = Place { function: XSAVE_LEAF, index: 0, register: Register::Ecx };
    for leaf in leaves.iter_mut().filter(|leaf| is_at(leaf, sizes)) {
        leaf.ecx = size;
        leaf.ebx = leaf.ebx.min(size);
    }
}
