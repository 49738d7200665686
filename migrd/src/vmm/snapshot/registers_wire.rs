//! A vCPU's registers between KVM's types and the wire's.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use migr_proto::v1 as proto;

use super::WireError;
use super::vcpu::SystemRegisters;
use super::vcpu_wire::{byte, half, present};

pub(super) fn regs_into_wire(regs: kvm_regs) -> proto::Registers {
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

pub(super) fn regs_from_wire(wire: &proto::Registers) -> kvm_regs {
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

pub(super) fn sregs_into_wire(registers: SystemRegisters) -> proto::SystemRegisters {
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

pub(super) fn sregs_from_wire(wire: &proto::SystemRegisters) -> Result<SystemRegisters, WireError> {
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

pub(super) fn debug_into_wire(debug: kvm_debugregs) -> proto::DebugRegisters {
    let kvm_debugregs { db, dr6, dr7, flags, reserved: _ } = debug;
    proto::DebugRegisters { db: db.to_vec(), dr6, dr7, flags }
}

pub(super) fn debug_from_wire(wire: &proto::DebugRegisters) -> Result<kvm_debugregs, WireError> {
    let proto::DebugRegisters { ref db, dr6, dr7, flags } = *wire;
    let db = db.as_slice().try_into().map_err(|_| WireError::Count {
        what: "debug address registers",
        found: db.len(),
        expected: "4",
    })?;
    Ok(kvm_debugregs { db, dr6, dr7, flags, reserved: [0; 9] })
}
