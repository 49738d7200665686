//! What of a device travels: the registers, how far the queues are, and what
//! its kind adds. What is in the rings travels with memory, so requests that
//! were not begun are found there.

use migr_proto::v1 as proto;
use virtio_queue::QueueT;

use super::device::StateError;
use super::mmio::{DRIVER_OK, EVENT_IDX, FEATURES_OK, Transport, VERSION_1};
use super::queue::{Position, Rings, Setup};
use super::registers::Registers;

/// What was saved, checked against the device it is for.
#[derive(Debug)]
pub struct Checked {
    offered: u64,
    registers: Registers,
    at: Vec<Position>,
    interrupt_status: u32,
    config_generation: u32,
    kind: proto::virtio_state::Kind,
}

fn refuse<T>(why: impl Into<String>) -> Result<T, StateError> {
    Err(StateError(why.into()))
}

impl Transport {
    /// Of a device that stands.
    #[must_use]
    pub fn save(&self) -> proto::VirtioState {
        let worker = self.worker();
        let Registers {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self.registers().clone();
        let event_idx = status & DRIVER_OK != 0 && driver_features & EVENT_IDX != 0;
        let queue_state = |(setup, rings): (&Setup, &Rings)| {
            let Setup { size, ready, descriptors, available, used } = *setup;
            let at = |next: fn(&virtio_queue::Queue) -> u16| rings.as_ref().map_or(0, next);
            proto::VirtioQueueState {
                size: size.into(),
                ready,
                event_idx,
                descriptors,
                available,
                used,
                next_available: at(QueueT::next_avail).into(),
                next_used: at(QueueT::next_used).into(),
            }
        };
        proto::VirtioState {
            slot: u32::try_from(self.slot()).unwrap_or(u32::MAX),
            device_id: worker.device.kind().id(),
            offered_features: self.offered(),
            driver_features,
            status,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            interrupt_status: self.interrupt().status(),
            config_generation: self.space().generation(),
            queues: queues.iter().zip(&worker.queues).map(queue_state).collect(),
            kind: Some(worker.device.save()),
        }
    }

    /// Checks what was saved, without a change to the device.
    ///
    /// # Errors
    /// When it is of another device, or none that a device can have.
    pub fn check(&self, state: &proto::VirtioState) -> Result<Checked, StateError> {
        let proto::VirtioState {
            slot,
            device_id,
            offered_features,
            driver_features,
            status,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            interrupt_status,
            config_generation,
            ref queues,
            kind,
        } = *state;
        if usize::try_from(slot) != Ok(self.slot()) || device_id != self.kind().id() {
            return refuse(format!("it is of device {device_id} in slot {slot}"));
        }
        let unknown = offered_features & !self.all_features();
        if unknown != 0 {
            return refuse(format!(
                "the guest was offered features {unknown:#x} that this migrd's device has not: use \
                 the same migrd at both ends"
            ));
        }
        if status > 0xff || interrupt_status > 3 {
            return refuse(format!("status {status:#x}, interrupt status {interrupt_status:#x}"));
        }
        let agreed = driver_features & !offered_features == 0 && driver_features & VERSION_1 != 0;
        if status & (FEATURES_OK | DRIVER_OK) != 0 && !agreed {
            return refuse(format!("its driver agreed to features {driver_features:#x}"));
        }
        if status & DRIVER_OK != 0 && status & FEATURES_OK == 0 {
            return refuse("its driver is ready and has agreed to no features");
        }
        if queues.len() != self.max_sizes().len() {
            return refuse(format!("it has {} queues", queues.len()));
        }
        let event_idx = status & DRIVER_OK != 0 && driver_features & EVENT_IDX != 0;
        let mut setups = Vec::new();
        let mut at = Vec::new();
        for (queue, most) in queues.iter().zip(self.max_sizes()) {
            let (setup, position) = queue_from_wire(queue, *most, event_idx)?;
            setups.push(setup);
            at.push(position);
        }
        let registers = Registers {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues: setups,
        };
        if status & DRIVER_OK != 0 {
            self.rings(&registers, &at).map_err(|abuse| StateError(abuse.to_string()))?;
        }
        let Some(kind) = kind else { return refuse("it does not say of which kind it is") };
        let offered = offered_features;
        Ok(Checked { offered, registers, at, interrupt_status, config_generation, kind })
    }

    /// Becomes what was saved. Of a device that has never worked, when the
    /// interrupt controllers are in place.
    ///
    /// # Errors
    /// When the kind finds no such state.
    pub fn restore(&self, state: Checked) -> Result<(), StateError> {
        let Checked { offered, registers, at, interrupt_status, config_generation, kind } = state;
        self.with_device(|device| device.restore(&kind))?;
        self.set_offered(offered);
        if registers.status & DRIVER_OK != 0 {
            self.start(&registers, &at).map_err(|abuse| StateError(abuse.to_string()))?;
        }
        *self.registers() = registers;
        self.space().set_generation(config_generation);
        self.worker().restored = true;
        self.interrupt().restore(interrupt_status);
        Ok(())
    }
}

fn queue_from_wire(
    state: &proto::VirtioQueueState,
    most: u16,
    agreed_event_idx: bool,
) -> Result<(Setup, Position), StateError> {
    let proto::VirtioQueueState {
        size,
        ready,
        event_idx,
        descriptors,
        available,
        used,
        next_available,
        next_used,
    } = *state;
    let size = match u16::try_from(size) {
        // 0: what the driver asked for was not possible.
        Ok(n) if n == 0 || (n.is_power_of_two() && n <= most) => n,
        _ => return refuse(format!("a queue has {size} descriptors")),
    };
    if event_idx != agreed_event_idx {
        return refuse("a queue has event indices where there are none");
    }
    let half = |value: u32| {
        u16::try_from(value).or_else(|_| refuse(format!("a queue is at entry {value}")))
    };
    let at = Position { available: half(next_available)?, used: half(next_used)? };
    Ok((Setup { size, ready, descriptors, available, used }, at))
}
