//! The parts of a machine: what KVM is asked for, and every thread.

use std::sync::{Arc, mpsc};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::error::{MachineError, system};
use crate::child::console::{Console, Log};
use crate::sys::vm::Vm;
use crate::vmm::bus::{Bus, Platform};
use crate::vmm::devices::power_button::{self, PowerButton};
use crate::vmm::lifecycle::Lifecycle;
use crate::vmm::vcpu::Vcpu;
use crate::vmm::virtio::Slots;
use crate::vmm::{cpu, sandbox, snapshot};

/// Three pages that KVM wants for itself on some processors, below the
/// firmware's place and above all memory (KVM API, 4.35).
const TSS_ADDRESS: usize = 0xfeff_d000;
/// One more (KVM API, 4.75).
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;
/// The console thread only writes.
const STACK_BYTES: usize = 128 * 1024;

pub(super) fn check_host(kvm: &Kvm, cpus: u32) -> Result<(), MachineError> {
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(MachineError::Version(version));
    }
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Pit2, "an in-kernel timer"),
        (Cap::Irqfd, "irqfd"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::UserMemory, "user memory regions"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(MachineError::Lacks(name));
        }
    }
    let most = kvm.get_max_vcpus();
    match usize::try_from(cpus) {
        Ok(n) if (1..=most).contains(&n) => Ok(()),
        _ => Err(MachineError::Cpus { asked: cpus, most }),
    }
}

pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    let vm = kvm.create_vm().map_err(system("create a VM"))?;
    let both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let mut manual =
        kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    manual.args[0] = u64::from(both);
    let offered = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    if u32::try_from(offered).unwrap_or(0) & both != both {
        return Err(MachineError::Lacks("manual dirty log protection (Linux 5.7)"));
    }
    vm.enable_cap(&manual).map_err(system("choose manual dirty log protection"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(system("place the identity map"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(system("place the task state segment"))?;
    vm.create_irq_chip().map_err(system("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(system("create the timer"))?;
    Ok(vm)
}

/// The clock chip, and the power button with its interrupt.
pub(super) fn create_platform(vm: &VmFd) -> Result<Platform, MachineError> {
    let line = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
    let connected = vm.register_irqfd(&line, power_button::GSI);
    connected.map_err(system("connect the power button's interrupt"))?;
    Ok(Platform::new(PowerButton::new(line)))
}

pub(super) fn create_vcpu(
    vm: &Vm,
    cpu: &snapshot::Cpu,
    index: u32,
    cpus: u32,
) -> Result<Vcpu, MachineError> {
    let fd = vm.fd().create_vcpu(index.into()).map_err(system("create a vCPU"))?;
    let cpuid = cpu::for_vcpu(&cpu.host, cpu.model.as_ref(), index, cpus)?;
    fd.set_cpuid2(&cpuid).map_err(system("give the guest its CPU features"))?;
    cpu.set_rate(&fd).map_err(|e| MachineError::State {
        what: "give the guest its TSC frequency",
        source: Box::new(e),
    })?;
    Vcpu::new(fd, Arc::clone(vm.memory())).map_err(system("map a vCPU's shared page"))
}

/// Connects the devices' interrupts, and the driver's bells, which then ring
/// without that a vCPU leaves the guest.
pub(super) fn connect(vm: &VmFd, virtio: &Slots) -> Result<(), MachineError> {
    for (device, place) in virtio.placed() {
        let irq = vm.register_irqfd(device.line(), place.gsi);
        irq.map_err(system("connect a device's interrupt"))?;
        let bell_at = IoEventAddress::Mmio(place.address + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        for (queue, bell) in (0_u32..).zip(device.bells()) {
            let bell = vm.register_ioevent(bell, &bell_at, queue);
            bell.map_err(system("connect the bell of a device's queue"))?;
        }
    }
    Ok(())
}

/// Starts every thread that the machine will ever have: afterwards the
/// process may not make any more.
pub(super) fn start_threads(
    vcpus: &[Arc<Vcpu>],
    bus: &Arc<Bus>,
    virtio: &Slots,
    lifecycle: &Arc<Lifecycle>,
    console: &Console,
    mut log: impl Log,
) -> Result<(), MachineError> {
    let (ready, confined) = mpsc::channel();
    let mut threads = Vec::new();
    for (index, vcpu) in vcpus.iter().enumerate() {
        let thread = vcpu.spawn(index, Arc::clone(bus), Arc::clone(lifecycle), ready.clone());
        threads.push((vcpu.leave(), thread.map_err(system("start a vCPU's thread"))?));
    }
    virtio.start(lifecycle, &ready).map_err(system("start a device's thread"))?;
    let console = console.clone();
    let thread = std::thread::Builder::new().name("console".into()).stack_size(STACK_BYTES);
    let spawned = thread.spawn(move || {
        let result = sandbox::confine_console();
        let failed = result.is_err();
        // The receiver gives up only together with the whole process.
        let _ = ready.send(result);
        drop(ready);
        if !failed {
            console.drain(&mut log);
        }
    });
    spawned.map_err(system("start the console's thread"))?;
    for result in confined {
        result?;
    }
    lifecycle.set_vcpus(threads);
    Ok(())
}
