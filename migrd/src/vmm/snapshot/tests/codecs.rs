//! Every field of a state is where it was when it was written and read again.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr,
};
use proptest::prelude::*;

use super::super::devices::Devices;
use super::super::time::VcpuTime;
use super::super::vcpu::{LAPIC_BYTES, SystemRegisters, Vcpu};
use super::*;
use crate::sys::kvm_state::Ioapic;

/// Values drawn one after the other, none of them twice the same but by
/// chance, so that two fields in each other's place are found.
struct Draw(u64);

impl Draw {
    fn u64(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn u32(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.u64().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
    fn u16(&mut self) -> u16 {
        let [a, b, ..] = self.u64().to_le_bytes();
        u16::from_le_bytes([a, b])
    }
    fn u8(&mut self) -> u8 {
        self.u64().to_le_bytes()[0]
    }
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.u8()).collect()
    }
    fn segment(&mut self) -> kvm_segment {
        kvm_segment {
            base: self.u64(),
            limit: self.u32(),
            selector: self.u16(),
            type_: self.u8(),
            present: self.u8(),
            dpl: self.u8(),
            db: self.u8(),
            s: self.u8(),
            l: self.u8(),
            g: self.u8(),
            avl: self.u8(),
            unusable: self.u8(),
            padding: 0,
        }
    }
    fn table(&mut self) -> kvm_dtable {
        kvm_dtable { base: self.u64(), limit: self.u16(), padding: [0; 3] }
    }
    fn regs(&mut self) -> kvm_regs {
        kvm_regs {
            rax: self.u64(),
            rbx: self.u64(),
            rcx: self.u64(),
            rdx: self.u64(),
            rsi: self.u64(),
            rdi: self.u64(),
            rsp: self.u64(),
            rbp: self.u64(),
            r8: self.u64(),
            r9: self.u64(),
            r10: self.u64(),
            r11: self.u64(),
            r12: self.u64(),
            r13: self.u64(),
            r14: self.u64(),
            r15: self.u64(),
            rip: self.u64(),
            rflags: self.u64(),
        }
    }
    fn sregs(&mut self) -> kvm_sregs {
        kvm_sregs {
            cs: self.segment(),
            ds: self.segment(),
            es: self.segment(),
            fs: self.segment(),
            gs: self.segment(),
            ss: self.segment(),
            tr: self.segment(),
            ldt: self.segment(),
            gdt: self.table(),
            idt: self.table(),
            cr0: self.u64(),
            cr2: self.u64(),
            cr3: self.u64(),
            cr4: self.u64(),
            cr8: self.u64(),
            efer: self.u64(),
            apic_base: self.u64(),
            interrupt_bitmap: [0; 4],
        }
    }
    fn events(&mut self) -> kvm_vcpu_events {
        let mut events = kvm_vcpu_events::default();
        let exception = &mut events.exception;
        (exception.injected, exception.nr) = (self.u8(), self.u8());
        (exception.has_error_code, exception.pending) = (self.u8(), self.u8());
        exception.error_code = self.u32();
        let interrupt = &mut events.interrupt;
        (interrupt.injected, interrupt.nr) = (self.u8(), self.u8());
        (interrupt.soft, interrupt.shadow) = (self.u8(), self.u8());
        let nmi = &mut events.nmi;
        (nmi.injected, nmi.pending, nmi.masked) = (self.u8(), self.u8(), self.u8());
        let smi = &mut events.smi;
        (smi.smm, smi.pending) = (self.u8(), self.u8());
        (smi.smm_inside_nmi, smi.latched_init) = (self.u8(), self.u8());
        events.sipi_vector = self.u32();
        events.flags = self.u32() & 0x3f;
        events.triple_fault.pending = self.u8();
        events.exception_has_payload = self.u8();
        events.exception_payload = self.u64();
        events
    }
    fn pic(&mut self) -> kvm_pic_state {
        kvm_pic_state {
            last_irr: self.u8(),
            irr: self.u8(),
            imr: self.u8(),
            isr: self.u8(),
            priority_add: self.u8(),
            irq_base: self.u8(),
            read_reg_select: self.u8(),
            poll: self.u8(),
            special_mask: self.u8(),
            init_state: self.u8(),
            auto_eoi: self.u8(),
            rotate_on_auto_eoi: self.u8(),
            special_fully_nested_mode: self.u8(),
            init4: self.u8(),
            elcr: self.u8(),
            elcr_mask: self.u8(),
        }
    }
    fn channel(&mut self) -> kvm_pit_channel_state {
        kvm_pit_channel_state {
            count: self.u32(),
            latched_count: self.u16(),
            count_latched: self.u8(),
            status_latched: self.u8(),
            status: self.u8(),
            read_state: self.u8(),
            write_state: self.u8(),
            write_latch: self.u8(),
            rw_mode: self.u8(),
            mode: self.u8(),
            bcd: self.u8(),
            gate: self.u8(),
            count_load_time: self.u64().cast_signed(),
        }
    }
    fn cpuid(&mut self) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: self.u32(),
            index: self.u32(),
            flags: self.u32(),
            eax: self.u32(),
            ebx: self.u32(),
            ecx: self.u32(),
            edx: self.u32(),
            padding: [0; 3],
        }
    }
}

fn vcpu(draw: &mut Draw, pdptrs: bool, count: usize) -> Vcpu {
    Vcpu {
        cpuid: (0..count).map(|_| draw.cpuid()).collect(),
        regs: draw.regs(),
        sregs: SystemRegisters {
            sregs: draw.sregs(),
            pdptrs: pdptrs.then(|| [draw.u64(), draw.u64(), draw.u64(), draw.u64()]),
        },
        xsave: draw.bytes(4096 + count * 4),
        xcrs: (0..count % 17)
            .map(|_| kvm_xcr { xcr: draw.u32(), reserved: 0, value: draw.u64() })
            .collect(),
        debug: kvm_debugregs {
            db: [draw.u64(), draw.u64(), draw.u64(), draw.u64()],
            dr6: draw.u64(),
            dr7: draw.u64(),
            flags: draw.u64(),
            reserved: [0; 9],
        },
        msrs: (0..count).map(|_| (draw.u32(), draw.u64())).collect(),
        lapic: draw.bytes(LAPIC_BYTES).try_into().unwrap(),
        mp_state: kvm_mp_state { mp_state: draw.u32() % 5 },
        events: draw.events(),
        time: VcpuTime { tsc_khz: draw.u32(), tsc: draw.u64(), tsc_deadline: draw.u64() },
    }
}

proptest! {
    #[test]
    fn every_field_of_a_vcpu_comes_back(seed: u64, pdptrs: bool, count in 0_usize..200) {
        let before = vcpu(&mut Draw(seed), pdptrs, count);
        let bytes = before.clone().into_wire(3).encode_to_vec();
        let wire = proto::VcpuState::decode(&bytes[..]).unwrap();
        prop_assert_eq!(wire.index, 3);
        prop_assert_eq!(Vcpu::from_wire(&wire).unwrap(), before);
    }

    #[test]
    fn every_field_of_the_chips_comes_back(seed: u64) {
        let mut draw = Draw(seed);
        let before = Devices {
            pic_master: draw.pic(),
            pic_slave: draw.pic(),
            ioapic: Ioapic {
                base_address: draw.u64(),
                ioregsel: draw.u32(),
                id: draw.u32(),
                irr: draw.u32(),
                redirections: [(); 24].map(|()| draw.u64()),
            },
            pit: kvm_pit_state2 {
                channels: [draw.channel(), draw.channel(), draw.channel()],
                flags: draw.u32(),
                reserved: [0; 9],
            },
        };
        let bytes = before.into_wire(7).encode_to_vec();
        let wire = proto::VmDevices::decode(&bytes[..]).unwrap();
        prop_assert_eq!(wire.clock_ns, 7);
        prop_assert_eq!(Devices::from_wire(&wire).unwrap(), before);
    }

    #[test]
    fn damaged_state_never_panics(seed: u64, at: prop::sample::Index, bit in 0_u8..8) {
        let mut draw = Draw(seed);
        let devices = Devices::default().into_wire(0);
        let state = whole(devices, vec![vcpu(&mut draw, true, 3).into_wire(0)]);
        let mut bytes = state.encode_to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(read) = state::decode(&bytes) {
            prop_assert_eq!(read.version, state::VERSION);
            prop_assert_eq!(read.vcpus.len(), 1);
        }
    }
}
