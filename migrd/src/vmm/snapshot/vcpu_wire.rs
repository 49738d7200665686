//! A vCPU's state between KVM's types and the wire's, field by field.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_mp_state,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1,
    kvm_vcpu_events__bindgen_ty_2, kvm_vcpu_events__bindgen_ty_3, kvm_vcpu_events__bindgen_ty_4,
    kvm_vcpu_events__bindgen_ty_5, kvm_xcr,
};
use migr_proto::v1 as proto;

use super::WireError;
use super::msrs::MSRS_MAX;
use super::time::VcpuTime;
use super::vcpu::{SystemRegisters, Vcpu};
use crate::sys::kvm_state::XsaveBytes;

/// Far more than any CPU's XSAVE area takes, in bytes.
const XSAVE_MAX: usize = 64 << 10;
/// `KVM_MAX_XCRS`.
const XCRS_MAX: usize = 16;
/// `KVM_MP_STATE_AP_RESET_HOLD` and up are of other machines or of guests with
/// encrypted memory.
const MP_STATE_MAX: u32 = 4;

const EVENT_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// A byte that travelled in a wider field.
pub(super) fn byte(what: &'static str, value: u32) -> Result<u8, WireError> {
    u8::try_from(value).map_err(|_| WireError::Range { what, value: value.into() })
}

/// 16 bits that travelled in a wider field.
pub(super) fn half(what: &'static str, value: u32) -> Result<u16, WireError> {
    u16::try_from(value).map_err(|_| WireError::Range { what, value: value.into() })
}

fn present<'a, T>(what: &'static str, message: &'a Option<T>) -> Result<&'a T, WireError> {
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

fn regs_into_wire(regs: kvm_regs) -> proto::Registers {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = regs;
    proto::Registers {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

fn regs_from_wire(wire: &proto::Registers) -> kvm_regs {
    let proto::Registers {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = *wire;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

fn sregs_into_wire(registers: SystemRegisters) -> proto::SystemRegisters {
    let SystemRegisters { sregs, pdptrs } = registers;
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
        // Says again what the events say.
        interrupt_bitmap: _,
    } = sregs;
    let segment = |segment| Some(segment_into_wire(segment));
    proto::SystemRegisters {
        cs: segment(cs),
        ds: segment(ds),
        es: segment(es),
        fs: segment(fs),
        gs: segment(gs),
        ss: segment(ss),
        tr: segment(tr),
        ldt: segment(ldt),
        gdt: Some(table_into_wire(gdt)),
        idt: Some(table_into_wire(idt)),
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        pdptrs: pdptrs.map(Vec::from).unwrap_or_default(),
    }
}

fn sregs_from_wire(wire: &proto::SystemRegisters) -> Result<SystemRegisters, WireError> {
    let proto::SystemRegisters {
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
        pdptrs,
    } = wire;
    let segment = |message| segment_from_wire(present("a segment", message)?);
    let table = |message| table_from_wire(present("a descriptor table", message)?);
    let sregs = kvm_sregs {
        cs: segment(cs)?,
        ds: segment(ds)?,
        es: segment(es)?,
        fs: segment(fs)?,
        gs: segment(gs)?,
        ss: segment(ss)?,
        tr: segment(tr)?,
        ldt: segment(ldt)?,
        gdt: table(gdt)?,
        idt: table(idt)?,
        cr0: *cr0,
        cr2: *cr2,
        cr3: *cr3,
        cr4: *cr4,
        cr8: *cr8,
        efer: *efer,
        apic_base: *apic_base,
        interrupt_bitmap: [0; 4],
    };
    let pdptrs = match pdptrs.as_slice() {
        [] => None,
        found => Some(found.try_into().map_err(|_| WireError::Count {
            what: "page directory pointers",
            found: found.len(),
            expected: "0 or 4",
        })?),
    };
    Ok(SystemRegisters { sregs, pdptrs })
}

fn segment_into_wire(segment: kvm_segment) -> proto::Segment {
    let kvm_segment {
        base,
        limit,
        selector,
        type_,
        present,
        dpl,
        db,
        s,
        l,
        g,
        avl,
        unusable,
        padding: _,
    } = segment;
    proto::Segment {
        base,
        limit,
        selector: selector.into(),
        r#type: type_.into(),
        present: present.into(),
        dpl: dpl.into(),
        db: db.into(),
        s: s.into(),
        l: l.into(),
        g: g.into(),
        avl: avl.into(),
        unusable: unusable.into(),
    }
}

fn segment_from_wire(wire: &proto::Segment) -> Result<kvm_segment, WireError> {
    let proto::Segment { base, limit, selector, r#type, present, dpl, db, s, l, g, avl, unusable } =
        *wire;
    Ok(kvm_segment {
        base,
        limit,
        selector: half("segment selector", selector)?,
        type_: byte("segment type", r#type)?,
        present: byte("segment present", present)?,
        dpl: byte("segment dpl", dpl)?,
        db: byte("segment db", db)?,
        s: byte("segment s", s)?,
        l: byte("segment l", l)?,
        g: byte("segment g", g)?,
        avl: byte("segment avl", avl)?,
        unusable: byte("segment unusable", unusable)?,
        padding: 0,
    })
}

fn table_into_wire(table: kvm_dtable) -> proto::DescriptorTable {
    let kvm_dtable { base, limit, padding: _ } = table;
    proto::DescriptorTable { base, limit: limit.into() }
}

fn table_from_wire(wire: &proto::DescriptorTable) -> Result<kvm_dtable, WireError> {
    let proto::DescriptorTable { base, limit } = *wire;
    Ok(kvm_dtable { base, limit: half("descriptor table limit", limit)?, padding: [0; 3] })
}

fn debug_into_wire(debug: kvm_debugregs) -> proto::DebugRegisters {
    let kvm_debugregs { db, dr6, dr7, flags, reserved: _ } = debug;
    proto::DebugRegisters { db: db.to_vec(), dr6, dr7, flags }
}

fn debug_from_wire(wire: &proto::DebugRegisters) -> Result<kvm_debugregs, WireError> {
    let proto::DebugRegisters { ref db, dr6, dr7, flags } = *wire;
    let db = db.as_slice().try_into().map_err(|_| WireError::Count {
        what: "debug address registers",
        found: db.len(),
        expected: "4",
    })?;
    Ok(kvm_debugregs { db, dr6, dr7, flags, reserved: [0; 9] })
}

fn events_into_wire(events: kvm_vcpu_events) -> proto::VcpuEvents {
    let kvm_vcpu_events {
        exception:
            kvm_vcpu_events__bindgen_ty_1 { injected, nr, has_error_code, pending, error_code },
        interrupt,
        nmi,
        sipi_vector,
        flags,
        smi,
        triple_fault: kvm_vcpu_events__bindgen_ty_5 { pending: triple_fault_pending },
        reserved: _,
        exception_has_payload,
        exception_payload,
    } = events;
    let exception = proto::ExceptionEvent {
        injected: injected.into(),
        nr: nr.into(),
        has_error_code: has_error_code.into(),
        pending: pending.into(),
        error_code,
        has_payload: exception_has_payload.into(),
        payload: exception_payload,
    };
    let kvm_vcpu_events__bindgen_ty_2 { injected, nr, soft, shadow } = interrupt;
    let interrupt = proto::InterruptEvent {
        injected: injected.into(),
        nr: nr.into(),
        soft: soft.into(),
        shadow: shadow.into(),
    };
    let kvm_vcpu_events__bindgen_ty_3 { injected, pending, masked, pad: _ } = nmi;
    let nmi = proto::NmiEvent {
        injected: injected.into(),
        pending: pending.into(),
        masked: masked.into(),
    };
    let kvm_vcpu_events__bindgen_ty_4 { smm, pending, smm_inside_nmi, latched_init } = smi;
    let smi = proto::SmiEvent {
        smm: smm.into(),
        pending: pending.into(),
        smm_inside_nmi: smm_inside_nmi.into(),
        latched_init: latched_init.into(),
    };
    proto::VcpuEvents {
        exception: Some(exception),
        interrupt: Some(interrupt),
        nmi: Some(nmi),
        sipi_vector,
        flags,
        smi: Some(smi),
        triple_fault_pending: triple_fault_pending.into(),
    }
}

fn events_from_wire(wire: &proto::VcpuEvents) -> Result<kvm_vcpu_events, WireError> {
    let proto::VcpuEvents {
        exception,
        interrupt,
        nmi,
        sipi_vector,
        flags,
        smi,
        triple_fault_pending,
    } = wire;
    if flags & !EVENT_FLAGS != 0 {
        return Err(WireError::Range { what: "the event flags", value: (*flags).into() });
    }
    let proto::ExceptionEvent {
        injected,
        nr,
        has_error_code,
        pending,
        error_code,
        has_payload,
        payload,
    } = *present("the exception", exception)?;
    Ok(kvm_vcpu_events {
        exception: kvm_vcpu_events__bindgen_ty_1 {
            injected: byte("exception injected", injected)?,
            nr: byte("exception number", nr)?,
            has_error_code: byte("exception has_error_code", has_error_code)?,
            pending: byte("exception pending", pending)?,
            error_code,
        },
        interrupt: interrupt_from_wire(present("the interrupt", interrupt)?)?,
        nmi: nmi_from_wire(present("the NMI", nmi)?)?,
        sipi_vector: *sipi_vector,
        flags: *flags,
        smi: smi_from_wire(present("the SMI", smi)?)?,
        triple_fault: kvm_vcpu_events__bindgen_ty_5 {
            pending: byte("triple fault pending", *triple_fault_pending)?,
        },
        reserved: [0; 26],
        exception_has_payload: byte("exception has_payload", has_payload)?,
        exception_payload: payload,
    })
}

fn interrupt_from_wire(
    wire: &proto::InterruptEvent,
) -> Result<kvm_vcpu_events__bindgen_ty_2, WireError> {
    let proto::InterruptEvent { injected, nr, soft, shadow } = *wire;
    Ok(kvm_vcpu_events__bindgen_ty_2 {
        injected: byte("interrupt injected", injected)?,
        nr: byte("interrupt number", nr)?,
        soft: byte("interrupt soft", soft)?,
        shadow: byte("interrupt shadow", shadow)?,
    })
}

fn nmi_from_wire(wire: &proto::NmiEvent) -> Result<kvm_vcpu_events__bindgen_ty_3, WireError> {
    let proto::NmiEvent { injected, pending, masked } = *wire;
    Ok(kvm_vcpu_events__bindgen_ty_3 {
        injected: byte("NMI injected", injected)?,
        pending: byte("NMI pending", pending)?,
        masked: byte("NMI masked", masked)?,
        pad: 0,
    })
}

fn smi_from_wire(wire: &proto::SmiEvent) -> Result<kvm_vcpu_events__bindgen_ty_4, WireError> {
    let proto::SmiEvent { smm, pending, smm_inside_nmi, latched_init } = *wire;
    Ok(kvm_vcpu_events__bindgen_ty_4 {
        smm: byte("SMI smm", smm)?,
        pending: byte("SMI pending", pending)?,
        smm_inside_nmi: byte("SMI smm_inside_nmi", smm_inside_nmi)?,
        latched_init: byte("SMI latched_init", latched_init)?,
    })
}
