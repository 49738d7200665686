//! What KVM holds of a machine that has just been made, to go back to when its
//! guest resets it.

use std::sync::Arc;

use migr_proto::v1 as proto;

use super::machine::MachineError;
use super::snapshot::{self, SnapshotError, VmClock};
use super::vcpu::Vcpu;
use crate::sys::vm::Vm;

/// vCPUs and chips as after power-on.
#[derive(Debug)]
pub struct PowerOn {
    devices: proto::VmDevices,
    vcpus: Vec<proto::VcpuState>,
}

fn failed(what: &'static str) -> impl Fn(SnapshotError) -> MachineError {
    move |source| MachineError::State { what, source: Box::new(source) }
}

impl PowerOn {
    /// Of a machine in which nothing was loaded yet.
    ///
    /// # Errors
    /// When KVM does not tell something.
    pub fn save(vm: &Vm, vcpus: &[Arc<Vcpu>], host: &snapshot::Host) -> Result<Self, MachineError> {
        let save = failed("save what the machine is at power-on");
        let clock = VmClock::read(vm.fd()).map_err(&save)?;
        let devices = snapshot::save_vm(vm.fd(), clock).map_err(&save)?;
        let saved = (0..).zip(vcpus).map(|(index, vcpu)| {
            snapshot::save_vcpu(&vcpu.fd(), index, host, clock).map_err(&save)
        });
        let vcpus = saved.collect::<Result<_, _>>()?;
        Ok(Self { devices, vcpus })
    }

    /// Brings it back in the same machine, whose vCPUs stand still.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(
        &self,
        vm: &Vm,
        vcpus: &[Arc<Vcpu>],
        host: &snapshot::Host,
    ) -> Result<(), MachineError> {
        let restore = failed("reset the machine");
        let clock = snapshot::restore_clock(vm.fd(), &self.devices).map_err(&restore)?;
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            let reset = snapshot::reset_vcpu(&vcpu.fd(), state, host, clock);
            reset.map_err(&restore)?;
        }
        snapshot::restore_vm(vm.fd(), &self.devices).map_err(&restore)
    }
}
