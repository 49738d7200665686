//! Extends boot.s's identity map beyond 4 GiB. Ring 3 may: the tables map themselves.

use core::cell::UnsafeCell;

use crate::plan::{MAPPED_END, Region};

const GIB: u64 = 1 << 30;
const FIRST: u64 = 4;
const DIRECTORIES: usize = (MAPPED_END / GIB - FIRST) as usize;
const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE: u64 = 0x80;

#[repr(C, align(4096))]
struct Table(UnsafeCell<[u64; 512]>);
// SAFETY: written by vCPU 0 alone, before any other vCPU is started.
unsafe impl Sync for Table {}

static HIGH_DIRECTORIES: [Table; DIRECTORIES] =
    [const { Table(UnsafeCell::new([0; 512])) }; DIRECTORIES];

unsafe extern "C" {
    static pdpt: Table;
}

/// Maps each GiB above the fourth that holds some of `ram`.
///
/// # Safety
/// Only vCPU 0 may call this, and only while it is alone.
pub unsafe fn map(ram: &Region) {
    for piece in ram.pieces() {
        let last = (piece.start + piece.len - 1) / GIB;
        for gib in (piece.start / GIB).max(FIRST)..=last {
            let directory = HIGH_DIRECTORIES[(gib - FIRST) as usize].0.get();
            // SAFETY: alone, says the caller; entries go from absent to present, which
            // needs no TLB flush, and volatile keeps the directory ahead of its use.
            unsafe {
                for (i, entry) in (0..512).enumerate() {
                    let page = gib * GIB + entry * (2 << 20);
                    (&raw mut (*directory)[i]).write_volatile(page | PRESENT_WRITABLE_USER | LARGE);
                }
                (&raw mut (*pdpt.0.get())[gib as usize])
                    .write_volatile(directory as u64 | PRESENT_WRITABLE_USER);
            }
        }
    }
}
