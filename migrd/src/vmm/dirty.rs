//! Which pages of guest memory were written: by the guest, as KVM's log says,
//! and by the VMM itself, which KVM does not see. And which pages of its disks.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::virtio::blk::log::DiskLog;
use crate::pages::{PageBitmap, PageSet};
use crate::sys::vm::Vm;
use crate::units::PAGE_SIZE;
use crate::workload::StreamKey;

/// Number of the first disk's region.
const FIRST_DISK: u32 = 128;

/// Pages that one ioctl clears at most: it holds the MMU lock meanwhile.
const CLEAR_PAGES: usize = 1 << 16;

/// Why the dirty log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// Asked for what was not switched on.
    #[error("dirty tracking is off: start it first")]
    Off,
    /// Not a region of this guest.
    #[error("guest memory has no region {0}")]
    NoRegion(u32),
    /// KVM refused.
    #[error("cannot {what} KVM's dirty log")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
}

fn kvm(what: &'static str) -> impl Fn(io::Error) -> DirtyError {
    move |source| DirtyError::Kvm { what, source }
}

/// The dirty log of a VM's memory.
#[derive(Debug)]
pub struct DirtyLog {
    vm: Arc<Vm>,
    /// What the VMM wrote and nobody has cleared, a region each; `None` when off.
    own: Option<Vec<PageBitmap>>,
    disks: Vec<Disk>,
    /// Disks are asked for too.
    with_disks: bool,
}

/// A disk, and what of it was written and nobody has cleared.
#[derive(Debug)]
struct Disk {
    log: Arc<DiskLog>,
    written: PageBitmap,
}

impl DirtyLog {
    /// Off at first.
    #[must_use]
    pub fn new(vm: Arc<Vm>, disks: Vec<Arc<DiskLog>>) -> Self {
        let disk = |log| Disk { log, written: PageBitmap::default() };
        Self { vm, own: None, disks: disks.into_iter().map(disk).collect(), with_disks: false }
    }

    /// Switches it on. At first every page is dirty
    /// (`KVM_DIRTY_LOG_INITIALLY_SET`), and no page is protected. `disks`: also
    /// for those, whose maps may be large.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start(&mut self, disks: bool) -> Result<(), DirtyError> {
        if self.own.is_some() {
            return Ok(());
        }
        let mut own = Vec::new();
        for region in self.vm.memory().iter() {
            own_writes(region);
            own.push(PageBitmap::none(region.len() / PAGE_SIZE));
        }
        self.vm.log_dirty(true).map_err(kvm("switch on"))?;
        self.own = Some(own);
        self.with_disks = disks;
        if disks {
            for disk in &mut self.disks {
                disk.log.start();
                disk.written = PageBitmap::all(disk.log.pages());
            }
        }
        Ok(())
    }

    /// Switches it off.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop(&mut self) -> Result<(), DirtyError> {
        self.own = None;
        for disk in &mut self.disks {
            disk.log.stop();
            disk.written = PageBitmap::default();
        }
        self.vm.log_dirty(false).map_err(kvm("switch off"))
    }

    /// The pages written since they were last cleared. Clears none.
    ///
    /// # Errors
    /// When the log is off or KVM refuses.
    pub fn read(&mut self) -> Result<PageSet, DirtyError> {
        let own = self.own.as_mut().ok_or(DirtyError::Off)?;
        let mut set = PageSet::default();
        for ((slot, region), own) in (0..).zip(self.vm.memory().iter()).zip(own) {
            let pages = region.len() / PAGE_SIZE;
            own.union(&own_writes(region));
            let words = self.vm.fd().get_dirty_log(slot, region.size());
            let words = words.map_err(|e| kvm("read")(e.into()))?;
            let mut dirty = PageBitmap::from_words(words, pages);
            dirty.union(own);
            set.set(StreamKey(slot), dirty);
        }
        let disks = self.disks.iter_mut().filter(|_| self.with_disks);
        for (key, disk) in (FIRST_DISK..).zip(disks) {
            disk.written.union(&disk.log.take());
            set.set(StreamKey(key), disk.written.clone());
        }
        Ok(set)
    }

    /// Takes `pages` as clean, in both logs.
    ///
    /// # Errors
    /// When the log is off, a region does not exist or KVM refuses.
    pub fn clear(&mut self, pages: &PageSet) -> Result<(), DirtyError> {
        let own = self.own.as_mut().ok_or(DirtyError::Off)?;
        for (key, out) in pages.iter() {
            if let Some(index) = key.0.checked_sub(FIRST_DISK) {
                let disk = usize::try_from(index).ok().and_then(|i| self.disks.get_mut(i));
                let disk = disk.ok_or(DirtyError::NoRegion(key.0))?;
                disk.written.union(&disk.log.take());
                let pages = disk.log.pages();
                disk.written.subtract(&PageBitmap::from_words(out.words().to_vec(), pages));
                continue;
            }
            let none = DirtyError::NoRegion(key.0);
            let index = usize::try_from(key.0).ok().filter(|i| *i < own.len()).ok_or(none)?;
            let region = self.vm.memory().iter().nth(index).ok_or(DirtyError::NoRegion(key.0))?;
            let out = PageBitmap::from_words(out.words().to_vec(), region.len() / PAGE_SIZE);
            // The VMM's writes are collected before any are taken out, so that
            // those outside `out` stay.
            own[index].union(&own_writes(region));
            own[index].subtract(&out);
            clear_kvm(&self.vm, key.0, &out).map_err(kvm("clear"))?;
        }
        Ok(())
    }
}

/// What the VMM wrote since it was last asked.
fn own_writes(region: &GuestRegionMmap<AtomicBitmap>) -> PageBitmap {
    let mapping: &MmapRegion<AtomicBitmap> = region;
    PageBitmap::from_words(mapping.bitmap().get_and_reset(), region.len() / PAGE_SIZE)
}

/// Clears in KVM's log, leaving out stretches where there is nothing to clear.
fn clear_kvm(vm: &Vm, slot: u32, out: &PageBitmap) -> io::Result<()> {
    let mut first = 0;
    for words in out.words().chunks(CLEAR_PAGES / 64) {
        let pages = (out.pages() - first).min((words.len() as u64) * 64);
        if words.iter().any(|w| *w != 0) {
            let count = u32::try_from(pages).map_err(io::Error::other)?;
            vm.clear_dirty_log(slot, first, count, words)?;
        }
        first += pages;
    }
    Ok(())
}
