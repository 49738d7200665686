//! The chips that KVM emulates beside the vCPUs.

use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_pic_state, kvm_pit_channel_state,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use migr_proto::v1 as proto;

use super::error::{restore_failed, save_failed};
use super::vcpu_wire::{byte, half};
use super::{SnapshotError, WireError};
use crate::sys::kvm_state::{self, Ioapic};

/// Their state.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Devices {
    pub pic_master: kvm_pic_state,
    pub pic_slave: kvm_pic_state,
    pub ioapic: Ioapic,
    pub pit: kvm_pit_state2,
}

impl Devices {
    pub(super) fn save(vm: &VmFd) -> Result<Self, SnapshotError> {
        // In the direction in which interrupts travel; see the module.
        let pit = vm.get_pit2().map_err(save_failed("PIT"))?;
        let pic = |chip| kvm_state::pic(vm, chip).map_err(save_failed("PIC"));
        let (pic_master, pic_slave) = (pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?);
        let ioapic = kvm_state::ioapic(vm).map_err(save_failed("IOAPIC"))?;
        Ok(Self { pic_master, pic_slave, ioapic, pit })
    }

    pub(super) fn restore(self, vm: &VmFd) -> Result<(), SnapshotError> {
        let Self { pic_master, pic_slave, ioapic, pit } = self;
        let pic = |chip, state| kvm_state::set_pic(vm, chip, state).map_err(restore_failed("PIC"));
        pic(KVM_IRQCHIP_PIC_MASTER, pic_master)?;
        pic(KVM_IRQCHIP_PIC_SLAVE, pic_slave)?;
        kvm_state::set_ioapic(vm, ioapic).map_err(restore_failed("IOAPIC"))?;
        // Starts the timer.
        vm.set_pit2(&pit).map_err(restore_failed("PIT"))
    }

    pub(super) fn into_wire(self, clock_ns: u64) -> proto::VmDevices {
        let Self { pic_master, pic_slave, ioapic, pit } = self;
        proto::VmDevices {
            clock_ns,
            pic_master: Some(pic_into_wire(pic_master)),
            pic_slave: Some(pic_into_wire(pic_slave)),
            ioapic: Some(ioapic_into_wire(ioapic)),
            pit: Some(pit_into_wire(pit)),
        }
    }

    pub(super) fn from_wire(wire: &proto::VmDevices) -> Result<Self, WireError> {
        let proto::VmDevices { clock_ns: _, pic_master, pic_slave, ioapic, pit } = wire;
        let missing = |what| WireError::Missing { what };
        Ok(Self {
            pic_master: pic_from_wire(pic_master.as_ref().ok_or_else(|| missing("a PIC"))?)?,
            pic_slave: pic_from_wire(pic_slave.as_ref().ok_or_else(|| missing("a PIC"))?)?,
            ioapic: ioapic_from_wire(ioapic.as_ref().ok_or_else(|| missing("the IOAPIC"))?)?,
            pit: pit_from_wire(pit.as_ref().ok_or_else(|| missing("the PIT"))?)?,
        })
    }
}

fn pic_into_wire(state: kvm_pic_state) -> proto::PicState {
    let kvm_pic_state {
        last_irr,
        irr,
        imr,
        isr,
        priority_add,
        irq_base,
        read_reg_select,
        poll,
        special_mask,
        init_state,
        auto_eoi,
        rotate_on_auto_eoi,
        special_fully_nested_mode,
        init4,
        elcr,
        elcr_mask,
    } = state;
    proto::PicState {
        last_irr: last_irr.into(),
        irr: irr.into(),
        imr: imr.into(),
        isr: isr.into(),
        priority_add: priority_add.into(),
        irq_base: irq_base.into(),
        read_reg_select: read_reg_select.into(),
        poll: poll.into(),
        special_mask: special_mask.into(),
        init_state: init_state.into(),
        auto_eoi: auto_eoi.into(),
        rotate_on_auto_eoi: rotate_on_auto_eoi.into(),
        special_fully_nested_mode: special_fully_nested_mode.into(),
        init4: init4.into(),
        elcr: elcr.into(),
        elcr_mask: elcr_mask.into(),
    }
}

fn pic_from_wire(wire: &proto::PicState) -> Result<kvm_pic_state, WireError> {
    let proto::PicState {
        last_irr,
        irr,
        imr,
        isr,
        priority_add,
        irq_base,
        read_reg_select,
        poll,
        special_mask,
        init_state,
        auto_eoi,
        rotate_on_auto_eoi,
        special_fully_nested_mode,
        init4,
        elcr,
        elcr_mask,
    } = *wire;
    Ok(kvm_pic_state {
        last_irr: byte("PIC last_irr", last_irr)?,
        irr: byte("PIC irr", irr)?,
        imr: byte("PIC imr", imr)?,
        isr: byte("PIC isr", isr)?,
        priority_add: byte("PIC priority_add", priority_add)?,
        irq_base: byte("PIC irq_base", irq_base)?,
        read_reg_select: byte("PIC read_reg_select", read_reg_select)?,
        poll: byte("PIC poll", poll)?,
        special_mask: byte("PIC special_mask", special_mask)?,
        init_state: byte("PIC init_state", init_state)?,
        auto_eoi: byte("PIC auto_eoi", auto_eoi)?,
        rotate_on_auto_eoi: byte("PIC rotate_on_auto_eoi", rotate_on_auto_eoi)?,
        special_fully_nested_mode: byte("PIC nested mode", special_fully_nested_mode)?,
        init4: byte("PIC init4", init4)?,
        elcr: byte("PIC elcr", elcr)?,
        elcr_mask: byte("PIC elcr_mask", elcr_mask)?,
    })
}

/// Whether the IOAPIC's pin `pin` is masked (82093AA data sheet, 3.2.4).
pub(super) fn is_masked(vm: &VmFd, pin: u32) -> Result<bool, SnapshotError> {
    const MASKED: u64 = 1 << 16;
    let ioapic = kvm_state::ioapic(vm).map_err(save_failed("IOAPIC"))?;
    let entry = usize::try_from(pin).ok().and_then(|pin| ioapic.redirections.get(pin));
    Ok(entry.is_none_or(|entry| entry & MASKED != 0))
}

fn ioapic_into_wire(state: Ioapic) -> proto::IoapicState {
    let Ioapic { base_address, ioregsel, id, irr, redirections } = state;
    proto::IoapicState { base_address, ioregsel, id, irr, redirections: redirections.to_vec() }
}

fn ioapic_from_wire(wire: &proto::IoapicState) -> Result<Ioapic, WireError> {
    let proto::IoapicState { base_address, ioregsel, id, irr, ref redirections } = *wire;
    let redirections = redirections.as_slice().try_into().map_err(|_| WireError::Count {
        what: "IOAPIC redirections",
        found: redirections.len(),
        expected: "24",
    })?;
    Ok(Ioapic { base_address, ioregsel, id, irr, redirections })
}

fn pit_into_wire(state: kvm_pit_state2) -> proto::PitState {
    let kvm_pit_state2 { channels, flags, reserved: _ } = state;
    proto::PitState { channels: channels.map(channel_into_wire).to_vec(), flags }
}

fn pit_from_wire(wire: &proto::PitState) -> Result<kvm_pit_state2, WireError> {
    let proto::PitState { channels, flags } = wire;
    let [first, second, third] = channels.as_slice() else {
        return Err(WireError::Count {
            what: "PIT channels",
            found: channels.len(),
            expected: "3",
        });
    };
    let channels =
        [channel_from_wire(first)?, channel_from_wire(second)?, channel_from_wire(third)?];
    Ok(kvm_pit_state2 { channels, flags: *flags, reserved: [0; 9] })
}

fn channel_into_wire(state: kvm_pit_channel_state) -> proto::PitChannel {
    let kvm_pit_channel_state {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time,
    } = state;
    proto::PitChannel {
        count,
        latched_count: latched_count.into(),
        count_latched: count_latched.into(),
        status_latched: status_latched.into(),
        status: status.into(),
        read_state: read_state.into(),
        write_state: write_state.into(),
        write_latch: write_latch.into(),
        rw_mode: rw_mode.into(),
        mode: mode.into(),
        bcd: bcd.into(),
        gate: gate.into(),
        count_load_time,
    }
}

fn channel_from_wire(wire: &proto::PitChannel) -> Result<kvm_pit_channel_state, WireError> {
    let proto::PitChannel {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time,
    } = *wire;
    Ok(kvm_pit_channel_state {
        count,
        latched_count: half("PIT latched_count", latched_count)?,
        count_latched: byte("PIT count_latched", count_latched)?,
        status_latched: byte("PIT status_latched", status_latched)?,
        status: byte("PIT status", status)?,
        read_state: byte("PIT read_state", read_state)?,
        write_state: byte("PIT write_state", write_state)?,
        write_latch: byte("PIT write_latch", write_latch)?,
        rw_mode: byte("PIT rw_mode", rw_mode)?,
        mode: byte("PIT mode", mode)?,
        bcd: byte("PIT bcd", bcd)?,
        gate: byte("PIT gate", gate)?,
        count_load_time,
    })
}
