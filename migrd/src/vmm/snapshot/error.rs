//! Why state can't be saved, believed or restored.

use crate::vmm::cpu::CpuMisfit;

/// What a received state says that no VM can have. Nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// Not a `VmState` message.
    #[error("the VM state can't be decoded: {reason}")]
    Undecodable {
        /// What the decoder said.
        reason: String,
    },
    /// Larger than any VM's state.
    #[error("the VM state has {length} bytes, more than the {limit} that any VM needs")]
    TooLarge {
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Written by another version of migrd.
    #[error(
        "the VM state is of version {version}, this migrd reads up to version {known}: use a \
         migrd that is as new as the one that wrote it"
    )]
    Version {
        /// Its version.
        version: u32,
        /// The newest version read here.
        known: u32,
    },
    /// A state that does not go with its VM.
    #[error("the VM state is of version {version}, its configuration of version {config}")]
    OtherVersion {
        /// Of the state.
        version: u32,
        /// Of the configuration.
        config: u32,
    },
    /// A message that must be there is not.
    #[error("the VM state lacks {what}")]
    Missing {
        /// Which.
        what: &'static str,
    },
    /// A list or blob of the wrong size.
    #[error("the VM state has {found} {what}, expected {expected}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// How many there can be, in words.
        expected: &'static str,
    },
    /// A number too large for the register it stands for.
    #[error("the VM state has {value:#x} for {what}, which is too large")]
    Range {
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u64,
    },
    /// vCPUs that are not numbered from 0 in order.
    #[error("the VM state has vCPU {found} where vCPU {expected} belongs")]
    VcpuIndex {
        /// The index it says.
        found: u32,
        /// The index it should say.
        expected: u32,
    },
    /// As many vCPUs as the VM has.
    #[error("the VM state has {found} vCPUs for a VM of {expected}")]
    VcpuCount {
        /// How many there are.
        found: usize,
        /// How many the configuration says.
        expected: u32,
    },
}

/// A VM or vCPU whose state can't be read or set. After a failed restore the
/// VM holds a mixture and must be thrown away.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state itself is no good.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// KVM did not tell something.
    #[error("KVM did not tell the {what}")]
    Save {
        /// What was asked for.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM did not take something.
    #[error("KVM refused the {what}: the hosts' CPUs or kernels differ too much")]
    Restore {
        /// What was being set.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// An MSR that this host does not know or not with this value.
    #[error(
        "KVM refused the value {value:#x} for MSR {index:#x}: the hosts' CPUs or kernels differ \
         too much"
    )]
    Msr {
        /// Its number.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// CPU features beyond what the guest may have or this host has.
    #[error(transparent)]
    Cpu(#[from] CpuMisfit),
    /// This host can't run the guest's TSC at the rate it had.
    #[error(
        "the guest's TSC runs at {wanted} kHz, this host's at {has} kHz, and its KVM can't scale \
         it: choose a host with the same TSC frequency or with TSC scaling"
    )]
    TscFrequency {
        /// The guest's, in kHz.
        wanted: u32,
        /// This host's, in kHz.
        has: u32,
    },
    /// This KVM does not let the guest's TSC be set, and it is behind.
    #[error(
        "the guest's TSC was {saved:#x} and would be {now:#x} here, and this host's KVM can't \
         move it: time would go back"
    )]
    TscBehind {
        /// Its value when it was saved.
        saved: u64,
        /// Its value after it was set.
        now: u64,
    },
    /// An XSAVE area with more in it than this host can hold.
    #[error(
        "the guest's XSAVE area has {length} bytes in use, this host's {room}: its CPU lacks \
         features that the guest uses"
    )]
    Xsave {
        /// Bytes up to the last that is not zero.
        length: usize,
        /// Bytes that this host's KVM takes.
        room: usize,
    },
}

pub(super) fn save_failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> SnapshotError {
    move |source| SnapshotError::Save { what, source }
}

pub(super) fn restore_failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> SnapshotError {
    move |source| SnapshotError::Restore { what, source }
}
