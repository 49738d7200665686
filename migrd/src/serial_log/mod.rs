//! What a VM wrote to its serial port, in one file of bounded size.
//!
//! Owns the format of that file; may not touch paths, or anything async.
//! [`Writer`] runs in the VMM child and needs
//! nothing but an open file (`pread`, `pwrite`, `fstat`); [`Reader`] is the
//! daemon's side and may read while the writer writes; [`LogStream`] moves the
//! file as one stream of a migration.
//!
//! # Format
//!
//! The file is a ring of [`PAGES`] slots of one page each. Pages are numbered
//! from 0 for as long as the log lives, on whatever host; page `n` is in slot
//! `n % PAGES`, so the file stays below [`LENGTH`] bytes and page `n` ends page
//! `n - PAGES`. It is sparse until it is used. Numbers are little-endian.
//!
//! | bytes | of a page |
//! |---|---|
//! | 0..4 | `MSL1` |
//! | 4..8 | CRC-32 (IEEE) of bytes 8 to the end of the last record |
//! | 8..16 | the page's number |
//! | 16..18 | how many bytes of records follow the header |
//! | 18..24 | zero |
//! | 24..32 | bytes of output before this page, those that were lost included |
//! | 32.. | records |
//!
//! | bytes | of a record |
//! |---|---|
//! | 0..2 | length of its data |
//! | 2 | 1: its data begins a line; 2: output was lost here |
//! | 3 | zero |
//! | 4..12 | `CLOCK_REALTIME` of the line's first byte, in ns since 1970 |
//! | 12.. | data; of a record of lost output, the number of bytes lost, in 8 bytes |
//!
//! A record never crosses a page, so any page can be read without the one
//! before it. A page is rewritten in place while it fills, and its last record
//! may grow. A page with a wrong CRC, number or record is left out; the others
//! are still read. Nothing is recovered from half a page.
//!
//! Because slots do not move, a migration treats the file like memory: changed
//! slots are dirty pages, and the destination's file ends up byte for byte the
//! same. There the writer goes on with the next page number.

mod page;
mod reader;
mod stream;
mod writer;

pub use page::{LENGTH, PAGES};
pub use reader::{Cleared, Cursor, Entry, Reader};
pub use stream::LogStream;
pub use writer::{Piece, Writer};

#[cfg(test)]
mod tests;
