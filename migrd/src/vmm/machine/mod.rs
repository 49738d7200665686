//! One virtual machine: its parts put together, and what is done to all of them.

mod error;
mod parts;
mod power;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use migr_proto::v1 as proto;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use error::MachineError;
use error::system;

use super::bus::Bus;
use super::devices::serial::{IrqLine, SerialPort};
use super::dirty::DirtyLog;
use super::lifecycle::{Lifecycle, Phase};
use super::power_on::PowerOn;
use super::vcpu::Vcpu;
use super::virtio::Slots;
use super::{boot, cpu, memory, snapshot, state};
use crate::child::console::{Console, Log};
use crate::pages::PageSet;
use crate::sys::mapping::populate_region;
use crate::sys::vm::{self, Vm};
use crate::workload::StreamKey;

/// COM1's interrupt.
const COM1_IRQ: u32 = 4;
/// How long devices may take to finish what they have begun when the guest is
/// paused without having been drained.
const STAND_LIMIT: Duration = Duration::from_secs(10);

/// One virtual machine.
#[derive(Debug)]
pub struct Machine {
    config: proto::VmConfig,
    cpu: snapshot::Cpu,
    snapshots: snapshot::Host,
    vm: Arc<Vm>,
    vcpus: Vec<Arc<Vcpu>>,
    bus: Arc<Bus>,
    virtio: Arc<Slots>,
    console: Console,
    lifecycle: Arc<Lifecycle>,
    dirty: DirtyLog,
    /// What a reset brings back.
    power_on: PowerOn,
}

impl Machine {
    /// Makes the machine and its threads, each confined before it does
    /// anything. Nothing of the guest's has been looked at yet.
    ///
    /// # Errors
    /// When the host cannot have this machine.
    pub fn new(
        config: proto::VmConfig,
        kvm: OwnedFd,
        memory: File,
        log: impl Log,
        ended: EventFd,
    ) -> Result<Self, MachineError> {
        let kvm = vm::from_fd(kvm);
        parts::check_host(&kvm, config.cpus)?;
        let cpu = snapshot::Cpu {
            host: cpu::HostCpu::of(&kvm)?,
            model: config.cpu.as_ref().map(cpu::Model::from_wire).transpose()?,
        };
        let memory = Arc::new(memory::map(memory, config.memory_bytes)?);
        let fd = parts::create_vm(&kvm)?;
        let snapshots = snapshot::Host::probe(&kvm, &fd).map_err(|e| MachineError::State {
            what: "ask KVM what state it has",
            source: Box::new(e),
        })?;
        let irq = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
        fd.register_irqfd(&irq, COM1_IRQ).map_err(system("connect COM1's interrupt"))?;
        let vm = Arc::new(Vm::new(fd, memory).map_err(system("give the VM its memory"))?);
        let console = Console::default();
        let virtio = Arc::new(Slots::new(&config, vm.memory())?);
        parts::connect(vm.fd(), &virtio)?;
        let serial = SerialPort::new(IrqLine(Arc::new(irq)), console.sink());
        let platform = (config.version > 1).then(|| parts::create_platform(vm.fd())).transpose()?;
        let bus = Arc::new(Bus::new(serial, platform, Arc::clone(&virtio)));
        let mut vcpus = Vec::new();
        for index in 0..config.cpus {
            vcpus.push(Arc::new(parts::create_vcpu(&vm, &cpu, index, config.cpus)?));
        }
        let lifecycle = Arc::new(Lifecycle::new(ended));
        parts::start_threads(&vcpus, &bus, &virtio, &lifecycle, &console, log)?;
        let power_on = PowerOn::save(&vm, &vcpus, &snapshots)?;
        let dirty = DirtyLog::new(Arc::clone(&vm), virtio.logs().to_vec());
        Ok(Self {
            config,
            cpu,
            snapshots,
            vm,
            vcpus,
            bus,
            virtio,
            console,
            lifecycle,
            dirty,
            power_on,
        })
    }

    /// What it was made of.
    #[must_use]
    pub fn config(&self) -> &proto::VmConfig {
        &self.config
    }

    /// Where the guest stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.lifecycle.phase()
    }

    /// Its dirty log.
    pub fn dirty(&mut self) -> &mut DirtyLog {
        &mut self.dirty
    }

    /// Maps pages that hold memory, so that the guest's first touch of each
    /// costs one fault less.
    pub fn populate(&self, pages: &PageSet) {
        for (number, region) in (0u32..).zip(self.vm.memory().iter()) {
            if let Some(pages) = pages.get(StreamKey(number)) {
                pages.runs().for_each(|run| populate_region(region, run));
            }
        }
    }

    /// Something was loaded.
    pub(super) fn loaded(&self) {
        self.lifecycle.loaded();
    }

    /// The VM in KVM.
    pub(super) fn vm_fd(&self) -> &VmFd {
        self.vm.fd()
    }

    /// Its vCPUs, by index.
    pub(super) fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// Its devices.
    pub(super) fn bus(&self) -> &Bus {
        &self.bus
    }

    /// What its vCPUs may be, and what this host's are.
    pub(super) fn cpu(&self) -> &snapshot::Cpu {
        &self.cpu
    }

    /// What this host can save and restore.
    pub(super) fn snapshots(&self) -> &snapshot::Host {
        &self.snapshots
    }

    /// Its virtio devices.
    pub(super) fn virtio(&self) -> &Slots {
        &self.virtio
    }

    /// Of a guest that does not run: returns when its last exit is done with,
    /// and every device stands.
    pub(super) fn wait_until_still(&self) -> Result<(), MachineError> {
        self.virtio.drain(STAND_LIMIT)?;
        self.lifecycle.pause();
        Ok(())
    }

    pub(super) fn expect_still(&self, what: &'static str) -> Result<(), MachineError> {
        match self.phase() {
            Phase::Running => Err(MachineError::Phase { what, phase: Phase::Running }),
            Phase::Ready | Phase::Paused | Phase::Stopped(_) => self.wait_until_still(),
        }
    }

    pub(super) fn expect_ready(&self, what: &'static str) -> Result<(), MachineError> {
        match self.phase() {
            Phase::Ready => Ok(()),
            phase => Err(MachineError::Phase { what, phase }),
        }
    }

    /// Loads a kernel. The guest does not run yet.
    ///
    /// # Errors
    /// When something is loaded already, or the kernel is not one.
    pub fn boot(
        &mut self,
        kernel: &mut File,
        initrd: Option<&mut File>,
    ) -> Result<(), MachineError> {
        self.expect_ready("boot")?;
        self.load_kernel(kernel, initrd)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When nothing is loaded, a device lacks what is behind it, or the guest
    /// has ended.
    pub fn run(&self) -> Result<(), MachineError> {
        if self.phase() == Phase::Paused {
            self.virtio.expect_attached()?;
            for vcpu in &self.vcpus {
                state::note_pause(&vcpu.fd())?;
            }
        }
        match self.lifecycle.run() {
            Phase::Running => {
                self.virtio.run();
                Ok(())
            }
            phase => Err(MachineError::Phase { what: "run", phase }),
        }
    }

    /// Puts a file behind each of `backings`, of a guest that does not run.
    ///
    /// # Errors
    /// Names the device that does not take its file.
    pub fn attach(
        &self,
        backings: &[proto::ChildBacking],
        files: Vec<File>,
    ) -> Result<(), MachineError> {
        self.expect_still("attach")?;
        Ok(self.virtio.attach(backings, files)?)
    }

    /// The devices that have a file behind them.
    #[must_use]
    pub fn attached(&self) -> Vec<proto::ChildBacking> {
        self.virtio.backed()
    }

    /// Closes what is behind the disks, of a guest that does not run.
    ///
    /// # Errors
    /// Names a disk that did not take everything, which stays open.
    pub fn detach(&self) -> Result<(), MachineError> {
        self.expect_still("detach")?;
        Ok(self.virtio.detach()?)
    }

    /// Has the devices finish what they have begun and take nothing new; the
    /// vCPUs go on.
    ///
    /// # Errors
    /// Names a device that does not finish within `limit`; all go on then.
    pub fn drain(&self, limit: Duration) -> Result<(), MachineError> {
        Ok(self.virtio.drain(limit)?)
    }

    /// Ends what [`Self::drain`] began.
    pub fn undrain(&self) {
        if self.phase() == Phase::Running {
            self.virtio.run();
        }
    }

    /// The guest has ended by itself: devices need not go on. It may have been
    /// rebooted since.
    pub fn rest(&self) {
        if matches!(self.phase(), Phase::Stopped(_)) {
            self.virtio.stop();
        }
    }

    /// Returns when every device and every vCPU stands still, these between two
    /// instructions, and all serial output is written.
    ///
    /// # Errors
    /// When a device does not finish, and all go on then; when nothing is loaded
    /// or the guest has ended.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.virtio.drain(STAND_LIMIT)?;
        let phase = self.lifecycle.pause();
        self.console.flush();
        match phase {
            Phase::Paused => Ok(()),
            phase => Err(MachineError::Phase { what: "pause", phase }),
        }
    }

    /// Writes down what the guest has printed so far.
    pub fn flush_console(&self) {
        self.console.flush();
    }

    /// Console input.
    ///
    /// # Errors
    /// When the guest has not read what came before.
    pub fn input(&self, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.bus.serial().input(bytes)?)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> proto::ChildStatsReply {
        proto::ChildStatsReply {
            exits: self.vcpus.iter().map(|v| v.exits()).sum(),
            console_dropped: self.console.dropped(),
            console_queued: self.bus.serial().queued() as u64,
        }
    }
}
