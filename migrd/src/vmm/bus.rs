//! Which device answers at which port or address.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::boot::acpi::{SLEEP_CONTROL_PORT, SLEEP_CONTROL_POWER_OFF, SLEEP_STATUS_PORT};
use super::devices::i8042;
use super::devices::serial::SerialPort;
use super::lifecycle::{Stop, StopKind};
use super::virtio::Slots;

/// COM1, where every PC has it.
const COM1: u16 = 0x3f8;
const COM1_LAST: u16 = COM1 + 7;

/// The devices of one guest, and their places. What nobody answers reads as
/// all ones.
#[derive(Debug)]
pub struct Bus {
    serial: Mutex<SerialPort>,
    virtio: Arc<Slots>,
}

impl Bus {
    /// With COM1 and the virtio devices.
    #[must_use]
    pub fn new(serial: SerialPort, virtio: Arc<Slots>) -> Self {
        Self { serial: Mutex::new(serial), virtio }
    }

    /// COM1.
    pub fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write by the guest; says so if that ends it. A string instruction
    /// brings several bytes for the same port.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Option<StopKind> {
        match port {
            COM1..=COM1_LAST => {
                let mut serial = self.serial();
                data.iter().for_each(|byte| serial.write(port - COM1, *byte));
                None
            }
            i8042::COMMAND if data.contains(&i8042::RESET) => Some(StopKind::Reset),
            SLEEP_CONTROL_PORT if data.contains(&SLEEP_CONTROL_POWER_OFF) => {
                Some(StopKind::Shutdown)
            }
            _ => None,
        }
    }

    /// A read by the guest.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            COM1..=COM1_LAST => {
                let mut serial = self.serial();
                data.iter_mut().for_each(|byte| *byte = serial.read(port - COM1));
            }
            i8042::DATA | i8042::COMMAND => data.fill(i8042::IDLE),
            // Both registers keep nothing: a guest that sleeps is stopped.
            SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A write by the guest outside its memory; says so if that ends it.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> Option<Stop> {
        self.virtio.write(address, data)
    }

    /// A read by the guest outside its memory.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if !self.virtio.read(address, data) {
            data.fill(0xff);
        }
    }
}
