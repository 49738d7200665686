//! The C library's heap, as the daemon wants it.

use libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD};

/// Blocks up to this size come from the heap, in bytes.
const KEEP: libc::c_int = 64 << 20;
/// Heaps that threads share.
const ARENAS: libc::c_int = 2;

/// Keeps freed memory for the next allocation: a migration allocates and frees
/// buffers of some 100 KiB all the time, and giving each back to the kernel
/// costs a page fault a page. [`trim`] gives it back at the end.
pub fn keep_freed_memory() {
    // SAFETY: mallopt(3) with constants it knows; it may be called at any time.
    // What it refuses stays as it was, which is slower and not wrong.
    unsafe {
        libc::mallopt(M_MMAP_THRESHOLD, KEEP);
        libc::mallopt(M_TRIM_THRESHOLD, KEEP);
        libc::mallopt(M_ARENA_MAX, ARENAS);
    }
}

/// Gives freed memory back to the kernel.
pub fn trim() {
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
