//! The guest's clocks: kvmclock and each vCPU's TSC.
//!
//! The rule: no clock goes back, and none loses more than the downtime. Both
//! clocks stand still from the instant the stopped VM's clock is read until
//! they are set at the destination, and they advance together from there on.
//! Adding the time that passed in between would need both hosts' wall clocks
//! to agree, and a guest whose time jumps is worse off than one whose time
//! stood still.
//!
//! The TSCs are therefore saved as values at the instant of kvmclock, not as
//! offsets, which mean nothing on another host. Where KVM tells a vCPU's
//! offset the value is exact and the vCPUs keep their distance to each other;
//! elsewhere the TSC is read as an MSR, a little later.

use kvm_bindings::{Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};
use migr_proto::v1 as proto;

use super::SnapshotError;
use super::error::{restore_failed, save_failed};
use crate::sys::kvm_state;
use crate::vmm::cpu;

/// `IA32_TSC`.
pub(super) const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;

const KVM_CLOCK_HOST_TSC: u32 = 8;

/// kvmclock at one instant, and the host's TSC at the same instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmClock {
    nanoseconds: u64,
    host_tsc: u64,
}

impl VmClock {
    /// Reads the clock of a VM whose vCPUs stand still.
    ///
    /// # Errors
    /// When KVM does not tell it.
    pub fn read(vm: &VmFd) -> Result<Self, SnapshotError> {
        let kvm_clock_data { clock, flags, pad0: _, realtime: _, host_tsc, pad: _ } =
            vm.get_clock().map_err(save_failed("clock"))?;
        // KVM tells the host's TSC only when its own clock is made of it.
        let told = flags & KVM_CLOCK_HOST_TSC != 0;
        let host_tsc = if told { host_tsc } else { kvm_state::host_tsc() };
        Ok(Self { nanoseconds: clock, host_tsc })
    }

    /// kvmclock in ns.
    pub(super) fn nanoseconds(self) -> u64 {
        self.nanoseconds
    }
}

/// A restored clock: how far it had advanced beyond the saved value when the
/// host's TSC had the value beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoredClock {
    elapsed_ns: u64,
    host_tsc: u64,
}

/// Sets kvmclock to what it was and lets it run from now on. Comes before the
/// vCPUs, whose TSCs are set to fit it.
///
/// # Errors
/// When KVM refuses it.
pub fn restore_clock(
    vm: &VmFd,
    devices: &proto::VmDevices,
) -> Result<RestoredClock, SnapshotError> {
    let clock = kvm_clock_data { clock: devices.clock_ns, ..kvm_clock_data::default() };
    vm.set_clock(&clock).map_err(restore_failed("clock"))?;
    let VmClock { nanoseconds, host_tsc } = VmClock::read(vm)?;
    Ok(RestoredClock { elapsed_ns: nanoseconds.saturating_sub(devices.clock_ns), host_tsc })
}

/// A vCPU's clock, as it travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VcpuTime {
    pub tsc_khz: u32,
    pub tsc: u64,
    pub tsc_deadline: u64,
}

impl VcpuTime {
    /// Reads it from a vCPU that stands still.
    pub(super) fn save(vcpu: &VcpuFd, clock: VmClock) -> Result<Self, SnapshotError> {
        let tsc_khz = vcpu.get_tsc_khz().map_err(save_failed("TSC frequency"))?;
        let tsc = match exact_offset(vcpu)? {
            Some(offset) => clock.host_tsc.wrapping_add(offset),
            None => msr(vcpu, MSR_TSC)?.ok_or_else(|| unreadable("TSC"))?,
        };
        // A KVM without the deadline timer has no such MSR.
        let tsc_deadline = msr(vcpu, MSR_TSC_DEADLINE)?.unwrap_or(0);
        Ok(Self { tsc_khz, tsc, tsc_deadline })
    }

    /// Sets frequency and value; the deadline has its own place in the order.
    pub(super) fn restore_tsc(
        self,
        vcpu: &VcpuFd,
        clock: RestoredClock,
        scaling: bool,
    ) -> Result<(), SnapshotError> {
        let Self { tsc_khz, tsc, tsc_deadline: _ } = self;
        set_rate(vcpu, tsc_khz, scaling)?;
        let target = tsc.wrapping_add(ticks(clock.elapsed_ns, tsc_khz));
        match exact_offset(vcpu)? {
            Some(_) => {
                let offset = target.wrapping_sub(clock.host_tsc);
                let set = kvm_state::set_tsc_offset(vcpu, offset);
                set.map_err(restore_failed("TSC offset"))?;
            }
            None => set_msr(vcpu, MSR_TSC, target)?,
        }
        // Some KVMs take the value and let the guest see the host's TSC all
        // the same. Ahead is a jump over the downtime; behind breaks the rule.
        let now = msr(vcpu, MSR_TSC)?.ok_or_else(|| unreadable("TSC"))?;
        if now < tsc {
            return Err(SnapshotError::TscBehind { saved: tsc, now });
        }
        Ok(())
    }

    /// Arms the deadline timer: after the local APIC, which drops a deadline
    /// unless its timer is in deadline mode, and after the TSC, without which
    /// the deadline would be taken for long past or far away.
    pub(super) fn restore_deadline(self, vcpu: &VcpuFd) -> Result<(), SnapshotError> {
        match self.tsc_deadline {
            0 => Ok(()),
            deadline => set_msr(vcpu, MSR_TSC_DEADLINE, deadline),
        }
    }
}

/// Has a vCPU's TSC run at `wanted` kHz.
///
/// Where the host's rate is the same as far as anybody can measure, the guest
/// is told the rate it knows and runs at the host's. Otherwise KVM has to scale.
/// Without scaling KVM would take a higher rate all the same and have the TSC
/// jump ahead at each exit, which no guest should see.
///
/// # Errors
/// When the rates differ and `scaling` says that KVM can't.
pub(super) fn set_rate(vcpu: &VcpuFd, wanted: u32, scaling: bool) -> Result<(), SnapshotError> {
    let has = vcpu.get_tsc_khz().map_err(save_failed("TSC frequency"))?;
    if has == wanted {
        return Ok(());
    }
    if !scaling && !cpu::same_rate(wanted, has) {
        return Err(SnapshotError::TscFrequency { wanted, has });
    }
    vcpu.set_tsc_khz(wanted).map_err(restore_failed("TSC frequency"))
}

/// How far a TSC of that rate gets in so many nanoseconds.
fn ticks(nanoseconds: u64, khz: u32) -> u64 {
    let ticks = u128::from(nanoseconds) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The vCPU's TSC offset, if adding it to the host's TSC gives the guest's:
/// not when KVM can't tell it, nor when the guest's TSC is scaled.
fn exact_offset(vcpu: &VcpuFd) -> Result<Option<u64>, SnapshotError> {
    let Ok(offset) = kvm_state::tsc_offset(vcpu) else { return Ok(None) };
    let before = kvm_state::host_tsc().wrapping_add(offset);
    let guest = msr(vcpu, MSR_TSC)?.ok_or_else(|| unreadable("TSC"))?;
    let after = kvm_state::host_tsc().wrapping_add(offset);
    // Wrapping, for a guest whose TSC was just set to a little under 0.
    let exact = guest.wrapping_sub(before) <= after.wrapping_sub(before);
    Ok(exact.then_some(offset))
}

fn unreadable(what: &'static str) -> SnapshotError {
    save_failed(what)(kvm_ioctls::Error::new(libc::EINVAL))
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, SnapshotError> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..kvm_msr_entry::default() }])
        .map_err(|_| save_failed("MSRs")(kvm_ioctls::Error::new(libc::ENOMEM)))
}

fn msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, SnapshotError> {
    let mut msrs = one_msr(index, 0)?;
    let count = vcpu.get_msrs(&mut msrs).map_err(save_failed("MSRs"))?;
    Ok(msrs.as_slice().first().filter(|_| count == 1).map(|entry| entry.data))
}

fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), SnapshotError> {
    let count = vcpu.set_msrs(&one_msr(index, value)?).map_err(restore_failed("MSRs"))?;
    if count == 1 { Ok(()) } else { Err(SnapshotError::Msr { index, value }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_advances_as_its_rate_says() {
        for (nanoseconds, khz, expected) in [
            (0, 2_300_000, 0),
            (1_000_000, 2_300_000, 2_300_000),
            // Less than a tick is no tick: the TSC is never ahead of the clock.
            (1, 999_999, 0),
            (3, 2_299_998, 6),
            // Ten years at 5 GHz.
            (315_360_000_000_000_000, 5_000_000, 1_576_800_000_000_000_000),
            (u64::MAX, u32::MAX, u64::MAX),
        ] {
            assert_eq!(ticks(nanoseconds, khz), expected, "{nanoseconds} ns at {khz} kHz");
        }
    }

    #[test]
    fn a_tsc_never_goes_back_however_long_the_restore_takes() {
        let mut before = 0;
        for elapsed in (0..10_000_000).step_by(977) {
            let now = ticks(elapsed, 2_299_998);
            assert!(now >= before);
            before = now;
        }
    }
}
