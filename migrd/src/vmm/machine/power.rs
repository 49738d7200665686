//! The power button, and what a reset does to the whole machine.

use std::fs::File;

use vm_memory::GuestMemoryBackend;

use super::error::{MachineError, system};
use super::{Machine, boot};
use crate::sys::mapping::clear_region;
use crate::vmm::boot::BootSpec;
use crate::vmm::devices::power_button;
use crate::vmm::lifecycle::{Phase, StopKind};
use crate::vmm::snapshot;

impl Machine {
    /// Presses the power button. What the guest does about it is its own thing.
    ///
    /// # Errors
    /// When there is none, or the guest has its interrupt masked.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        let platform = self.bus.platform().ok_or(MachineError::NoButton)?;
        match self.phase() {
            Phase::Running | Phase::Paused => {}
            phase => return Err(MachineError::Phase { what: "press the power button", phase }),
        }
        let masked = snapshot::is_masked(self.vm.fd(), power_button::GSI);
        let failed = |e| MachineError::State { what: "see who listens", source: Box::new(e) };
        if masked.map_err(failed)? {
            return Err(MachineError::DeafToButton);
        }
        platform.button().press().map_err(system("raise the power button's interrupt"))
    }

    /// Of a guest that has stopped with a reset: back to what it was at
    /// power-on, with a kernel loaded. It does not run yet.
    ///
    /// # Errors
    /// When it has not stopped so, or the kernel is not one. A machine that
    /// could not be brought back is of no use any more.
    pub fn reboot(
        &mut self,
        kernel: &mut File,
        initrd: Option<&mut File>,
    ) -> Result<(), MachineError> {
        match self.phase() {
            Phase::Stopped(stop) if stop.kind == StopKind::Reset => {}
            phase => return Err(MachineError::Phase { what: "reboot", phase }),
        }
        self.wait_until_still()?;
        self.bus.reset();
        self.virtio.reset();
        for region in self.vm.memory().iter() {
            clear_region(region).map_err(system("clear the guest's memory"))?;
        }
        self.power_on.restore(&self.vm, &self.vcpus, &self.snapshots)?;
        self.load_kernel(kernel, initrd)
    }

    /// Loads a kernel into fresh memory.
    pub(super) fn load_kernel(
        &mut self,
        kernel: &mut File,
        initrd: Option<&mut File>,
    ) -> Result<(), MachineError> {
        let (cpus, memory_bytes) = (self.config.cpus, self.config.memory_bytes);
        let devices: Vec<_> = self.virtio.placed().map(|(_, place)| place).collect();
        let (cmdline, devices) = (self.config.cmdline.as_str(), devices.as_slice());
        let platform = self.bus.platform().is_some();
        let spec = BootSpec { kernel, initrd, cmdline, cpus, devices, memory_bytes, platform };
        let entry = boot::load(self.vm.memory().as_ref(), spec)?;
        if let Some(first) = self.vcpus.first() {
            boot::configure_vcpu(&first.fd(), &entry)?;
        }
        self.loaded();
        Ok(())
    }
}
