//! One vCPU: what is read of it, in what order it is set.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::error::{restore_failed, save_failed};
use super::msrs;
use super::time::{RestoredClock, VcpuTime, VmClock};
use super::{Host, SnapshotError};
use crate::sys::kvm_state;

/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`, in the width of its field.
const PDPTRS_VALID: u64 = 1;

/// The state of one vCPU in KVM's own types.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Vcpu {
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub regs: kvm_regs,
    pub sregs: SystemRegisters,
    pub xsave: Vec<u8>,
    pub xcrs: Vec<kvm_xcr>,
    pub debug: kvm_debugregs,
    pub msrs: Vec<(u32, u64)>,
    pub lapic: [u8; LAPIC_BYTES],
    pub mp_state: kvm_mp_state,
    pub events: kvm_vcpu_events,
    pub time: VcpuTime,
}

/// What KVM keeps of the local APIC's register page.
pub(super) const LAPIC_BYTES: usize = 1024;

/// Control registers and segments, and the page directory pointers if they are
/// in use and known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct SystemRegisters {
    /// With its interrupt bitmap empty: the pending interrupt is in the events.
    pub sregs: kvm_sregs,
    pub pdptrs: Option<[u64; 4]>,
}

impl SystemRegisters {
    fn save(vcpu: &VcpuFd, host: &Host) -> Result<Self, SnapshotError> {
        if !host.sregs2 {
            let sregs = vcpu.get_sregs().map_err(save_failed("system registers"))?;
            let sregs = kvm_sregs { interrupt_bitmap: [0; 4], ..sregs };
            return Ok(Self { sregs, pdptrs: None });
        }
        let sregs = kvm_state::sregs2(vcpu).map_err(save_failed("system registers"))?;
        let kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        } = sregs;
        let sregs = kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            interrupt_bitmap: [0; 4],
        };
        Ok(Self { sregs, pdptrs: (flags & PDPTRS_VALID != 0).then_some(pdptrs) })
    }

    fn restore(self, vcpu: &VcpuFd, host: &Host) -> Result<(), SnapshotError> {
        let Self { sregs, pdptrs } = self;
        // Without the newer call, or without the pointers, KVM reads them from
        // the guest's memory, which is in place by now.
        let (true, Some(pdptrs)) = (host.sregs2, pdptrs) else {
            return vcpu.set_sregs(&sregs).map_err(restore_failed("system registers"));
        };
        let kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            interrupt_bitmap: _,
        } = sregs;
        let sregs = kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags: PDPTRS_VALID,
            pdptrs,
        };
        kvm_state::set_sregs2(vcpu, &sregs).map_err(restore_failed("system registers"))
    }
}

impl Vcpu {
    pub(super) fn save(vcpu: &VcpuFd, host: &Host, clock: VmClock) -> Result<Self, SnapshotError> {
        // First: asking takes in INITs and start-up interrupts that wait,
        // which changes registers.
        let mp_state = vcpu.get_mp_state().map_err(save_failed("run state"))?;
        let lapic = vcpu.get_lapic().map_err(save_failed("local APIC"))?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(save_failed("CPUID"))?;
        let xcrs = vcpu.get_xcrs().map_err(save_failed("extended control registers"))?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0).min(xcrs.xcrs.len());
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            regs: vcpu.get_regs().map_err(save_failed("registers"))?,
            sregs: SystemRegisters::save(vcpu, host)?,
            xsave: kvm_state::xsave(vcpu, host.xsave).map_err(save_failed("XSAVE area"))?,
            xcrs: xcrs.xcrs[..count].to_vec(),
            debug: vcpu.get_debug_regs().map_err(save_failed("debug registers"))?,
            msrs: msrs::save(vcpu, &msrs::of(&host.msrs, cpuid.as_slice()))?,
            lapic: lapic.regs.map(i8::cast_unsigned),
            mp_state,
            events: vcpu.get_vcpu_events().map_err(save_failed("events"))?,
            time: VcpuTime::save(vcpu, clock)?,
        })
    }

    pub(super) fn restore(
        self,
        vcpu: &VcpuFd,
        host: &Host,
        clock: RestoredClock,
    ) -> Result<(), SnapshotError> {
        // Decides which bits of everything else are legal.
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| restore_failed("CPUID")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        vcpu.set_cpuid2(&cpuid).map_err(restore_failed("CPUID"))?;
        self.reset(vcpu, host, clock)
    }

    /// Sets all but CPUID, which KVM does not let change once a vCPU has run.
    pub(super) fn reset(
        self,
        vcpu: &VcpuFd,
        host: &Host,
        clock: RestoredClock,
    ) -> Result<(), SnapshotError> {
        let Self { cpuid: _, regs, sregs, xsave, xcrs, debug, msrs, lapic, mp_state, events, time } =
            self;
        vcpu.set_regs(&regs).map_err(restore_failed("registers"))?;
        // Holds the APIC's base and mode, which tell how to read its page, and
        // the CR4 bit without which XCR0 is out of reach.
        sregs.restore(vcpu, host)?;
        vcpu.set_xcrs(&xcrs_of(&xcrs)).map_err(restore_failed("extended control registers"))?;
        restore_xsave(vcpu, host, &xsave)?;
        vcpu.set_debug_regs(&debug).map_err(restore_failed("debug registers"))?;
        // Before the MSRs: the paravirtual clock's make KVM compute with it.
        time.restore_tsc(vcpu, clock, host.tsc_scaling)?;
        // Its timer starts from the register page.
        let lapic = kvm_lapic_state { regs: lapic.map(u8::cast_signed) };
        vcpu.set_lapic(&lapic).map_err(restore_failed("local APIC"))?;
        msrs::restore(vcpu, &msrs)?;
        time.restore_deadline(vcpu)?;
        // After the registers: a vCPU that waits to be started is reset by
        // nothing that follows.
        vcpu.set_mp_state(mp_state).map_err(restore_failed("run state"))?;
        // Last: setting registers forgets what was about to be injected.
        vcpu.set_vcpu_events(&events).map_err(restore_failed("events"))
    }
}

fn xcrs_of(list: &[kvm_xcr]) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs::default();
    for (into, from) in xcrs.xcrs.iter_mut().zip(list) {
        *into = *from;
        xcrs.nr_xcrs += 1;
    }
    xcrs
}

/// Sets an area that may be longer or shorter than this host's: components lie
/// where the standard format puts them, so zeros at the end mean nothing.
fn restore_xsave(vcpu: &VcpuFd, host: &Host, area: &[u8]) -> Result<(), SnapshotError> {
    let room = host.xsave.get();
    let length = area.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    if length > room {
        return Err(SnapshotError::Xsave { length, room });
    }
    let area = &area[..area.len().min(room)];
    kvm_state::set_xsave(vcpu, host.xsave, area).map_err(restore_failed("XSAVE area"))
}
