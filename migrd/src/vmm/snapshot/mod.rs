//! Takes the state of a stopped VM out of KVM and puts it into another.
//!
//! Owns what of a VM is in KVM, as wire messages, and the order in which it
//! must be read and set. May not touch memory, devices of the VMM, or files.
//! What arrives is checked whole before anything of it is used.
//!
//! **Saving**, with every vCPU out of `KVM_RUN` and entered once more with
//! `immediate_exit` after its last exit, so that no port or memory access is
//! half done:
//!
//! 1. [`VmClock::read`]: the instant at which the guest's time stops.
//! 2. [`save_vm`], then [`save_vcpu`] for each. An interrupt travels timer →
//!    PIC or IOAPIC → local APIC, and the timers go on while the vCPUs stand.
//!    Reading in that direction may find an interrupt twice, which is harmless
//!    (it is the same bit); the other direction could lose it.
//!
//! **Restoring**, before any vCPU has run:
//!
//! 1. [`restore_clock`]: the TSCs are set relative to it.
//! 2. [`restore_vcpu`] for each.
//! 3. [`restore_vm`]: chips after the local APICs they deliver to, the timer
//!    last of all, so that what it fires can't be overwritten.
//! 4. [`was_paused`] for each, so that the guest's watchdogs know.

mod devices;
mod error;
mod events_wire;
mod msrs;
mod registers_wire;
pub mod state;
mod time;
mod vcpu;
mod vcpu_wire;

use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use migr_proto::v1 as proto;

pub use error::{SnapshotError, WireError};
pub use time::{RestoredClock, VmClock, restore_clock};

use crate::sys::kvm_state::XsaveBytes;
use crate::vmm::cpu::{self, HostCpu, Model};

/// What this host's KVM can save and restore; asked once per VM.
#[derive(Clone, Debug)]
pub struct Host {
    msrs: Vec<u32>,
    xsave: XsaveBytes,
    sregs2: bool,
    /// Whether a guest's TSC can run at another rate than this host's.
    tsc_scaling: bool,
}

impl Host {
    /// Asks KVM.
    ///
    /// # Errors
    /// When KVM does not list its MSRs.
    pub fn probe(kvm: &Kvm, vm: &VmFd) -> Result<Self, SnapshotError> {
        let sregs2 = vm.check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0;
        let tsc_scaling = kvm.check_extension(Cap::TscControl);
        Ok(Self { msrs: msrs::indices(kvm)?, xsave: XsaveBytes::of(vm), sregs2, tsc_scaling })
    }
}

/// What the vCPUs of a VM may be.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// What this host has.
    pub host: HostCpu,
    /// What the guest was given; `None`: not known, as of old VMs.
    pub model: Option<Model>,
}

impl Cpu {
    /// Has the TSC of a new vCPU run at the rate of the model, if it has one.
    ///
    /// # Errors
    /// When this host can't.
    pub fn set_rate(&self, vcpu: &VcpuFd) -> Result<(), SnapshotError> {
        match self.model.as_ref().map_or(0, Model::tsc_khz) {
            0 => Ok(()),
            wanted => time::set_rate(vcpu, wanted, self.host.scaling()),
        }
    }

    /// Checks the features that a saved vCPU comes with.
    ///
    /// # Errors
    /// When they are more than those of the model or of this host.
    pub fn check(&self, vcpu: &proto::VcpuState) -> Result<(), SnapshotError> {
        Ok(cpu::of_leaves(vcpu, self.model.as_ref(), &self.host)?)
    }
}

/// Saves everything that is not of one vCPU.
///
/// # Errors
/// When KVM does not tell something.
pub fn save_vm(vm: &VmFd, clock: VmClock) -> Result<proto::VmDevices, SnapshotError> {
    let devices = devices::Devices::save(vm)?;
    Ok(devices.into_wire(clock.nanoseconds()))
}

/// Whether the guest takes no interrupt of the IOAPIC's pin `pin`, which every
/// guest that uses one switches on first.
///
/// # Errors
/// When KVM does not tell.
pub fn is_masked(vm: &VmFd, pin: u32) -> Result<bool, SnapshotError> {
    devices::is_masked(vm, pin)
}

/// Restores what [`save_vm`] gave, but for the clock.
///
/// # Errors
/// When the state is no good or KVM refuses it.
pub fn restore_vm(vm: &VmFd, devices: &proto::VmDevices) -> Result<(), SnapshotError> {
    devices::Devices::from_wire(devices)?.restore(vm)
}

/// Saves vCPU `index`.
///
/// # Errors
/// When KVM does not tell something.
pub fn save_vcpu(
    vcpu: &VcpuFd,
    index: u32,
    host: &Host,
    clock: VmClock,
) -> Result<proto::VcpuState, SnapshotError> {
    Ok(vcpu::Vcpu::save(vcpu, host, clock)?.into_wire(index))
}

/// Restores a vCPU that has never run.
///
/// # Errors
/// When the state is no good or KVM refuses it.
pub fn restore_vcpu(
    vcpu: &VcpuFd,
    state: &proto::VcpuState,
    host: &Host,
    clock: RestoredClock,
) -> Result<(), SnapshotError> {
    vcpu::Vcpu::from_wire(state)?.restore(vcpu, host, clock)
}

/// Restores a vCPU that has run, in the VM in which it was saved.
///
/// # Errors
/// When KVM refuses it.
pub fn reset_vcpu(
    vcpu: &VcpuFd,
    state: &proto::VcpuState,
    host: &Host,
    clock: RestoredClock,
) -> Result<(), SnapshotError> {
    vcpu::Vcpu::from_wire(state)?.reset(vcpu, host, clock)
}

/// Tells the guest on this vCPU that it stood still, so that it does not take
/// the gap for a lockup. To be called before a paused or restored vCPU runs.
///
/// # Errors
/// When KVM refuses for another reason than that the guest uses no kvmclock.
pub fn was_paused(vcpu: &VcpuFd) -> Result<(), SnapshotError> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => {
            Err(error::restore_failed("note of the pause")(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
