//! What can go wrong with a machine.

use std::io;

use crate::vmm::devices::clock_chip::ClockChipError;
use crate::vmm::devices::serial::SerialError;
use crate::vmm::dirty::DirtyError;
use crate::vmm::lifecycle::Phase;
use crate::vmm::memory::MemoryError;
use crate::vmm::sandbox::SandboxError;
use crate::vmm::virtio::DeviceError;
use crate::vmm::{boot, cpu};

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
    Cpuid(#[from] cpu::CpuidError),
    /// The VM's CPU model.
    #[error(transparent)]
    CpuModel(#[from] cpu::ModelError),
    /// The kernel to boot.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// Asked to boot without one.
    #[error("cannot boot: no kernel was given to this VMM, or it was used already")]
    NoKernel,
    /// Asked of devices that it has not.
    #[error("this VM has no such devices")]
    NoDevices,
    /// Asked for something that needs a descriptor.
    #[error("a request came without the descriptor that belongs to it")]
    NoDescriptor,
    /// Made by a migr that gave VMs no power button.
    #[error("this VM was made without a power button: end it with `migctl stop --force`")]
    NoButton,
    /// The guest would not notice.
    #[error(
        "the guest does not listen for its power button: shut it down from within, or end it \
         with `migctl stop --force`"
    )]
    DeafToButton,
    /// A saved clock chip.
    #[error(transparent)]
    ClockChip(#[from] ClockChipError),
    /// The virtio devices.
    #[error(transparent)]
    Devices(#[from] DeviceError),
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
    /// The state of a VM with other devices.
    #[error("the state is of a VM of version {version}, and this one is of version {own}")]
    OtherVersion {
        /// Of the state.
        version: u32,
        /// Of this VM.
        own: u32,
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

pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> MachineError {
    move |e| MachineError::System { what, source: e.into() }
}
