//! A device's interrupt (virtio 1.2, 4.2.2: InterruptStatus, InterruptACK).

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// The device has used buffers.
pub const USED: u32 = 1;
/// The device has changed its configuration.
pub const CONFIG: u32 = 2;

/// The interrupt's reasons and its line, which KVM watches (irqfd). A vCPU that
/// acknowledges one waits for nobody.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// Through `line`.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    /// What KVM watches.
    #[must_use]
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Interrupts the guest for `reason`.
    pub fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // A counter that is full has been rung often enough.
        let _ = self.line.write(1);
    }

    /// The reasons that the driver has not acknowledged.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these.
    pub fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// As after a reset.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
    }

    /// As it was saved. An interrupt that was on its way then is raised again:
    /// one too many is harmless, one too few is not.
    pub fn restore(&self, status: u32) {
        self.reset();
        if status != 0 {
            self.raise(status);
        }
    }
}
