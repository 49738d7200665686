//! Memory that follows a workload that runs at its destination already.

use async_trait::async_trait;

use super::WorkloadError;
use crate::units::PAGE_SIZE;

/// The most pages of a piece.
pub const MAX_PIECE_PAGES: u32 = 256;

/// Whether memory can follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Follows {
    /// It can.
    Can,
    /// It can't, and why, in words.
    Not(String),
}

/// Memory of one process of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Number of the process, as the workload itself counts.
    pub process: u32,
    /// Of the first byte.
    pub address: u64,
    /// How many pages.
    pub pages: u32,
}

impl Piece {
    /// A piece that somebody else asks for.
    ///
    /// # Errors
    /// In words, when nobody can have it.
    pub fn checked(process: u32, address: u64, pages: u32) -> Result<Self, &'static str> {
        if pages == 0 || pages > MAX_PIECE_PAGES {
            return Err("a piece of memory has from 1 to 256 pages");
        }
        let end = address.checked_add(u64::from(pages) * PAGE_SIZE);
        if !address.is_multiple_of(PAGE_SIZE) || end.is_none() {
            return Err("a piece of memory is of whole pages");
        }
        Ok(Self { process, address, pages })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE
    }
}

/// Memory that a workload has left behind. It stands still, so what is read once is the
/// same every time.
pub trait LeftMemory: Send + Sync {
    /// How much it is, in bytes; 0 where that is not known.
    fn bytes(&self) -> u64;

    /// Reads a piece of it. Blocks as long as it takes to copy that.
    ///
    /// # Errors
    /// When it can't be had, now or ever.
    fn read(&self, piece: Piece) -> Result<Vec<u8>, WorkloadError>;
}

/// Memory that a workload lacks. What is known of it outlives the daemon.
#[async_trait]
pub trait Lacks: Send + Sync {
    /// The next piece that nobody was asked for since this daemon has come; with `urgent`
    /// only what the workload waits for. Returns when there is one; `None` when it lacks
    /// nothing any more.
    ///
    /// # Errors
    /// When the workload is gone.
    async fn next(&self, urgent: bool) -> Result<Option<Piece>, WorkloadError>;

    /// Puts what has come in its place.
    ///
    /// # Errors
    /// When the workload is gone, or the bytes are not those of the piece.
    async fn put(&self, piece: Piece, bytes: Vec<u8>) -> Result<(), WorkloadError>;

    /// It can't be had any more: ends the workload, which can't go on without.
    ///
    /// # Errors
    /// When the workload is gone.
    async fn lost(&self, why: &str) -> Result<(), WorkloadError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_that_nobody_can_have_is_refused() {
        let piece = Piece::checked(7, 8192, 256).unwrap();
        assert_eq!(piece.len_bytes(), 1 << 20);
        for (address, pages) in [(0, 0), (0, 257), (1, 1), (u64::MAX - 4095, 1)] {
            assert!(Piece::checked(7, address, pages).is_err(), "{address} {pages}");
        }
    }
}
