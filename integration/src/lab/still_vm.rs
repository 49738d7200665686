//! A virtual machine that never runs, kept for ever by each host's agent.
//!
//! KVM patches instructions of the host's kernel ("jump labels") when the first
//! VM of a host appears and when the last one goes, and when the last vCPU with
//! its local APIC off switches it on. QEMU 7.2's emulation may go on with the
//! breakpoints that stand there for a moment while it patches, and the host then
//! dies of an unexpected `int3`. With each move the first VM appears and the
//! last one goes somewhere. While this VM is there it is never the first nor the
//! last, and its vCPU's APIC stays off.

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// The VM. It goes when this is dropped.
#[derive(Debug)]
pub struct StillVm {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

impl StillVm {
    /// Makes it.
    ///
    /// # Errors
    /// When there is no KVM here.
    pub fn new() -> Result<Self> {
        let kvm = Kvm::new().context("open /dev/kvm")?;
        let vm = kvm.create_vm().context("create the VM that never runs")?;
        vm.create_irq_chip().context("its interrupt controllers")?;
        let vcpu = vm.create_vcpu(0).context("its vCPU")?;
        Ok(Self { _vcpu: vcpu, _vm: vm })
    }
}
