//! Filling, rewriting and verifying the regions.
//!
//! Every access is volatile: the point is what memory holds, not what the compiler knows.

use crate::pattern::{LINE_WORDS, Pattern, WORDS};
use crate::plan::Region;
use crate::settings::PAGE;
use crate::state::{self, Wrong};

/// A page the plan gave to one vCPU.
#[derive(Clone, Copy)]
struct Page {
    addr: u64,
    pattern: Pattern,
}

/// Who looks, for a report.
#[derive(Clone, Copy)]
pub struct Viewer {
    /// The vCPU.
    pub cpu: usize,
    /// Its pass.
    pub pass: u64,
}

impl Page {
    fn new(seed: u64, addr: u64) -> Self {
        Self { addr, pattern: Pattern::new(seed, addr) }
    }

    fn word(self, index: u64) -> *mut u64 {
        (self.addr + index * 8) as *mut u64
    }

    fn write(self, index: u64, stamp: u64) {
        // SAFETY: plan pages are mapped RAM outside the image, `index` stays inside the
        // page, and each page is used by one vCPU.
        unsafe { self.word(index).write_volatile(self.pattern.word(index, stamp)) }
    }

    fn check(self, index: u64, stamp: u64, hot: bool, viewer: Viewer) {
        let expected = self.pattern.word(index, stamp);
        // SAFETY: as for writing.
        let found = unsafe { self.word(index).read_volatile() };
        if found != expected {
            let Viewer { cpu, pass } = viewer;
            state::report(&Wrong { hot, cpu, pass, addr: self.addr + index * 8, expected, found });
        }
    }
}

/// Writes every byte of `region` with stamp 0.
pub fn fill(region: &Region, seed: u64) {
    for addr in region.pages() {
        let page = Page::new(seed, addr);
        (0..WORDS).for_each(|index| page.write(index, 0));
    }
}

/// One pass over a hot region: in each page the first word, the last word and one line are
/// checked against what earlier passes left, and rewritten.
pub fn rewrite(region: &Region, seed: u64, viewer: Viewer) {
    let pass = viewer.pass;
    for addr in region.pages() {
        let page = Page::new(seed, addr);
        let start = page.pattern.line(pass) * LINE_WORDS;
        let renew = |index| {
            page.check(index, page.pattern.stamp(index, pass - 1), true, viewer);
            page.write(index, pass);
        };
        if start != 0 {
            renew(0);
        }
        (start..start + LINE_WORDS).for_each(renew);
        if start + LINE_WORDS != WORDS {
            renew(WORDS - 1);
        }
    }
}

/// Checks every byte of a hot region after pass `viewer.pass`.
pub fn verify_hot(region: &Region, seed: u64, viewer: Viewer) {
    for addr in region.pages() {
        let page = Page::new(seed, addr);
        for index in 0..WORDS {
            page.check(index, page.pattern.stamp(index, viewer.pass), true, viewer);
        }
    }
}

/// Walks through the static region, over and over.
pub struct FixedWalk {
    offset: u64,
    /// How often every byte of the region was checked.
    pub rounds: u64,
}

impl FixedWalk {
    /// At the start of the region.
    pub const fn new() -> Self {
        Self { offset: 0, rounds: 0 }
    }

    /// Checks the next `bytes`, or what is left until the region's end.
    pub fn advance(&mut self, region: &Region, bytes: u64, seed: u64, viewer: Viewer) {
        for _ in 0..bytes / PAGE {
            let Some(addr) = region.page_at(self.offset) else { return };
            let page = Page::new(seed, addr);
            (0..WORDS).for_each(|index| page.check(index, 0, false, viewer));
            self.offset += PAGE;
            if self.offset == region.len() {
                self.offset = 0;
                self.rounds += 1;
                return;
            }
        }
    }
}
