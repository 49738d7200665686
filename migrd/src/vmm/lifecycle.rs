//! Whether the guest may run, who stands still, and why it ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::sys::vm::Leave;

/// What ended a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopKind {
    /// It switched itself off.
    Shutdown,
    /// It asked for a reset.
    Reset,
    /// A fault while handling a fault while handling a fault.
    TripleFault,
    /// KVM could not emulate one of its instructions.
    EmulationFailure,
    /// KVM could not go on for another reason.
    InternalError,
    /// The driver of a device did what no driver may.
    DeviceAbused,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    /// What ended it.
    pub kind: StopKind,
    /// For people, where there is more to say.
    pub details: String,
}

impl Stop {
    /// Nothing more to say than its kind.
    #[must_use]
    pub fn of(kind: StopKind) -> Self {
        Self { kind, details: String::new() }
    }
}

/// Where the guest stands in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is loaded.
    Ready,
    /// Its vCPUs run, or are about to.
    Running,
    /// Loaded, and no vCPU runs.
    Paused,
    /// It has ended; what is left of it can be read.
    Stopped(Stop),
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    /// vCPUs that are in the guest, or in the middle of an exit from it.
    inside: usize,
}

/// Shared by the control thread and the vCPU threads.
#[derive(Debug)]
pub struct Lifecycle {
    inner: Mutex<Inner>,
    changed: Condvar,
    vcpus: OnceLock<Vec<(Arc<Leave>, JoinHandle<()>)>>,
    /// Rung when the guest ends by itself.
    ended: EventFd,
}

impl Lifecycle {
    /// Of a guest that has nothing loaded. `ended` is rung when it ends by itself.
    #[must_use]
    pub fn new(ended: EventFd) -> Self {
        Self {
            inner: Mutex::new(Inner { phase: Phase::Ready, inside: 0 }),
            changed: Condvar::new(),
            vcpus: OnceLock::new(),
            ended,
        }
    }

    /// Names the threads that [`Self::pause`] has to interrupt. Once.
    pub fn set_vcpus(&self, vcpus: Vec<(Arc<Leave>, JoinHandle<()>)>) {
        assert!(self.vcpus.set(vcpus).is_ok(), "vCPU threads are made once");
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the guest stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.lock().phase.clone()
    }

    /// Something was loaded, for the first time or after a reset: to `Paused`.
    pub fn loaded(&self) {
        self.lock().phase = Phase::Paused;
    }

    /// Lets the vCPUs run, if the guest is paused; says where it stands.
    pub fn run(&self) -> Phase {
        let mut inner = self.lock();
        if inner.phase == Phase::Paused {
            inner.phase = Phase::Running;
            self.changed.notify_all();
        }
        inner.phase.clone()
    }

    /// Returns when every vCPU stands still; says where the guest stands.
    pub fn pause(&self) -> Phase {
        let mut inner = self.lock();
        if inner.phase == Phase::Running {
            inner.phase = Phase::Paused;
        }
        drop(inner);
        self.interrupt();
        inner = self.lock();
        while inner.inside > 0 {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.phase.clone()
    }

    /// Called by a vCPU: the guest has ended. The first reason counts.
    pub fn stop(&self, stop: Stop) {
        let mut inner = self.lock();
        // One that is being paused can still end, by its last instruction.
        if matches!(inner.phase, Phase::Running | Phase::Paused) {
            inner.phase = Phase::Stopped(stop);
        }
        drop(inner);
        self.interrupt();
        // Cannot fail before 2^64 - 1 guests have ended.
        let _ = self.ended.write(1);
    }

    fn interrupt(&self) {
        for (leave, thread) in self.vcpus.get().into_iter().flatten() {
            leave.set(true);
            // Fails only for a thread that has ended, which none of these do.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Called by a vCPU: returns when it may run.
    pub fn enter(&self, leave: &Leave) {
        let mut inner = self.lock();
        while inner.phase != Phase::Running {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.inside += 1;
        // Under the lock: a request made from now on finds the flag down and
        // raises it, and an earlier one was seen as a phase.
        leave.set(false);
    }

    /// Called by a vCPU: whether it may go on running.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.lock().phase == Phase::Running
    }

    /// Called by a vCPU: it stands still.
    pub fn stand(&self) {
        self.lock().inside -= 1;
        self.changed.notify_all();
    }
}
