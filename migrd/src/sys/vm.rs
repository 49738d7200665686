//! What KVM offers and kvm-ioctls leaves out or leaves unsafe.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_run,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};
use vm_memory::{
    Address, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, VolatileSlice,
};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::memfd;
use crate::units::PAGE_BYTES;

#[allow(missing_docs)]
mod number {
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log};
    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}
use number::KVM_CLEAR_DIRTY_LOG;

/// Guest memory that records the VMM's own writes, page by page.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// A piece of [`Memory`] that lies in one piece in the VMM too.
pub type Slice<'m> = VolatileSlice<'m, BS<'m, AtomicBitmap>>;

/// Takes the memory of whole pages from a range that is in `memory`. They read
/// as zeros then, and count as written by the VMM.
///
/// # Errors
/// What fallocate(2) says; a part may have been freed.
pub fn free(memory: &Memory, start: GuestAddress, length: usize) -> io::Result<()> {
    use vm_memory::GuestMemoryBackend;
    for slice in memory.get_slices(start, length) {
        let slice = slice.map_err(io::Error::other)?;
        let host = slice.ptr_guard().as_ptr().addr();
        let region = memory
            .iter()
            .find(|r| host.checked_sub(r.as_ptr().addr()).is_some_and(|offset| offset < r.size()));
        let Some(region) = region else { continue };
        let Some(file) = GuestMemoryRegion::file_offset(region) else { continue };
        let offset = file.start() + (host - region.as_ptr().addr()) as u64;
        memfd::punch(file.file(), offset, slice.len() as u64)?;
        // After it, so that nobody takes the pages for clean in between.
        slice.bitmap().mark_dirty(0, slice.len());
    }
    Ok(())
}

/// `/dev/kvm`, opened by somebody else.
#[must_use]
pub fn from_fd(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is ours alone, and stays open as long as the Kvm.
    // A descriptor of another kind fails at its first ioctl.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// A VM and the memory it has, which therefore stays mapped as long as it.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    memory: std::sync::Arc<Memory>,
}

impl Vm {
    /// Gives `memory` to the VM, a slot for each region.
    ///
    /// # Errors
    /// What `KVM_SET_USER_MEMORY_REGION` says.
    pub fn new(fd: VmFd, memory: std::sync::Arc<Memory>) -> io::Result<Self> {
        let vm = Self { fd, memory };
        vm.log_dirty(false)?;
        Ok(vm)
    }

    /// The VM.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &std::sync::Arc<Memory> {
        &self.memory
    }

    /// Switches the dirty log of every slot on or off.
    ///
    /// # Errors
    /// What `KVM_SET_USER_MEMORY_REGION` says.
    pub fn log_dirty(&self, on: bool) -> io::Result<()> {
        use vm_memory::GuestMemoryBackend;
        for (slot, region) in (0..).zip(self.memory.iter()) {
            self.set_slot(slot, region, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        }
        Ok(())
    }

    fn set_slot(
        &self,
        slot: u32,
        region: &GuestRegionMmap<AtomicBitmap>,
        flags: u32,
    ) -> io::Result<()> {
        let description = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
        };
        // SAFETY: the region is mapped with this length as long as `self`
        // holds `memory`. vCPUs keep the VM alive, and whoever holds one holds
        // the memory too (`vmm::vcpu`).
        unsafe { self.fd.set_user_memory_region(description) }.map_err(io::Error::from)
    }

    /// Takes the pages in `words` as clean, from page `first_page` of the slot
    /// on (KVM API, 4.117). `first_page` must be a multiple of 64, and `pages`
    /// too unless they reach to the slot's end.
    ///
    /// # Errors
    /// What the ioctl says.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        pages: u32,
        words: &[u64],
    ) -> io::Result<()> {
        if (words.len() as u64) * 64 < u64::from(pages) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bitmap = words.as_ptr().cast_mut().cast();
        let log = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap },
        };
        // SAFETY: KVM reads `pages` bits from `words`, which has as many.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &log) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Makes a vCPU leave the guest at once, from another thread: the
/// `immediate_exit` flag of its shared page (KVM API, 5). Together with a
/// signal there is no instant at which the request could be missed.
#[derive(Debug)]
pub struct Leave {
    page: NonNull<u8>,
}

// SAFETY: only one byte of the page is used, as an atomic; the page stays
// mapped as long as the value lives.
unsafe impl Send for Leave {}
// SAFETY: as above.
unsafe impl Sync for Leave {}

impl Leave {
    /// For `vcpu`.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        let size = NonZeroUsize::new(PAGE_BYTES).expect("a page is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the vCPU is open while it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping where the kernel finds room replaces none. The
        // first page of a vCPU's descriptor is its kvm_run.
        let page = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, 0)? };
        Ok(Self { page: page.cast() })
    }

    /// Whether the vCPU shall leave, and not enter again.
    pub fn set(&self, leave: bool) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: inside the page, and never accessed but atomically or by the
        // kernel, as this side's `VcpuFd` does not touch the field.
        let flag = unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset)) };
        flag.store(u8::from(leave), Ordering::SeqCst);
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nothing else refers to it.
        let _ = unsafe { munmap(self.page.cast(), PAGE_BYTES) };
    }
}

/// What KVM says of an internal error: its number and its data.
#[must_use]
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    // SAFETY: every bit pattern is a valid value of these integers.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
    (internal.suberror, internal.data[..count].to_vec())
}
