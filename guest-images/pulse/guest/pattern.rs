//! What every word of every page must hold. Pure: the host's unit tests compile it too.
//!
//! A word is a hash of (seed, page address, index in the page, stamp), so pages do not
//! compress, no two are equal, and any word can be checked without reading another. The
//! stamp of a static word is 0; that of a hot word is the pass that wrote it last.

/// 64-bit words in a page.
pub const WORDS: u64 = 512;
/// Words in a line, the part of a page that one pass rewrites.
pub const LINE_WORDS: u64 = 8;
/// Lines in a page, so passes until every byte of it was checked.
pub const LINES: u64 = WORDS / LINE_WORDS;

// Bijective mixing: shifts and odd multipliers, so distinct inputs give distinct outputs.
fn mix(mut x: u64) -> u64 {
    x ^= x >> 32;
    x = x.wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^= x >> 29;
    x = x.wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// The pattern of one page.
#[derive(Clone, Copy)]
pub struct Pattern {
    key: u64,
    page_number: u64,
}

impl Pattern {
    /// Pattern of the page at guest-physical `addr`.
    pub fn new(seed: u64, addr: u64) -> Self {
        Self { key: mix(mix(seed.wrapping_add(1)).wrapping_add(addr)), page_number: addr / 4096 }
    }

    /// Word `index` as written in pass `stamp`.
    pub fn word(self, index: u64, stamp: u64) -> u64 {
        mix(self.key.wrapping_add(((stamp << 9) | index).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// The line that pass `pass` rewrites. Neighbouring pages are at different lines.
    pub fn line(self, pass: u64) -> u64 {
        (pass + self.page_number) % LINES
    }

    /// The pass that wrote hot word `index` last, once pass `pass` is complete. Filling is
    /// pass 0; the first and the last word are rewritten every time.
    pub fn stamp(self, index: u64, pass: u64) -> u64 {
        if index == 0 || index == WORDS - 1 {
            return pass;
        }
        let age = (self.line(pass) + LINES - index / LINE_WORDS) % LINES;
        pass.saturating_sub(age)
    }
}
