//! What this host's CPUs can do for a guest, as its KVM tells.

use std::os::fd::OwnedFd;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::features::{self, Place, Register, WORDS};
use crate::sys::vm;

/// KVM does not tell what CPUs it has, or does not take what they shall be.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not tell what it supports.
    #[error("KVM did not tell which CPU features it supports")]
    Unknown(#[source] kvm_ioctls::Error),
    /// More leaves than KVM takes.
    #[error("the CPU features need more leaves than KVM takes")]
    TooMany,
    /// No vCPU to ask.
    #[error("KVM did not tell what its vCPUs are like")]
    Probe(#[source] kvm_ioctls::Error),
}

/// Features whose state does not travel with a VM, and which no guest is
/// given: nested virtualization, and enclaves.
pub(super) const WITHHELD: [&str; 4] = ["vmx", "svm", "sgx", "sgx_lc"];

/// The leaf that tells of nested virtualization on AMD's CPUs.
const SVM_LEAF: u32 = 0x8000_000a;

/// The CPUs of this host, as its KVM offers them to guests.
#[derive(Clone, Debug)]
pub struct HostCpu {
    supported: Vec<kvm_cpuid_entry2>,
    /// What a vCPU has that was given no feature at all: a KVM which runs
    /// guests' programs without virtualization can't hide what the CPU has.
    unhidden: Vec<kvm_cpuid_entry2>,
    deadline: bool,
    tsc_khz: u32,
    scaling: bool,
}

impl HostCpu {
    /// Asks KVM, with a vCPU that never runs: only a vCPU has a rate, and
    /// shows what can't be hidden.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn of(kvm: &Kvm) -> Result<Self, CpuidError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Unknown)?;
        let vm = kvm.create_vm().map_err(CpuidError::Probe)?;
        let vcpu = vm.create_vcpu(0).map_err(CpuidError::Probe)?;
        let bare = CpuId::from_entries(&without_features(supported.as_slice()))
            .map_err(|_| CpuidError::TooMany)?;
        vcpu.set_cpuid2(&bare).map_err(CpuidError::Probe)?;
        let unhidden = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Probe)?;
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            unhidden: unhidden.as_slice().to_vec(),
            deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_khz: vcpu.get_tsc_khz().map_err(CpuidError::Probe)?,
            scaling: kvm.check_extension(Cap::TscControl),
        })
    }

    /// Asks `/dev/kvm`.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn ask(kvm: OwnedFd) -> Result<Self, CpuidError> {
        Self::of(&vm::from_fd(kvm))
    }

    /// Who made the CPUs: the 12 characters of leaf 0.
    #[must_use]
    pub fn vendor(&self) -> String {
        let Some(leaf) = self.leaf(0, 0) else { return String::new() };
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        bytes.into_iter().map(char::from).filter(char::is_ascii_graphic).collect()
    }

    /// The rate of a guest's TSC that is not scaled, in kHz; 0: not known.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Whether a guest's TSC can run at another rate (`KVM_CAP_TSC_CONTROL`).
    #[must_use]
    pub fn scaling(&self) -> bool {
        self.scaling
    }

    /// Whether KVM emulates the TSC deadline timer.
    pub(super) fn deadline(&self) -> bool {
        self.deadline
    }

    fn leaf(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.supported.iter().find(|l| l.function == function && l.index == index)
    }

    /// The feature bits at `place` that a guest can have, whether or not the
    /// word is a known one. Bits that KVM or the VMM manages are left out.
    #[must_use]
    pub fn word(&self, place: Place) -> u32 {
        word_of(&self.supported, place) | self.unhidden_word(place)
    }

    /// The feature bits at `place` that every guest has, whatever it is given.
    #[must_use]
    pub fn unhidden_word(&self, place: Place) -> u32 {
        word_of(&self.unhidden, place)
    }

    /// The leaves that guests are given, before anything is left out for one.
    pub(super) fn offered(&self) -> Vec<kvm_cpuid_entry2> {
        let mut leaves = self.supported.clone();
        leaves.retain(|leaf| leaf.function != SVM_LEAF);
        for (word, bit) in WITHHELD.iter().filter_map(|name| features::find(name)) {
            let Place { function, index, register: _ } = word.place;
            let mut of = leaves.iter_mut().filter(|l| l.function == function && l.index == index);
            if let Some(leaf) = of.next() {
                *register_mut(leaf, word.place) &= !bit;
            }
        }
        leaves
    }

    /// The feature bits at `place` that guests can be given.
    #[must_use]
    pub fn offered_word(&self, place: Place) -> u32 {
        let withheld = WITHHELD.iter().filter_map(|name| features::find(name));
        let here = withheld.filter(|(word, _)| word.place == place).map(|(_, bit)| bit);
        self.word(place) & !here.sum::<u32>()
    }

    /// The names of all features that guests can be given, as lists name them.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for word in WORDS.iter().filter(|word| !word.derived) {
            let has = self.offered_word(word.place);
            let known = word.bits.iter().filter(|(bit, _)| has >> bit & 1 != 0);
            names.extend(known.map(|(_, name)| (*name).to_owned()));
        }
        names
    }

    #[cfg(test)]
    pub(crate) fn made_of(supported: Vec<kvm_cpuid_entry2>, tsc_khz: u32, scaling: bool) -> Self {
        Self { supported, unhidden: Vec::new(), deadline: true, tsc_khz, scaling }
    }

    #[cfg(test)]
    pub(super) fn not_hiding(self, unhidden: Vec<kvm_cpuid_entry2>) -> Self {
        Self { unhidden, ..self }
    }
}

fn word_of(leaves: &[kvm_cpuid_entry2], place: Place) -> u32 {
    let mut here = leaves.iter().filter(|l| l.function == place.function && l.index == place.index);
    let value = here.next().map_or(0, |leaf| register(leaf, place));
    value & !features::word_at(place).map_or(0, |word| word.managed)
}

fn without_features(leaves: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut bare = leaves.to_vec();
    for word in WORDS {
        let Place { function, index, register: _ } = word.place;
        let here = bare.iter_mut().filter(|l| l.function == function && l.index == index);
        here.for_each(|leaf| *register_mut(leaf, word.place) &= word.managed);
    }
    bare
}

/// The register that `place` names.
pub(crate) fn register(leaf: &kvm_cpuid_entry2, place: Place) -> u32 {
    match place.register {
        Register::Eax => leaf.eax,
        Register::Ebx => leaf.ebx,
        Register::Ecx => leaf.ecx,
        Register::Edx => leaf.edx,
    }
}

/// The register that `place` names, to be changed.
pub(super) fn register_mut(leaf: &mut kvm_cpuid_entry2, place: Place) -> &mut u32 {
    match place.register {
        Register::Eax => &mut leaf.eax,
        Register::Ebx => &mut leaf.ebx,
        Register::Ecx => &mut leaf.ecx,
        Register::Edx => &mut leaf.edx,
    }
}
