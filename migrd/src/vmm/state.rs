//! The state of a whole machine beside its memory: put together from its
//! parts, and taken apart again.

use bytes::Bytes;
use kvm_ioctls::VcpuFd;
use migr_proto::v1 as proto;
use prost::Message;
use vm_superio::serial::SerialState;

use super::bus::Platform;
use super::devices::clock_chip::ClockChip;
use super::devices::power_button::PowerButton;
use super::lifecycle::Phase;
use super::machine::{Machine, MachineError};
use super::snapshot::{self, SnapshotError, VmClock, state};

fn failed(what: &'static str) -> impl Fn(SnapshotError) -> MachineError {
    move |source| MachineError::State { what, source: Box::new(source) }
}

impl Machine {
    /// Everything but memory, of a guest that stands still.
    ///
    /// # Errors
    /// When it runs, nothing is loaded, or KVM does not tell something.
    pub fn save(&self) -> Result<Bytes, MachineError> {
        match self.phase() {
            Phase::Paused | Phase::Stopped(_) => {}
            phase => return Err(MachineError::Phase { what: "save", phase }),
        }
        self.wait_until_still()?;
        let save = failed("save the VM");
        let clock = VmClock::read(self.vm_fd()).map_err(&save)?;
        let devices = snapshot::save_vm(self.vm_fd(), clock).map_err(&save)?;
        let mut vcpus = Vec::new();
        for (index, vcpu) in (0..).zip(self.vcpus()) {
            let saved = snapshot::save_vcpu(&vcpu.fd(), index, self.snapshots(), clock);
            vcpus.push(saved.map_err(&save)?);
        }
        let (serial, pending) = self.bus().serial().state();
        let state = proto::VmState {
            version: self.config().version,
            config: Some(self.config().clone()),
            devices: Some(devices),
            vcpus,
            serial: Some(serial_to_wire(serial)),
            i8042: Some(proto::I8042State {}),
            pending_serial_input: pending.into(),
            // Whether its user paused it is known to the daemon, not here.
            paused: false,
            virtio: self.virtio().save(),
            clock_chip: self.bus().platform().map(|p| p.clock().state()),
            power: self.bus().platform().map(|p| power_to_wire(p.button())),
        };
        Ok(state.encode_to_vec().into())
    }

    /// Becomes what [`Self::save`] gave; the guest does not run yet.
    ///
    /// # Errors
    /// When something is loaded already, or the state is no good or of another
    /// VM. A machine whose restore failed is of no use any more.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), MachineError> {
        self.expect_ready("restore")?;
        let restore = failed("restore the VM");
        let decoded = state::decode(bytes);
        let decoded = decoded.map_err(|e| MachineError::State {
            what: "read the VM's state",
            source: Box::new(e),
        })?;
        let proto::VmState {
            version: _,
            config,
            devices,
            vcpus,
            serial,
            i8042,
            pending_serial_input,
            paused: _,
            virtio,
            clock_chip,
            power,
        } = decoded;
        let proto::I8042State {} = i8042.unwrap_or_default();
        self.expect_same(&config.unwrap_or_default(), vcpus.len())?;
        let virtio = self.virtio().check(&virtio)?;
        for vcpu in &vcpus {
            self.cpu().check(vcpu).map_err(&restore)?;
        }
        let devices = devices.unwrap_or_default();
        let clock = snapshot::restore_clock(self.vm_fd(), &devices).map_err(&restore)?;
        for (vcpu, state) in self.vcpus().iter().zip(&vcpus) {
            snapshot::restore_vcpu(&vcpu.fd(), state, self.snapshots(), clock).map_err(&restore)?;
        }
        snapshot::restore_vm(self.vm_fd(), &devices).map_err(&restore)?;
        // After the chips: it raises its interrupt again if one is pending.
        let serial = serial_from_wire(serial.unwrap_or_default())?;
        self.bus().serial().restore(&serial, pending_serial_input.into())?;
        if let Some(platform) = self.bus().platform() {
            restore_platform(platform, &clock_chip.unwrap_or_default(), power.unwrap_or_default())?;
        }
        self.virtio().restore(virtio)?;
        self.loaded();
        Ok(())
    }

    fn expect_same(&self, of: &proto::VmConfig, vcpus: usize) -> Result<(), MachineError> {
        let own = self.config();
        if of.version != own.version {
            return Err(MachineError::OtherVersion { version: of.version, own: own.version });
        }
        let same = of.memory_bytes == own.memory_bytes && of.cpus == own.cpus;
        if same && vcpus == self.vcpus().len() {
            return Ok(());
        }
        Err(MachineError::OtherVm {
            memory_bytes: of.memory_bytes,
            cpus: of.cpus,
            own_memory_bytes: own.memory_bytes,
            own_cpus: own.cpus,
        })
    }
}

fn power_to_wire(button: &PowerButton) -> proto::PowerState {
    proto::PowerState { button_pending: button.is_pressed() }
}

/// After the chips: a press that the guest has not seen raises its interrupt
/// again, because the first may have been on its way at the save.
fn restore_platform(
    platform: &Platform,
    clock: &proto::ClockChipState,
    power: proto::PowerState,
) -> Result<(), MachineError> {
    let proto::PowerState { button_pending } = power;
    *platform.clock() = ClockChip::restored(clock)?;
    if button_pending {
        let what = "raise the power button's interrupt";
        platform.button().press().map_err(|source| MachineError::System { what, source })?;
    }
    Ok(())
}

/// Tells the guest that it stood still, if it has kvmclock.
pub(super) fn note_pause(vcpu: &VcpuFd) -> Result<(), MachineError> {
    snapshot::was_paused(vcpu).map_err(failed("tell the guest of the pause"))
}

fn serial_to_wire(state: SerialState) -> proto::SerialState {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    } = state;
    proto::SerialState {
        baud_divisor_low: baud_divisor_low.into(),
        baud_divisor_high: baud_divisor_high.into(),
        interrupt_enable: interrupt_enable.into(),
        interrupt_identification: interrupt_identification.into(),
        line_control: line_control.into(),
        line_status: line_status.into(),
        modem_control: modem_control.into(),
        modem_status: modem_status.into(),
        scratch: scratch.into(),
        in_buffer: in_buffer.into(),
    }
}

fn serial_from_wire(state: proto::SerialState) -> Result<SerialState, MachineError> {
    let proto::SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    } = state;
    let byte = |register: u32| u8::try_from(register).map_err(|_| MachineError::Register(register));
    Ok(SerialState {
        baud_divisor_low: byte(baud_divisor_low)?,
        baud_divisor_high: byte(baud_divisor_high)?,
        interrupt_enable: byte(interrupt_enable)?,
        interrupt_identification: byte(interrupt_identification)?,
        line_control: byte(line_control)?,
        line_status: byte(line_status)?,
        modem_control: byte(modem_control)?,
        modem_status: byte(modem_status)?,
        scratch: byte(scratch)?,
        in_buffer: in_buffer.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::child::console::Console;
    use crate::vmm::devices::serial::{IrqLine, SerialPort};

    /// Offset of the scratch register.
    const SCRATCH: u16 = 7;

    fn port() -> SerialPort {
        let irq = IrqLine(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        SerialPort::new(irq, Console::default().sink())
    }

    /// Every register with a value of its own.
    fn odd() -> SerialState {
        SerialState {
            baud_divisor_low: 1,
            baud_divisor_high: 2,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 255,
            in_buffer: vec![9, 0, 255],
        }
    }

    #[test]
    fn every_register_of_the_serial_port_survives_the_wire() {
        assert_eq!(serial_from_wire(serial_to_wire(odd())).unwrap(), odd());
    }

    #[test]
    fn a_register_wider_than_a_byte_is_refused() {
        let wire = proto::SerialState { scratch: 256, ..serial_to_wire(odd()) };
        assert!(matches!(serial_from_wire(wire), Err(MachineError::Register(256))));
    }

    #[test]
    fn a_restored_serial_port_gives_the_guest_the_input_it_had_not_read() {
        let mut before = port();
        let typed: Vec<u8> = (0..200).collect();
        before.input(&typed).unwrap();
        before.write(SCRATCH, 0x5a);
        assert_eq!(before.read(0), 0);
        let (state, queue) = before.state();
        assert!(!queue.is_empty(), "more was typed than the UART holds");
        let mut after = port();
        after.restore(&serial_from_wire(serial_to_wire(state)).unwrap(), queue).unwrap();
        assert_eq!(after.read(SCRATCH), 0x5a);
        let rest: Vec<u8> = (1..200).map(|_| after.read(0)).collect();
        assert_eq!(rest, typed[1..]);
        assert_eq!(after.queued(), 0);
    }
}
