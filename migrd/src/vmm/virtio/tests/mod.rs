//! Devices without KVM: a driver made of a few lines fills rings in memory.

mod abuse;
mod disk;
mod memory;
mod moves;
mod net;
mod registers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::{DRIVER_OK, Events, FEATURES_OK, VERSION_1};
use super::*;
use crate::sys::memfd;
use crate::sys::vm::Memory;
use crate::vmm::lifecycle::{Lifecycle, Phase, Stop, StopKind};
use crate::vmm::memory as guest_memory;

/// Long enough for a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY_BYTES: u64 = 4 << 20;
/// Where the driver puts the rings of queue `i`: from `RINGS + i * 0x1_0000` on.
const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;
/// Free for data.
const DATA: u64 = 0x10_0000;
/// Entries of every queue.
const SIZE: u16 = 8;

/// Flags of descriptors (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A device with its driver.
struct Rig {
    memory: Arc<Memory>,
    device: Arc<Transport>,
    gate: Arc<Gate>,
    lifecycle: Arc<Lifecycle>,
    /// Entries made available in each queue.
    made: Vec<u16>,
    next_descriptor: u16,
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn new_memory() -> Arc<Memory> {
    let file = memfd::create(c"test", MEMORY_BYTES).unwrap();
    Arc::new(guest_memory::map(file, MEMORY_BYTES).unwrap())
}

impl Rig {
    /// Nothing works yet.
    fn new(device: Box<dyn Device>, memory: Arc<Memory>) -> Self {
        let gate = Arc::new(Gate::new(1));
        let bells = device.queue_sizes().iter().map(|_| event()).collect();
        let made = vec![0; device.queue_sizes().len()];
        let events = Events { line: event(), bells, wake: event() };
        let device = Transport::new(0, device, Arc::clone(&memory), Arc::clone(&gate), events);
        let lifecycle = Arc::new(Lifecycle::new(event()));
        lifecycle.loaded();
        lifecycle.run();
        Self { memory, device: Arc::new(device), gate, lifecycle, made, next_descriptor: 0 }
    }

    /// With its thread, a driver that agreed to `features`, and the gate open.
    fn working(device: Box<dyn Device>, features: u64) -> Self {
        let rig = Self::new(device, new_memory());
        rig.live();
        assert_eq!(rig.set_up(features), None);
        rig.gate.open();
        rig
    }

    /// Starts its thread, which ends with the process.
    fn live(&self) {
        let (device, lifecycle) = (Arc::clone(&self.device), Arc::clone(&self.lifecycle));
        std::thread::spawn(move || thread::live(&device, &lifecycle));
    }

    fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.device.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, offset: u64, value: u32) -> Option<Stop> {
        self.device.write(offset, &value.to_le_bytes())
    }

    /// Registers by the offsets of virtio 1.2, 4.2.2.
    fn agree(&self, features: u64) -> u32 {
        self.write(0x70, 1 | 2);
        for (half, value) in [(0, features), (1, features >> 32)] {
            self.write(0x24, half);
            self.write(0x20, u32::try_from(value & 0xffff_ffff).unwrap());
        }
        self.write(0x70, 1 | 2 | FEATURES_OK);
        self.read(0x70)
    }

    fn rings(queue: usize) -> u64 {
        RINGS + u64::try_from(queue).unwrap() * 0x1_0000
    }

    fn place_queue(&self, queue: usize, at: [u64; 3]) {
        self.write(0x30, queue.try_into().unwrap());
        self.write(0x38, SIZE.into());
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(at) {
            self.write(register, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write(register + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write(0x44, 1);
    }

    /// What a driver does at its start.
    fn set_up(&self, features: u64) -> Option<Stop> {
        assert_eq!(self.agree(features | VERSION_1), 1 | 2 | FEATURES_OK);
        for queue in 0..self.made.len() {
            let at = Self::rings(queue);
            self.place_queue(queue, [at, at + AVAILABLE, at + USED]);
        }
        self.write(0x70, 1 | 2 | FEATURES_OK | DRIVER_OK)
    }

    fn descriptor(&self, table: u64, index: u16, (address, length): (u64, u32), flags: u16) {
        let at = GuestAddress(table + u64::from(index) * 16);
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(length, GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj((index + 1) % SIZE, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a request of these buffers, each with whether the device writes
    /// it, and rings.
    fn ask(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (i, (address, length, write)) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = if *write { WRITE } else { 0 } | more;
            self.descriptor(Self::rings(queue), self.next_descriptor, (*address, *length), flags);
            self.next_descriptor = (self.next_descriptor + 1) % SIZE;
        }
        self.make_available(queue, head);
        head
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let ring = Self::rings(queue) + AVAILABLE;
        let entry = ring + 4 + u64::from(self.made[queue] % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.made[queue] = self.made[queue].wrapping_add(1);
        self.memory.write_obj(self.made[queue], GuestAddress(ring + 2)).unwrap();
        self.write(0x50, queue.try_into().unwrap());
    }

    fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(Self::rings(queue) + USED + 2)).unwrap()
    }

    /// Head and length of an entry of the used ring.
    fn used_entry(&self, queue: usize, index: u16) -> (u32, u32) {
        let at = Self::rings(queue) + USED + 4 + u64::from(index % SIZE) * 8;
        let part = |at| self.memory.read_obj(GuestAddress(at)).unwrap();
        (part(at), part(at + 4))
    }

    /// Waits until everything asked for was answered, and gives the last answer.
    fn answered(&self, queue: usize) -> (u32, u32) {
        wait(|| self.used(queue) == self.made[queue]);
        self.used_entry(queue, self.made[queue].wrapping_sub(1))
    }

    /// Waits for the end of the guest.
    fn ended(&self) -> Stop {
        wait(|| matches!(self.lifecycle.phase(), Phase::Stopped(_)));
        match self.lifecycle.phase() {
            Phase::Stopped(stop) => stop,
            other => panic!("{other:?}"),
        }
    }

    /// Has the device stand.
    fn drain(&self) {
        self.gate.close();
        self.device.wake();
        self.gate.wait_all(PATIENCE).unwrap();
    }
}

fn wait(until: impl Fn() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < PATIENCE, "nothing happened for {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
