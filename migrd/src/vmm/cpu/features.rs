//! Which words of CPUID hold feature bits, and what the bits are called.
//!
//! Names are those of `/proc/cpuinfo` where Linux has one, and in Linux's or
//! KVM's sources otherwise. The bits are of Intel SDM 2A (CPUID), AMD APM 3
//! (appendix E) and, for KVM's own leaf, the kernel's `x86/kvm/cpuid`
//! documentation.

use migr_proto::v1 as proto;

use super::bits::{
    KVM_BITS, LEAF_1_ECX_BITS, LEAF_1_EDX_BITS, LEAF_7_1_EAX_BITS, LEAF_7_1_EDX_BITS,
    LEAF_7_2_EDX_BITS, LEAF_7_EBX_BITS, LEAF_7_ECX_BITS, LEAF_7_EDX_BITS, LEAF_8000_0001_ECX_BITS,
    LEAF_8000_0001_EDX_BITS, LEAF_8000_0008_EBX_BITS, LEAF_8000_0021_EAX_BITS, LEAF_D_1_BITS,
    XCR0_BITS,
};

/// One of the four registers CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// As it travels.
    #[must_use]
    pub fn to_wire(self) -> proto::CpuRegister {
        match self {
            Self::Eax => proto::CpuRegister::Eax,
            Self::Ebx => proto::CpuRegister::Ebx,
            Self::Ecx => proto::CpuRegister::Ecx,
            Self::Edx => proto::CpuRegister::Edx,
        }
    }

    /// `None` for what no CPU has.
    #[must_use]
    pub fn from_wire(wire: proto::CpuRegister) -> Option<Self> {
        match wire {
            proto::CpuRegister::Unspecified => None,
            proto::CpuRegister::Eax => Some(Self::Eax),
            proto::CpuRegister::Ebx => Some(Self::Ebx),
            proto::CpuRegister::Ecx => Some(Self::Ecx),
            proto::CpuRegister::Edx => Some(Self::Edx),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// Where a word is: leaf, subleaf, register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The leaf.
    pub function: u32,
    /// The subleaf.
    pub index: u32,
    /// The register.
    pub register: Register,
}

impl Place {
    const fn new(function: u32, index: u32, register: Register) -> Self {
        Self { function, index, register }
    }

    /// What bit `bit` of it is called; a bit that has no name here is told by
    /// its number.
    #[must_use]
    pub fn name(self, bit: u32) -> String {
        match feature_at(self, bit) {
            Some(name) => name.to_owned(),
            None => {
                let Self { function, index, register } = self;
                format!("leaf {function:#x}.{index} {} bit {bit}", register.name())
            }
        }
    }

    /// The names of the bits that are set in `bits`.
    pub fn names(self, bits: u32) -> impl Iterator<Item = String> {
        (0..u32::BITS).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| self.name(bit))
    }
}

/// A word of feature bits.
#[derive(Debug)]
pub struct Word {
    /// Where it is.
    pub place: Place,
    /// Bits that are no features of the host: KVM or this VMM sets them by what
    /// the vCPU is or does, on every host alike.
    pub managed: u32,
    /// Follows from other features, so that nobody names its bits.
    pub derived: bool,
    /// Bits and their names.
    pub bits: &'static [(u32, &'static str)],
}

use Register::{Eax, Ebx, Ecx, Edx};

const fn word(
    function: u32,
    index: u32,
    register: Register,
    managed: u32,
    bits: &'static [(u32, &'static str)],
) -> Word {
    Word { place: Place::new(function, index, register), managed, derived: false, bits }
}

const fn derived(place: Place, bits: &'static [(u32, &'static str)]) -> Word {
    Word { place, managed: 0, derived: true, bits }
}

/// Leaf 1, EDX.
pub const LEAF_1_EDX: Place = Place::new(0x1, 0, Edx);
/// Leaf 0x80000001, EDX; on AMD's CPUs many of its bits repeat leaf 1's.
pub const LEAF_8000_0001_EDX: Place = Place::new(0x8000_0001, 0, Edx);
/// Components of XCR0, low half.
pub const XCR0_LOW: Place = Place::new(0xd, 0, Eax);
/// Components of XCR0, high half.
pub const XCR0_HIGH: Place = Place::new(0xd, 0, Edx);
/// Components of IA32_XSS, low half.
pub const XSS_LOW: Place = Place::new(0xd, 1, Ecx);
/// Components of IA32_XSS, high half.
pub const XSS_HIGH: Place = Place::new(0xd, 1, Edx);

/// APIC and HTT: the first follows the guest's own switch, the second tells of
/// the topology.
const MANAGED_1_EDX: u32 = 1 << 9 | 1 << 28;
/// x2APIC, TSC deadline timer, OSXSAVE, hypervisor.
const MANAGED_1_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31;
/// OSPKE.
const MANAGED_7_ECX: u32 = 1 << 4;
/// CMP_LEGACY, of the topology.
const MANAGED_8000_0001_ECX: u32 = 1 << 1;

/// Every word that a guest's features are in.
pub static WORDS: &[Word] = &[
    word(0x1, 0, Edx, MANAGED_1_EDX, LEAF_1_EDX_BITS),
    word(0x1, 0, Ecx, MANAGED_1_ECX, LEAF_1_ECX_BITS),
    word(0x7, 0, Ebx, 0, LEAF_7_EBX_BITS),
    word(0x7, 0, Ecx, MANAGED_7_ECX, LEAF_7_ECX_BITS),
    word(0x7, 0, Edx, 0, LEAF_7_EDX_BITS),
    word(0x7, 1, Eax, 0, LEAF_7_1_EAX_BITS),
    word(0x7, 1, Ebx, 0, &[(0, "ppin")]),
    word(0x7, 1, Ecx, 0, &[(5, "msr_imm")]),
    word(0x7, 1, Edx, 0, LEAF_7_1_EDX_BITS),
    word(0x7, 2, Edx, 0, LEAF_7_2_EDX_BITS),
    derived(XCR0_LOW, XCR0_BITS),
    derived(XCR0_HIGH, &[]),
    word(0xd, 1, Eax, 0, LEAF_D_1_BITS),
    derived(XSS_LOW, &[(8, "xss_pt"), (11, "xss_cet_user"), (12, "xss_cet_kernel")]),
    derived(XSS_HIGH, &[]),
    word(0x8000_0001, 0, Edx, 0, LEAF_8000_0001_EDX_BITS),
    word(0x8000_0001, 0, Ecx, MANAGED_8000_0001_ECX, LEAF_8000_0001_ECX_BITS),
    word(0x8000_0007, 0, Edx, 0, &[(8, "invtsc")]),
    word(0x8000_0008, 0, Ebx, 0, LEAF_8000_0008_EBX_BITS),
    word(0x8000_001f, 0, Eax, 0, &[(0, "sme"), (1, "sev"), (3, "sev_es"), (4, "sev_snp")]),
    word(0x8000_0021, 0, Eax, 0, LEAF_8000_0021_EAX_BITS),
    word(0x8000_0021, 0, Ecx, 0, &[(1, "tsa_sq_no"), (2, "tsa_l1_no")]),
    word(0x8000_0022, 0, Eax, 0, &[(0, "perfmon_v2")]),
    word(0x4000_0001, 0, Eax, 0, KVM_BITS),
];

/// The word at `place`, if it is known.
#[must_use]
pub fn word_at(place: Place) -> Option<&'static Word> {
    WORDS.iter().find(|word| word.place == place)
}

fn feature_at(place: Place, bit: u32) -> Option<&'static str> {
    word_at(place)?.bits.iter().find(|(at, _)| *at == bit).map(|(_, name)| *name)
}

/// Where the feature `name` is: its word, and the bit as a mask.
#[must_use]
pub fn find(name: &str) -> Option<(&'static Word, u32)> {
    let words = WORDS.iter().filter(|word| !word.derived);
    let bit = |word: &'static Word| word.bits.iter().find(|(_, n)| *n == name);
    words.filter_map(|word| bit(word).map(|(bit, _)| (word, 1 << bit))).next()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_and_every_bit_is_there_once() {
        let mut names = BTreeSet::new();
        let mut places = BTreeSet::new();
        for word in WORDS {
            assert!(places.insert(word.place), "{:?} twice", word.place);
            let mut bits = BTreeSet::new();
            for (bit, name) in word.bits {
                assert!(*bit < 32, "{name}");
                assert!(bits.insert(bit), "bit {bit} of {:?} twice", word.place);
                assert!(names.insert(name), "{name} twice");
            }
        }
    }

    #[test]
    fn a_feature_is_found_by_its_name_and_named_by_its_bit() {
        let (word, mask) = find("avx2").unwrap();
        assert_eq!((word.place, mask), (Place::new(0x7, 0, Ebx), 1 << 5));
        assert_eq!(word.place.name(5), "avx2");
        assert_eq!(find("avx3").map(|(_, mask)| mask), None);
    }

    #[test]
    fn a_bit_without_a_name_is_told_by_its_number() {
        let names: Vec<_> = Place::new(0x7, 0, Ebx).names(1 << 5 | 1 << 22).collect();
        assert_eq!(names, ["avx2", "leaf 0x7.0 ebx bit 22"]);
        assert_eq!(Place::new(0x99, 3, Ecx).name(31), "leaf 0x99.3 ecx bit 31");
    }
}
