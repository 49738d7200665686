//! Which pages of a disk were written, for as long as somebody wants to know.

use std::num::NonZeroUsize;
use std::sync::{PoisonError, RwLock};

use vm_memory::bitmap::AtomicBitmap;

use crate::pages::PageBitmap;
use crate::units::{PAGE_BYTES, PAGE_SIZE};

/// A disk's written pages of 4 KiB.
#[derive(Debug)]
pub struct DiskLog {
    bytes: u64,
    /// `None` while nobody wants to know.
    written: RwLock<Option<AtomicBitmap>>,
}

impl DiskLog {
    /// Of a disk with so many bytes. Off at first.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self { bytes, written: RwLock::new(None) }
    }

    /// Pages of the disk, of which the last may be a part of one.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE)
    }

    /// Begins to take down what is written from now on.
    pub fn start(&self) {
        let bytes = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let page = NonZeroUsize::new(PAGE_BYTES).unwrap_or(NonZeroUsize::MIN);
        *self.written.write().unwrap_or_else(PoisonError::into_inner) =
            Some(AtomicBitmap::new(bytes, page));
    }

    /// Ends that.
    pub fn stop(&self) {
        *self.written.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Takes down a write, after it was made: before, its page could be taken
    /// for clean, and read, in between.
    pub fn wrote(&self, offset: u64, length: u64) {
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
        if let (Some(written), Ok(offset), Ok(length)) =
            (&*written, usize::try_from(offset), usize::try_from(length))
        {
            written.set_addr_range(offset, length);
        }
    }

    /// What was written since this was last asked.
    #[must_use]
    pub fn take(&self) -> PageBitmap {
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
        let words = written.as_ref().map(AtomicBitmap::get_and_reset);
        PageBitmap::from_words(words.unwrap_or_default(), self.pages())
    }
}
