//! A guest's memory as the daemon sees it: streams of bytes that another
//! process writes at any time. Never a slice.

use std::arch::x86_64::{
    __m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

use super::memfd;
use crate::pages::PageBitmap;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey};

/// Pages hashed at once: enough for BLAKE3 to use its widest lanes.
const HASH_BATCH: usize = 64;

/// Where a stream lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub length: u64,
}

/// A sealed memfd, mapped whole; stream `i` is its `i`-th extent.
#[derive(Debug)]
pub struct GuestMapping {
    file: File,
    base: NonNull<u8>,
    length: usize,
    extents: Vec<Extent>,
    /// Pages of each stream that were found to hold memory.
    known: Mutex<BTreeMap<StreamKey, PageBitmap>>,
}

// SAFETY: the pointer is only used for copies between `base` and
// `base + length`, which stay mapped as long as the value lives. Those bytes
// belong to no Rust object, and another process writes them at any time anyway.
unsafe impl Send for GuestMapping {}
// SAFETY: as above.
unsafe impl Sync for GuestMapping {}

impl GuestMapping {
    /// Maps `file`.
    ///
    /// # Errors
    /// When the file can still change its size, when an extent is not in it,
    /// or what mmap(2) says.
    pub fn new(file: File, extents: Vec<Extent>) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        if !memfd::is_sealed(&file)? {
            return Err(invalid("guest memory is not sealed against a change of size"));
        }
        let total = file.metadata()?.len();
        let fits = |e: &Extent| e.offset.checked_add(e.length).is_some_and(|end| end <= total);
        let whole = |e: &Extent| (e.length | e.offset).is_multiple_of(PAGE_SIZE);
        if !extents.iter().all(|e| fits(e) && whole(e)) {
            return Err(invalid("guest memory has not the size its configuration says"));
        }
        let length = usize::try_from(total).map_err(io::Error::other)?;
        let size = NonZeroUsize::new(length).ok_or_else(|| invalid("guest memory is empty"))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping where the kernel finds room replaces none.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0)? };
        let mapping = Self { file, base: base.cast(), length, extents, known: Mutex::default() };
        advise(mapping.base, length);
        Ok(mapping)
    }

    /// How many pages a stream has; none if there is no such stream.
    #[must_use]
    pub fn pages(&self, key: StreamKey) -> u64 {
        self.extent(key).map_or(0, |e| e.length / PAGE_SIZE)
    }

    fn extent(&self, key: StreamKey) -> Option<Extent> {
        usize::try_from(key.0).ok().and_then(|i| self.extents.get(i)).copied()
    }

    /// The file range of a stream's bytes, if it has them.
    fn range(&self, key: StreamKey, offset: u64, length: u64) -> Result<Extent, OutOfStream> {
        let end = offset.checked_add(length);
        match self.extent(key) {
            Some(e) if end.is_some_and(|end| end <= e.length) => {
                Ok(Extent { offset: e.offset + offset, length })
            }
            _ => Err(OutOfStream { key, offset, length }),
        }
    }

    /// The address of a range that [`Self::range`] has found to be in the file.
    fn at(&self, range: Extent) -> *mut u8 {
        let offset = usize::try_from(range.offset).expect("checked against a mapped file");
        assert!(offset <= self.length, "checked against the mapping");
        // SAFETY: at most one past the end of the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// The pages of a stream that hold memory, and those that did and were given
    /// back since [`Self::forget`]. All others read as zeros; reading one through
    /// the mapping would take memory for it.
    ///
    /// # Errors
    /// What lseek(2) says.
    pub fn populated(&self, key: StreamKey) -> io::Result<PageBitmap> {
        let Some(extent) = self.extent(key) else { return Ok(PageBitmap::none(self.pages(key))) };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = known.entry(key).or_insert_with(|| PageBitmap::none(extent.length / PAGE_SIZE));
        // Memory that was found once is taken for held, so only the gaps are
        // looked at: to look at everything costs some ms a GiB, and the guest may
        // stand still. What a guest gives back meanwhile reads as zeros.
        let mut gaps = PageBitmap::all(pages.pages());
        gaps.subtract(pages);
        for gap in gaps.runs() {
            let mut from = extent.offset + gap.offset();
            let end = from + gap.len_bytes();
            while let Some((start, stop)) = memfd::next_data(&self.file, from, end)? {
                let first = (start - extent.offset) / PAGE_SIZE;
                let last = (stop - extent.offset).div_ceil(PAGE_SIZE);
                pages.insert(PageRun { first: PageIndex(first), count: last - first });
                from = stop;
            }
        }
        Ok(pages.clone())
    }

    /// Looks anew for the pages that hold memory, from now on: those that were
    /// given back since are then not among [`Self::populated`] any more.
    pub fn forget(&self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Bytes of memory the guest has touched: those the file takes (stat(2),
    /// `st_blocks` in units of 512 bytes). 0 if that can't be read.
    #[must_use]
    pub fn populated_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    /// BLAKE3 over the stream's pages that are not zero, in ascending order:
    /// each page's index (u64, little endian) and then its bytes. Whether a
    /// zero page holds memory or is a hole makes no difference.
    ///
    /// # Errors
    /// What lseek(2) says.
    pub fn hash(&self, key: StreamKey) -> io::Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        let mut batch = Vec::with_capacity(HASH_BATCH * (PAGE_BYTES + 8));
        let mut page = vec![0; PAGE_BYTES];
        for run in self.populated(key)?.runs() {
            for index in run.first.0..run.first.0 + run.count {
                let offset = PageIndex(index).offset();
                if self.is_zero(key, offset, PAGE_SIZE).map_err(io::Error::other)? {
                    continue;
                }
                self.read(key, offset, &mut page).map_err(io::Error::other)?;
                batch.extend_from_slice(&index.to_le_bytes());
                batch.extend_from_slice(&page);
                if batch.len() >= HASH_BATCH * (PAGE_BYTES + 8) {
                    hasher.update(&batch);
                    batch.clear();
                }
            }
        }
        hasher.update(&batch);
        Ok(*hasher.finalize().as_bytes())
    }

    /// Makes a range of the file zero, giving memory back where whole pages go.
    fn zero_range(&self, range: Extent) -> io::Result<()> {
        let end = range.offset + range.length;
        let mut from = range.offset;
        while let Some((start, stop)) = memfd::next_data(&self.file, from, end)? {
            let (start, stop) = (start.max(range.offset), stop.min(end));
            let first_page = start.next_multiple_of(PAGE_SIZE).min(stop);
            let last_page = (stop - stop % PAGE_SIZE).max(first_page);
            self.fill_zero(start, first_page);
            if last_page > first_page {
                memfd::punch(&self.file, first_page, last_page - first_page)?;
            }
            self.fill_zero(last_page, stop);
            from = stop;
        }
        Ok(())
    }

    /// Writes zeros to the file's bytes `start..end`, which must be in it.
    fn fill_zero(&self, start: u64, end: u64) {
        let length = usize::try_from(end - start).expect("checked against a mapped file");
        // SAFETY: the callers' range was checked against the file, which is
        // mapped whole.
        unsafe { self.at(Extent { offset: start, length: end - start }).write_bytes(0, length) };
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and no copy outlives `self`.
        // It can only fail for a range that was never mapped.
        let _ = unsafe { munmap(self.base.cast(), self.length) };
    }
}

impl ChunkSource for GuestMapping {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let range = self.range(key, offset, into.len() as u64)?;
        // SAFETY: `range` lies in the mapping; `into` is ours alone and apart
        // from it. The guest may write meanwhile: the caller expects torn bytes.
        unsafe { std::ptr::copy_nonoverlapping(self.at(range), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        let range = self.range(key, offset, length)?;
        // What was given back must not take memory again for being read.
        let end = range.offset + length;
        if matches!(memfd::is_hole(&self.file, range.offset, end), Ok(true)) {
            return Ok(true);
        }
        let length = usize::try_from(length).expect("checked against a mapped file");
        // SAFETY: `range` lies in the mapping.
        Ok(unsafe { all_zero(self.at(range), length) })
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

impl ChunkSink for GuestMapping {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let range = self.range(key, offset, bytes.len() as u64)?;
        // Through the file rather than the mapping: a page that holds nothing
        // yet then costs neither a fault nor being zeroed first.
        // It fails where the host has no memory left, and where a store into
        // the mapping would end the daemon with SIGBUS.
        let length = range.length;
        let out = |_| OutOfStream { key, offset, length };
        self.file.write_all_at(bytes, range.offset).map_err(out)
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let range = self.range(key, offset, length)?;
        if self.zero_range(range).is_err() {
            // Without the kernel's help it takes memory, but it is still right.
            self.fill_zero(range.offset, range.offset + range.length);
        }
        Ok(())
    }
}

/// Whether `length` bytes from `at` on are zero. Looks at the first bytes
/// first: of a page with contents they nearly always tell.
///
/// # Safety
/// The bytes must be mapped for reading.
unsafe fn all_zero(at: *const u8, length: usize) -> bool {
    let head = at.align_offset(16).min(length);
    let wide = (length - head) / 16;
    let tail = head + wide * 16;
    let byte = |i: usize| {
        // SAFETY: `i < length`.
        unsafe { at.add(i).read_volatile() }
    };
    if (0..head).any(|i| byte(i) != 0) || (tail..length).any(|i| byte(i) != 0) {
        return false;
    }
    // SAFETY: aligned by `head`; `wide` blocks of 16 bytes end at `tail`.
    let block = |i: usize| unsafe { at.add(head).cast::<__m128i>().add(i).read_volatile() };
    // SAFETY: SSE2 is part of x86-64.
    let is_zero =
        |v: __m128i| unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128())) == 0xffff };
    if wide > 0 && !is_zero(block(0)) {
        return false;
    }
    let mut next = 0;
    while next < wide {
        let end = (next + 16).min(wide);
        // SAFETY: SSE2 is part of x86-64.
        let any = (next..end).fold(unsafe { _mm_setzero_si128() }, |acc, i| {
            // SAFETY: as above.
            unsafe { _mm_or_si128(acc, block(i)) }
        });
        if !is_zero(any) {
            return false;
        }
        next = end;
    }
    true
}

/// Asks for huge pages and for no copy in core dumps. Both only help.
fn advise(base: NonNull<u8>, length: usize) {
    for advice in [MmapAdvise::MADV_HUGEPAGE, MmapAdvise::MADV_DONTDUMP] {
        // SAFETY: neither advice changes what the mapping holds.
        let _ = unsafe { madvise(base.cast(), length, advice) };
    }
}

/// Maps pages of a region that the VMM has mapped, which takes memory for
/// those that have none (madvise(2), `MADV_POPULATE_WRITE`). Only helps: a
/// kernel that can't do it leaves it to the first touch.
pub fn populate_region(region: &GuestRegionMmap<AtomicBitmap>, run: PageRun) {
    let (Ok(offset), Ok(length)) =
        (usize::try_from(run.offset()), usize::try_from(run.len_bytes()))
    else {
        return;
    };
    if offset.checked_add(length).is_none_or(|end| end > region.size()) {
        return;
    }
    // SAFETY: the range lies in the region's mapping, as was just checked, and
    // what it holds does not change.
    unsafe {
        libc::madvise(region.as_ptr().add(offset).cast(), length, libc::MADV_POPULATE_WRITE);
    }
}

/// Makes a whole region that the VMM has mapped zero and gives its memory back
/// (madvise(2), `MADV_REMOVE`); every page counts as written by the VMM.
///
/// # Errors
/// When the system refuses; what the region holds is then unspecified.
pub fn clear_region(region: &GuestRegionMmap<AtomicBitmap>) -> io::Result<()> {
    let (base, length) = (region.as_ptr(), region.size());
    // SAFETY: the range is the region's own mapping, which is shared and backed
    // by a memfd. Guest memory is only ever accessed as such, so that it
    // changes is nothing new to anybody.
    let result = unsafe { libc::madvise(base.cast(), length, libc::MADV_REMOVE) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let mapping: &MmapRegion<AtomicBitmap> = region;
    mapping.bitmap().set_addr_range(0, length);
    Ok(())
}

/// [`advise`] for a region that the VMM has mapped.
pub fn advise_region(region: &GuestRegionMmap<AtomicBitmap>) {
    if let Some(base) = NonNull::new(region.as_ptr()) {
        advise(base, region.size());
    }
}

#[cfg(test)]
mod tests;
