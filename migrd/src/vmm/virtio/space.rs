//! A device's configuration space (virtio 1.2, 2.5).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The bytes of a configuration space: vCPUs read them without waiting for the
/// device, which may be busy.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    /// What the driver may write.
    writable: Range<usize>,
    generation: AtomicU32,
}

impl ConfigSpace {
    /// Of these bytes, of which the driver may write a part.
    #[must_use]
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        Self { bytes: Mutex::new(bytes), writable, generation: AtomicU32::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver reads; what is not there reads as zeros.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let bytes = self.lock();
        into.fill(0);
        for (to, from) in into.iter_mut().zip(bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// The driver writes; what it may not write stays.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let mut bytes = self.lock();
        for ((at, to), from) in bytes.iter_mut().enumerate().skip(offset).zip(from) {
            if self.writable.contains(&at) {
                *to = *from;
            }
        }
    }

    /// The device changes bytes, as one change to the driver. It tells the
    /// driver of it by [`super::Turn::config_changed`].
    pub fn change(&self, offset: usize, from: &[u8]) {
        let mut bytes = self.lock();
        for (to, from) in bytes.iter_mut().skip(offset).zip(from) {
            *to = *from;
        }
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Four bytes, little endian; 0 where there are none.
    #[must_use]
    pub fn word(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// How often the device has changed it.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// After a restore.
    pub fn set_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }
}
