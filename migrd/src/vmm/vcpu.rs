//! One vCPU and the thread that runs it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::bus::Bus;
use super::lifecycle::{Lifecycle, Stop, StopKind};
use super::sandbox;
use crate::sys::vm::{Leave, Memory, internal_error};

/// A vCPU thread calls into KVM and the devices, and neither goes deep.
const STACK_BYTES: usize = 128 * 1024;

/// A vCPU. Its lock is held by its thread as long as the guest runs.
#[derive(Debug)]
pub struct Vcpu {
    fd: Mutex<VcpuFd>,
    leave: Arc<Leave>,
    exits: AtomicU64,
    /// A vCPU keeps the VM alive, and the VM uses this memory.
    _memory: Arc<Memory>,
}

/// What to do after an exit from the guest.
enum Next {
    /// Go back into it.
    Enter,
    /// It was a signal: see whether to go on.
    Look,
    /// The guest has ended.
    Stop(Stop),
}

impl Vcpu {
    /// Takes a new vCPU.
    ///
    /// # Errors
    /// When its shared page cannot be mapped.
    pub fn new(fd: VcpuFd, memory: Arc<Memory>) -> std::io::Result<Self> {
        let leave = Arc::new(Leave::new(&fd)?);
        Ok(Self { fd: Mutex::new(fd), leave, exits: AtomicU64::new(0), _memory: memory })
    }

    /// The vCPU itself; waits until it stands still.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What makes it leave the guest.
    #[must_use]
    pub fn leave(&self) -> Arc<Leave> {
        Arc::clone(&self.leave)
    }

    /// How often it left the guest for the VMM.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// Starts its thread, which tells `ready` when it is confined.
    ///
    /// # Errors
    /// When there is no room for a thread.
    pub fn spawn(
        self: &Arc<Self>,
        index: usize,
        bus: Arc<Bus>,
        lifecycle: Arc<Lifecycle>,
        ready: std::sync::mpsc::Sender<Result<(), sandbox::SandboxError>>,
    ) -> std::io::Result<JoinHandle<()>> {
        let vcpu = Arc::clone(self);
        let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
        thread.stack_size(STACK_BYTES).spawn(move || {
            let confined = sandbox::confine_vcpu();
            let failed = confined.is_err();
            // The receiver gives up only together with the whole process.
            let _ = ready.send(confined);
            drop(ready);
            if !failed {
                vcpu.live(&bus, &lifecycle);
            }
        })
    }

    fn live(&self, bus: &Bus, lifecycle: &Lifecycle) {
        loop {
            lifecycle.enter(&self.leave);
            let mut fd = self.fd();
            loop {
                match self.step(&mut fd, bus) {
                    Next::Enter => {}
                    Next::Look if lifecycle.may_run() => {}
                    Next::Look => break,
                    Next::Stop(stop) => {
                        lifecycle.stop(stop);
                        break;
                    }
                }
            }
            self.settle(&mut fd, bus, lifecycle);
            drop(fd);
            lifecycle.stand();
        }
    }

    /// Completes the instruction that the last exit came from: what a device
    /// answered reaches the guest's registers only at the next entry, so
    /// without this a saved state would lack it (KVM API, 5, at `kvm_run`).
    fn settle(&self, fd: &mut VcpuFd, bus: &Bus, lifecycle: &Lifecycle) {
        self.leave.set(true);
        loop {
            match self.step(fd, bus) {
                Next::Enter => {}
                Next::Look => return,
                Next::Stop(stop) => return lifecycle.stop(stop),
            }
        }
    }

    /// Enters the guest once and serves what it left for.
    fn step(&self, fd: &mut VcpuFd, bus: &Bus) -> Next {
        let stop = |kind| Next::Stop(Stop::of(kind));
        self.exits.fetch_add(1, Ordering::Relaxed);
        match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => match bus.write_port(port, data) {
                Some(kind) => stop(kind),
                None => Next::Enter,
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.read_port(port, data);
                Next::Enter
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.read_memory(address, data);
                Next::Enter
            }
            Ok(VcpuExit::MmioWrite(address, data)) => match bus.write_memory(address, data) {
                Some(ended) => Next::Stop(ended),
                None => Next::Enter,
            },
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => Next::Enter,
            Ok(VcpuExit::Intr) => Next::Look,
            Ok(VcpuExit::Hlt) => stop(StopKind::Shutdown),
            Ok(VcpuExit::Shutdown) => stop(StopKind::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => stop(StopKind::Shutdown),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => stop(StopKind::Reset),
            Ok(VcpuExit::InternalError) => Next::Stop(explain(fd)),
            Ok(other) => Next::Stop(Stop {
                kind: StopKind::InternalError,
                details: format!("the guest left with {other:?}"),
            }),
            Err(e) if e.errno() == libc::EINTR => Next::Look,
            Err(e) if e.errno() == libc::EAGAIN => Next::Enter,
            Err(e) => Next::Stop(Stop {
                kind: StopKind::InternalError,
                details: format!("KVM_RUN failed: {e}"),
            }),
        }
    }
}

/// What KVM says of the error, and where the guest was.
fn explain(fd: &mut VcpuFd) -> Stop {
    let (number, data) = internal_error(fd);
    let kind = if number == KVM_INTERNAL_ERROR_EMULATION {
        StopKind::EmulationFailure
    } else {
        StopKind::InternalError
    };
    let at = fd.get_regs().map_or(0, |r| r.rip);
    Stop { kind, details: format!("KVM internal error {number} at rip {at:#x}, data {data:x?}") }
}
