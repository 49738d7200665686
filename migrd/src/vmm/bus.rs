//! Which device answers at which port or address.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::boot::acpi::{SLEEP_CONTROL_PORT, SLEEP_CONTROL_POWER_OFF, SLEEP_STATUS_PORT};
use super::devices::clock_chip::{self, ClockChip, Now};
use super::devices::i8042;
use super::devices::power_button::{self, PowerButton};
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
    platform: Option<Platform>,
    virtio: Arc<Slots>,
}

/// What VMs have since version 2 of their configuration.
#[derive(Debug)]
pub struct Platform {
    clock: Mutex<ClockChip>,
    button: PowerButton,
}

impl Platform {
    /// As after power-on.
    #[must_use]
    pub fn new(button: PowerButton) -> Self {
        Self { clock: Mutex::default(), button }
    }

    /// The clock chip.
    pub fn clock(&self) -> MutexGuard<'_, ClockChip> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The power button.
    #[must_use]
    pub fn button(&self) -> &PowerButton {
        &self.button
    }
}

impl Bus {
    /// With COM1, the virtio devices, and the platform's if the VM has them.
    #[must_use]
    pub fn new(serial: SerialPort, platform: Option<Platform>, virtio: Arc<Slots>) -> Self {
        Self { serial: Mutex::new(serial), platform, virtio }
    }

    /// Clock chip and power button.
    #[must_use]
    pub fn platform(&self) -> Option<&Platform> {
        self.platform.as_ref()
    }

    /// COM1.
    pub fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine's reset line.
    pub fn reset(&self) {
        self.serial().reset();
        if let Some(platform) = &self.platform {
            platform.clock().reset();
            platform.button.reset();
        }
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
            clock_chip::INDEX | clock_chip::DATA => {
                let mut clock = self.platform.as_ref()?.clock();
                data.iter().for_each(|byte| clock.write(port, *byte, Now::read()));
                None
            }
            _ => None,
        }
    }

    /// A read by the guest.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match (port, &self.platform) {
            (clock_chip::INDEX | clock_chip::DATA, Some(platform)) => {
                let clock = platform.clock();
                data.iter_mut().for_each(|byte| *byte = clock.read(port, Now::read()));
            }
            (power_button::EVENTS, Some(platform)) => {
                data.iter_mut().for_each(|byte| *byte = platform.button.take_events());
            }
            _ => self.read_older_port(port, data),
        }
    }

    fn read_older_port(&self, port: u16, data: &mut [u8]) {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::child::console::Console;
    use crate::vmm::devices::serial::IrqLine;

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    fn bus(platform: bool) -> Bus {
        let serial = SerialPort::new(IrqLine(Arc::new(event())), Console::default().sink());
        let memory =
            Arc::new(crate::vmm::memory::map(tempfile::tempfile().unwrap(), 1 << 20).unwrap());
        let config = migr_proto::v1::VmConfig { version: 1, ..Default::default() };
        let virtio = Arc::new(Slots::new(&config, &memory).unwrap());
        Bus::new(serial, platform.then(|| Platform::new(PowerButton::new(event()))), virtio)
    }

    fn read(bus: &Bus, port: u16) -> u8 {
        let mut byte = [0];
        bus.read_port(port, &mut byte);
        byte[0]
    }

    #[test]
    fn the_clock_and_the_button_answer_at_their_ports() {
        let bus = bus(true);
        bus.write_port(clock_chip::INDEX, &[0x0d]);
        assert_eq!(read(&bus, clock_chip::DATA), 0x80);
        bus.platform().unwrap().button().press().unwrap();
        assert_eq!(read(&bus, power_button::EVENTS), 1);
        assert_eq!(read(&bus, power_button::EVENTS), 0);
    }

    #[test]
    fn an_older_vm_has_nothing_at_those_ports() {
        let bus = bus(false);
        bus.write_port(clock_chip::INDEX, &[0x0d]);
        assert_eq!(read(&bus, clock_chip::DATA), 0xff);
        assert_eq!(read(&bus, power_button::EVENTS), 0xff);
    }
}
