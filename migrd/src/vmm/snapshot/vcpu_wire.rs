//! A vCPU's state between KVM's types and the wire's, field by field.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_mp_state, kvm_xcr};
use migr_proto::v1 as proto;

use super::WireError;
use super::events_wire::{events_from_wire, events_into_wire};
use super::msrs::MSRS_MAX;
use super::registers_wire::{
    debug_from_wire, debug_into_wire, regs_from_wire, regs_into_wire, sregs_from_wire,
    sregs_into_wire,
};
use super::time::VcpuTime;
use super::vcpu::Vcpu;
use crate::sys::kvm_state::XsaveBytes;

/// Far more than any CPU's XSAVE area takes, in bytes.
const XSAVE_MAX: usize = 64 << 10;
/// `KVM_MAX_XCRS`.
const XCRS_MAX: usize = 16;
/// `KVM_MP_STATE_AP_RESET_HOLD` and up are of other machines or of guests with
/// encrypted memory.
const MP_STATE_MAX: u32 = 4;

/// A byte that travelled in a wider field.
pub(super) fn byte(what: &'static str, value: u32) -> Result<u8, WireError> {
    u8::try_from(value).map_err(|_| WireError::Range { what, value: value.into() })
}

/// 16 bits that travelled in a wider field.
pub(super) fn half(what: &'static str, value: u32) -> Result<u16, WireError> {
    u16::try_from(value).map_err(|_| WireError::Range { what, value: value.into() })
}

/// A message that must be there.
pub(super) fn present<'a, T>(
    what: &'static str,
    message: &'a Option<T>,
) -> Result<&'a T, WireError> {
    message.as_ref().ok_or(WireError::Missing { what })
}

fn at_most(
    what: &'static str,
    found: usize,
    most: usize,
    expected: &'static str,
) -> Result<(), WireError> {
    if found > most { Err(WireError::Count { what, found, expected }) } else { Ok(()) }
}

impl Vcpu {
    pub(super) fn into_wire(self, index: u32) -> proto::VcpuState {
        let Self {
            cpuid,
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            msrs,
            lapic,
            mp_state: kvm_mp_state { mp_state },
            events,
            time: VcpuTime { tsc_khz, tsc, tsc_deadline },
        } = self;
        proto::VcpuState {
            index,
            cpuid: cpuid.into_iter().map(cpuid_into_wire).collect(),
            registers: Some(regs_into_wire(regs)),
            system: Some(sregs_into_wire(sregs)),
            xsave: xsave.into(),
            xcrs: xcrs.into_iter().map(xcr_into_wire).collect(),
            debug: Some(debug_into_wire(debug)),
            msrs: msrs.into_iter().map(|(index, value)| proto::Msr { index, value }).collect(),
            lapic: lapic.to_vec().into(),
            mp_state,
            events: Some(events_into_wire(events)),
            tsc_khz,
            tsc,
            tsc_deadline,
        }
    }

    pub(super) fn from_wire(wire: &proto::VcpuState) -> Result<Self, WireError> {
        let proto::VcpuState {
            index: _,
            cpuid,
            registers,
            system,
            xsave,
            xcrs,
            debug,
            msrs,
            lapic,
            mp_state,
            events,
            tsc_khz,
            tsc,
            tsc_deadline,
        } = wire;
        at_most("CPUID leaves", cpuid.len(), KVM_MAX_CPUID_ENTRIES, "at most 256")?;
        at_most("extended control registers", xcrs.len(), XCRS_MAX, "at most 16")?;
        at_most("MSRs", msrs.len(), MSRS_MAX, "at most 4096")?;
        if !(XsaveBytes::LEGACY..=XSAVE_MAX).contains(&xsave.len()) {
            let expected = "4096 to 65536";
            return Err(WireError::Count { what: "XSAVE bytes", found: xsave.len(), expected });
        }
        if *mp_state > MP_STATE_MAX {
            return Err(WireError::Range { what: "the run state", value: (*mp_state).into() });
        }
        let lapic = lapic[..].try_into().map_err(|_| WireError::Count {
            what: "local APIC bytes",
            found: lapic.len(),
            expected: "1024",
        })?;
        Ok(Self {
            cpuid: cpuid.iter().map(cpuid_from_wire).collect(),
            regs: regs_from_wire(present("registers", registers)?),
            sregs: sregs_from_wire(present("system registers", system)?)?,
            xsave: xsave.to_vec(),
            xcrs: xcrs.iter().map(xcr_from_wire).collect(),
            debug: debug_from_wire(present("debug registers", debug)?)?,
            msrs: msrs.iter().map(|&proto::Msr { index, value }| (index, value)).collect(),
            lapic,
            mp_state: kvm_mp_state { mp_state: *mp_state },
            events: events_from_wire(present("events", events)?)?,
            time: VcpuTime { tsc_khz: *tsc_khz, tsc: *tsc, tsc_deadline: *tsc_deadline },
        })
    }
}

fn cpuid_into_wire(entry: kvm_cpuid_entry2) -> proto::CpuidLeaf {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: _ } = entry;
    proto::CpuidLeaf { function, index, flags, eax, ebx, ecx, edx }
}

fn cpuid_from_wire(wire: &proto::CpuidLeaf) -> kvm_cpuid_entry2 {
    let proto::CpuidLeaf { function, index, flags, eax, ebx, ecx, edx } = *wire;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
}

fn xcr_into_wire(xcr: kvm_xcr) -> proto::ExtendedControlRegister {
    let kvm_xcr { xcr: number, reserved: _, value } = xcr;
    proto::ExtendedControlRegister { number, value }
}

fn xcr_from_wire(wire: &proto::ExtendedControlRegister) -> kvm_xcr {
    let proto::ExtendedControlRegister { number, value } = *wire;
    kvm_xcr { xcr: number, reserved: 0, value }
}
