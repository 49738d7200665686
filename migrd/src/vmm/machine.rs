//! One virtual machine: its parts put together, and what is done to all of them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use migr_proto::v1 as proto;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::boot::{self, BootSpec};
use super::bus::Bus;
use super::console::{Console, Log};
use super::devices::serial::{IrqLine, SerialError, SerialPort};
use super::dirty::{DirtyError, DirtyLog};
use super::lifecycle::{Lifecycle, Phase};
use super::memory::{self, MemoryError};
use super::sandbox::{self, SandboxError};
use super::vcpu::Vcpu;
use super::{cpuid, snapshot, state};
use crate::pages::PageSet;
use crate::sys::mapping::populate_region;
use crate::sys::vm::{self, Vm};
use crate::workload::StreamKey;

/// Three pages that KVM wants for itself on some processors, below the
/// firmware's place and above all memory (KVM API, 4.35).
const TSS_ADDRESS: usize = 0xfeff_d000;
/// One more (KVM API, 4.75).
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;
/// COM1's interrupt.
const COM1_IRQ: u32 = 4;
/// The console thread only writes.
const STACK_BYTES: usize = 128 * 1024;

/// Why there is no machine, or why it cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// `/dev/kvm` is not what it should be.
    #[error("/dev/kvm speaks version {0}, not 12: update the kernel")]
    Version(i32),
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}: update the kernel")]
    Lacks(&'static str),
    /// More vCPUs than KVM has, or none.
    #[error("{asked} vCPUs: use 1 to {most}")]
    Cpus {
        /// How many were asked for.
        asked: u32,
        /// How many there can be.
        most: usize,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The CPU's features.
    #[error("cannot give the guest its CPU features")]
    Cpuid(#[from] cpuid::CpuidError),
    /// The kernel to boot.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// Asked to boot without one.
    #[error("cannot boot: no kernel was given to this VMM, or it was used already")]
    NoKernel,
    /// Asked of devices that it has not.
    #[error("this VM has no such devices")]
    NoDevices,
    /// The dirty log.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// State that could not be saved or restored.
    #[error("cannot {what}")]
    State {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The state of a VM of another shape.
    #[error(
        "the state is of a VM with {memory_bytes} bytes and {cpus} vCPUs, and this one has \
         {own_memory_bytes} bytes and {own_cpus} vCPUs"
    )]
    OtherVm {
        /// Of the state.
        memory_bytes: u64,
        /// Of the state.
        cpus: u32,
        /// Of this VM.
        own_memory_bytes: u64,
        /// Of this VM.
        own_cpus: u32,
    },
    /// A saved register that is no byte.
    #[error("the saved serial port is not valid: register value {0}")]
    Register(u32),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// Asked at the wrong time.
    #[error("cannot {what}: the guest is {phase:?}")]
    Phase {
        /// What was asked.
        what: &'static str,
        /// Where the guest stands.
        phase: Phase,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> MachineError {
    move |e| MachineError::System { what, source: e.into() }
}

/// One virtual machine.
#[derive(Debug)]
pub struct Machine {
    config: proto::VmConfig,
    snapshots: snapshot::Host,
    vm: Arc<Vm>,
    vcpus: Vec<Arc<Vcpu>>,
    bus: Arc<Bus>,
    console: Console,
    lifecycle: Arc<Lifecycle>,
    dirty: DirtyLog,
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
        check_host(&kvm, config.cpus)?;
        let memory = Arc::new(memory::map(memory, config.memory_bytes)?);
        let fd = create_vm(&kvm)?;
        let snapshots = snapshot::Host::probe(&kvm, &fd).map_err(|e| MachineError::State {
            what: "ask KVM what state it has",
            source: Box::new(e),
        })?;
        let irq = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
        fd.register_irqfd(&irq, COM1_IRQ).map_err(system("connect COM1's interrupt"))?;
        let vm = Arc::new(Vm::new(fd, memory).map_err(system("give the VM its memory"))?);
        let console = Console::default();
        let bus = Arc::new(Bus::new(SerialPort::new(IrqLine(Arc::new(irq)), console.sink())));
        let mut vcpus = Vec::new();
        for index in 0..config.cpus {
            vcpus.push(Arc::new(create_vcpu(&kvm, &vm, index, config.cpus)?));
        }
        let lifecycle = Arc::new(Lifecycle::new(ended));
        start_threads(&vcpus, &bus, &lifecycle, &console, log)?;
        let dirty = DirtyLog::new(Arc::clone(&vm));
        Ok(Self { config, snapshots, vm, vcpus, bus, console, lifecycle, dirty })
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

    /// What this host can save and restore.
    pub(super) fn snapshots(&self) -> &snapshot::Host {
        &self.snapshots
    }

    /// Of a guest that does not run: returns when its last exit is done with.
    pub(super) fn wait_until_still(&self) {
        self.lifecycle.pause();
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
        let (cpus, memory_bytes) = (self.config.cpus, self.config.memory_bytes);
        let spec = BootSpec { kernel, initrd, cmdline: &self.config.cmdline, cpus, memory_bytes };
        let entry = boot::load(self.vm.memory().as_ref(), spec)?;
        if let Some(first) = self.vcpus.first() {
            boot::configure_vcpu(&first.fd(), &entry)?;
        }
        self.loaded();
        Ok(())
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When nothing is loaded or the guest has ended.
    pub fn run(&self) -> Result<(), MachineError> {
        if self.phase() == Phase::Paused {
            for vcpu in &self.vcpus {
                state::note_pause(&vcpu.fd())?;
            }
        }
        match self.lifecycle.run() {
            Phase::Running => Ok(()),
            phase => Err(MachineError::Phase { what: "run", phase }),
        }
    }

    /// Returns when every vCPU stands still between two instructions and all
    /// serial output is written.
    ///
    /// # Errors
    /// When nothing is loaded or the guest has ended.
    pub fn pause(&self) -> Result<(), MachineError> {
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

fn check_host(kvm: &Kvm, cpus: u32) -> Result<(), MachineError> {
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

fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
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

fn create_vcpu(kvm: &Kvm, vm: &Vm, index: u32, cpus: u32) -> Result<Vcpu, MachineError> {
    let fd = vm.fd().create_vcpu(index.into()).map_err(system("create a vCPU"))?;
    let cpuid = cpuid::for_vcpu(kvm, index, cpus)?;
    fd.set_cpuid2(&cpuid).map_err(system("give the guest its CPU features"))?;
    Vcpu::new(fd, Arc::clone(vm.memory())).map_err(system("map a vCPU's shared page"))
}

/// Starts every thread that the machine will ever have: afterwards the
/// process may not make any more.
fn start_threads(
    vcpus: &[Arc<Vcpu>],
    bus: &Arc<Bus>,
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
