//! What is behind a disk.

use std::fmt;
use std::fs::File;
use std::io;

use crate::sys::vm::Slice;
use crate::sys::volume;

/// Bytes that last: a file or a block device, or a test's own.
pub trait Volume: Send + fmt::Debug {
    /// Reads from `offset` (bytes) on into guest memory; says how much came.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, offset: u64, into: &[Slice<'_>]) -> io::Result<usize>;

    /// Writes guest memory from `offset` (bytes) on; says how much went.
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&self, offset: u64, from: &[Slice<'_>]) -> io::Result<usize>;

    /// Returns when everything written so far lasts.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&self) -> io::Result<()>;
}

impl Volume for File {
    fn read_at(&self, offset: u64, into: &[Slice<'_>]) -> io::Result<usize> {
        volume::read_at(self, offset, into)
    }

    fn write_at(&self, offset: u64, from: &[Slice<'_>]) -> io::Result<usize> {
        volume::write_at(self, offset, from)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
