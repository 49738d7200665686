//! Whether devices may work. The control thread opens and closes the gate; a
//! device's thread stands before it while it is closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct Inner {
    open: bool,
    /// Of each device, whether it stands.
    standing: Vec<bool>,
}

/// One for all devices of a VM. At first it is closed and everyone stands.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// What `inner` says, to be asked between two requests.
    closed: AtomicBool,
}

impl Gate {
    /// For so many devices.
    #[must_use]
    pub fn new(devices: usize) -> Self {
        Self {
            inner: Mutex::new(Inner { open: false, standing: vec![true; devices] }),
            changed: Condvar::new(),
            closed: AtomicBool::new(true),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a device that works shall stand.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Lets everyone work.
    pub fn open(&self) {
        let mut inner = self.lock();
        inner.open = true;
        self.closed.store(false, Ordering::SeqCst);
        drop(inner);
        self.changed.notify_all();
    }

    /// Tells everyone to stand. Threads that wait for something must be woken.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.open = false;
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Of a gate that is closed: waits until everyone stands, but no longer
    /// than `limit`.
    ///
    /// # Errors
    /// The number of a device that does not stand yet.
    pub fn wait_all(&self, limit: Duration) -> Result<(), usize> {
        let until = Instant::now() + limit;
        let mut inner = self.lock();
        loop {
            let Some(moving) = inner.standing.iter().position(|stands| !stands) else {
                return Ok(());
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(moving);
            }
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Called by the thread of device `number`: it stands, until it may work.
    pub fn stand(&self, number: usize) {
        let mut inner = self.lock();
        set(&mut inner, number, true);
        self.changed.notify_all();
        while !inner.open {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        set(&mut inner, number, false);
    }
}

fn set(inner: &mut Inner, number: usize, stands: bool) {
    if let Some(standing) = inner.standing.get_mut(number) {
        *standing = stands;
    }
}
