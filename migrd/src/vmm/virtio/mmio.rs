//! The registers of a virtio-mmio device (virtio 1.2, 4.2.2), version 2.

use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Device, Kind};
use super::gate::Gate;
use super::irq::Interrupt;
use super::queue::{Position, QueueAbuse, Rings, Turn, rings};
use super::registers::{Registers, half};
use super::space::ConfigSpace;
use crate::sys::vm::Memory;
use crate::vmm::lifecycle::{Stop, StopKind};

/// Feature bit: descriptors may be in tables of their own (virtio 1.2, 2.7.5.3).
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bit: both sides say from where on they want to hear (2.7.7, 2.7.10).
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Feature bit: not the devices from before the standard.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// Bytes of guest-physical address space that a device takes.
pub const LENGTH: u64 = 0x1000;

/// `virt`, little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Nobody's: drivers are told not to look at it.
const VENDOR: u32 = u32::from_le_bytes(*b"MIGR");

/// Status bit: the driver is set up (2.1).
pub const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
/// Status bit: driver and device agree on the features.
pub const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;

/// What a device's thread works on; vCPUs wait for it only where they change
/// what the device does: at the start and the reset of a driver.
#[derive(Debug)]
pub(super) struct Worker {
    pub device: Box<dyn Device>,
    pub queues: Vec<Rings>,
    pub features: u64,
    /// It was restored and has not worked since.
    pub restored: bool,
}

/// The eventfds of a device.
#[derive(Debug)]
pub struct Events {
    /// Its interrupt.
    pub line: EventFd,
    /// Rung by the driver, one for each queue.
    pub bells: Vec<EventFd>,
    /// Rung when there is something else to see.
    pub wake: EventFd,
}

/// A virtio device and its registers.
#[derive(Debug)]
pub struct Transport {
    slot: usize,
    kind: Kind,
    /// What this device has.
    features: u64,
    /// What its driver sees of that: one that was restored may have been
    /// offered with less.
    offered: Mutex<u64>,
    max_sizes: &'static [u16],
    registers: Mutex<Registers>,
    worker: Mutex<Worker>,
    /// Who waits for the worker.
    wanted: AtomicUsize,
    interrupt: Interrupt,
    space: Arc<ConfigSpace>,
    memory: Arc<Memory>,
    gate: Arc<Gate>,
    /// Rung by the driver, a queue each.
    bells: Vec<EventFd>,
    /// Rung when there is something else to see.
    wake: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Transport {
    /// Around `device`, which is number `slot` at `gate`.
    #[must_use]
    pub fn new(
        slot: usize,
        device: Box<dyn Device>,
        memory: Arc<Memory>,
        gate: Arc<Gate>,
        events: Events,
    ) -> Self {
        let Events { line, bells, wake } = events;
        let max_sizes = device.queue_sizes();
        let features = device.features() | VERSION_1 | EVENT_IDX | INDIRECT_DESC;
        Self {
            slot,
            kind: device.kind(),
            features,
            offered: Mutex::new(features),
            max_sizes,
            registers: Mutex::new(Registers::of(max_sizes)),
            space: device.space(),
            worker: Mutex::new(Worker {
                device,
                queues: max_sizes.iter().map(|_| None).collect(),
                features: 0,
                restored: false,
            }),
            wanted: AtomicUsize::new(0),
            interrupt: Interrupt::new(line),
            memory,
            gate,
            bells,
            wake,
        }
    }

    /// Its interrupt, for KVM to watch.
    #[must_use]
    pub fn line(&self) -> &EventFd {
        self.interrupt.line()
    }

    /// Its number among the VM's devices.
    #[must_use]
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// For people.
    #[must_use]
    pub fn name(&self) -> String {
        format!("virtio device {} ({})", self.slot, self.kind)
    }

    /// Rung by the driver, a queue each.
    #[must_use]
    pub fn bells(&self) -> &[EventFd] {
        &self.bells
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Has its thread look around.
    pub fn wake(&self) {
        // A counter that is full has been rung often enough.
        let _ = self.wake.write(1);
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Of which kind it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// What its thread works on, once that has put it down.
    pub(super) fn worker(&self) -> MutexGuard<'_, Worker> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let worker = lock(&self.worker);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        worker
    }

    /// For the control thread: uses the device, which stands.
    pub fn with_device<T>(&self, use_it: impl FnOnce(&mut dyn Device) -> T) -> T {
        use_it(self.worker().device.as_mut())
    }

    /// For its own thread: has the device do something, and says whether it was
    /// interrupted in that.
    ///
    /// # Errors
    /// When the driver did in a queue what no driver may.
    pub(super) fn turn(
        &self,
        work: impl FnOnce(&mut dyn Device, &mut Turn<'_>) -> Result<(), QueueAbuse>,
    ) -> Result<bool, QueueAbuse> {
        let mut worker = lock(&self.worker);
        let Worker { device, queues, features, restored: _ } = &mut *worker;
        let mut turn = Turn {
            memory: &self.memory,
            features: *features,
            queues,
            interrupt: &self.interrupt,
            gate: &self.gate,
            wanted: &self.wanted,
            answered: 0,
        };
        work(device.as_mut(), &mut turn)?;
        let over = turn.is_over();
        turn.end()?;
        Ok(over)
    }

    /// For its own thread: what the device waits for.
    pub(super) fn awaits(&self) -> (Option<Arc<File>>, Option<Instant>) {
        let worker = lock(&self.worker);
        (worker.device.source(), worker.device.deadline())
    }

    /// The device does nothing more for a driver that abused it.
    pub(super) fn give_up(&self) {
        self.worker().queues.iter_mut().for_each(|queue| *queue = None);
    }

    /// The driver reads at `offset` from the device's address.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u32::try_from(offset) else { return data.fill(0) };
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            return self.space.read(usize::try_from(at).unwrap_or(usize::MAX), data);
        }
        // All registers are 32 bits wide and aligned (4.2.2.2).
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) => *word = self.register(offset).to_le_bytes(),
            Err(_) => data.fill(0),
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let registers = self.registers();
        let queue = registers.selected();
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.kind.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), registers.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                queue.and_then(|i| self.max_sizes.get(i)).map_or(0, |size| u32::from(*size))
            }
            VIRTIO_MMIO_QUEUE_READY => {
                queue.and_then(|i| registers.queues.get(i)).map_or(0, |q| u32::from(q.ready))
            }
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => registers.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.space.generation(),
            // No shared memory: its length and place read as all ones (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// What it offers its driver.
    #[must_use]
    pub fn offered(&self) -> u64 {
        *lock(&self.offered)
    }

    pub(super) fn all_features(&self) -> u64 {
        self.features
    }

    pub(super) fn set_offered(&self, features: u64) {
        *lock(&self.offered) = features;
    }

    pub(super) fn max_sizes(&self) -> &'static [u16] {
        self.max_sizes
    }

    pub(super) fn space(&self) -> &ConfigSpace {
        &self.space
    }

    /// The driver writes at `offset` from the device's address; says so if that
    /// ends the guest.
    pub fn write(&self, offset: u64, data: &[u8]) -> Option<Stop> {
        let offset = u32::try_from(offset).ok()?;
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            self.space.write(usize::try_from(at).ok()?, data);
            self.wake();
            return None;
        }
        let value = u32::from_le_bytes(data.try_into().ok()?);
        match offset {
            VIRTIO_MMIO_STATUS => return self.set_status(value).err(),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            // Only where KVM does not ring by itself.
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                let bell = usize::try_from(value).ok().and_then(|queue| self.bells.get(queue));
                // A counter that is full has been rung often enough.
                bell.map(|bell| bell.write(1));
            }
            _ => self.registers().write(offset, value, self.max_sizes),
        }
        None
    }

    /// The status register (2.1, 3.1).
    fn set_status(&self, value: u32) -> Result<(), Stop> {
        if value == 0 {
            self.reset();
            return Ok(());
        }
        let mut registers = self.registers();
        let before = registers.status;
        let mut now = value & 0xff;
        if now & FEATURES_OK != 0 && before & FEATURES_OK == 0 {
            let agreed = registers.driver_features;
            // Reading it back tells the driver that it asked for too much (3.1.1).
            if agreed & !self.offered() != 0 || agreed & VERSION_1 == 0 {
                now &= !FEATURES_OK;
            }
        }
        let starts = now & DRIVER_OK != 0 && before & DRIVER_OK == 0;
        if starts && now & FEATURES_OK == 0 {
            now &= !DRIVER_OK;
        }
        registers.status = now;
        if now & DRIVER_OK != 0 && before & DRIVER_OK == 0 {
            let as_set_up = registers.clone();
            drop(registers);
            self.start(&as_set_up, &[]).map_err(|abuse| self.abused(&abuse))?;
            self.wake();
        }
        Ok(())
    }

    /// Takes the queues into use, from these positions on, or from the start.
    pub(super) fn start(&self, as_set_up: &Registers, at: &[Position]) -> Result<(), QueueAbuse> {
        let queues = self.rings(as_set_up, at)?;
        let mut worker = self.worker();
        worker.queues = queues;
        worker.features = as_set_up.driver_features;
        Ok(())
    }

    /// The queues as set up, checked.
    pub(super) fn rings(
        &self,
        as_set_up: &Registers,
        at: &[Position],
    ) -> Result<Vec<Rings>, QueueAbuse> {
        let features = as_set_up.driver_features;
        let mut queues = Vec::with_capacity(self.max_sizes.len());
        let set_up = self.max_sizes.iter().zip(&as_set_up.queues).enumerate();
        for (queue, (max, setup)) in set_up {
            let at = at.get(queue).copied().unwrap_or_default();
            let event_idx = features & EVENT_IDX != 0;
            let taken = rings(&self.memory, *max, *setup, at, event_idx);
            queues.push(taken.map_err(|abuse| QueueAbuse { queue, abuse })?);
        }
        Ok(queues)
    }

    /// Back to what it was at first; waits for what the device has begun.
    pub fn reset(&self) {
        let mut worker = self.worker();
        worker.queues.iter_mut().for_each(|queue| *queue = None);
        worker.features = 0;
        worker.device.reset();
        worker.restored = false;
        *self.registers() = Registers::of(self.max_sizes);
        self.interrupt.reset();
    }

    /// The end of a guest whose driver did that.
    #[must_use]
    pub(super) fn abused(&self, abuse: &QueueAbuse) -> Stop {
        let details = format!("{}, {abuse}", self.name());
        Stop { kind: StopKind::DeviceAbused, details }
    }
}
