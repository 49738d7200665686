//! Which guest-physical pages each region gets. Pure: the host's unit tests compile it too.

use crate::settings::{MAX_CPUS, PAGE, Settings};

/// Most stretches of RAM kept from the memory map, and so most pieces of a region.
pub const MAX_PIECES: usize = 8;
/// End of the image: linker script, page tables and stacks lie below.
pub const IMAGE_END: u64 = 2 << 20;
/// Highest address the page tables can map; RAM above is left alone.
pub const MAPPED_END: u64 = 64 << 30;

/// A stretch of guest-physical memory in whole pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Memory that need not be contiguous, such as one around the hole below 4 GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    pieces: [Piece; MAX_PIECES],
    used: usize,
}

impl Region {
    /// Adds a stretch; false if it lies out of reach or there is no slot for it.
    pub fn add_ram(&mut self, start: u64, len: u64) -> bool {
        let end = start.saturating_add(len).min(MAPPED_END) / PAGE * PAGE;
        let start = start.max(IMAGE_END).next_multiple_of(PAGE);
        start < end && self.push(Piece { start, len: end - start })
    }

    fn push(&mut self, piece: Piece) -> bool {
        let Some(slot) = self.pieces.get_mut(self.used) else { return false };
        *slot = piece;
        self.used += 1;
        true
    }

    /// The stretches, in the order they were added.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces[..self.used]
    }

    /// Bytes in all stretches.
    pub fn len(&self) -> u64 {
        self.pieces().iter().map(|piece| piece.len).sum()
    }

    /// Address of every page.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pieces().iter().flat_map(|piece| (0..piece.len / PAGE).map(|i| piece.start + i * PAGE))
    }

    /// Address of the page that is `offset` bytes into the region.
    pub fn page_at(&self, mut offset: u64) -> Option<u64> {
        for piece in self.pieces() {
            if offset < piece.len {
                return Some(piece.start + offset);
            }
            offset -= piece.len;
        }
        None
    }

    /// Takes `len` bytes off the front of this free memory; `None` if there is less.
    fn take(&mut self, mut len: u64) -> Option<Region> {
        let mut taken = Region::default();
        for piece in &mut self.pieces[..self.used] {
            let part = piece.len.min(len);
            if part > 0 {
                taken.push(Piece { start: piece.start, len: part });
                piece.start += part;
                piece.len -= part;
                len -= part;
            }
        }
        (len == 0).then_some(taken)
    }
}

/// Where everything lies.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// Filled once, then only verified.
    pub fixed: Region,
    /// Rewritten every pass, one for each vCPU.
    pub hot: [Region; MAX_CPUS],
}

/// The settings ask for more memory than the map has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// Bytes the settings ask for.
    pub wanted: u64,
    /// Bytes of usable RAM above the image.
    pub usable: u64,
}

impl Plan {
    /// Static first, then one hot region a vCPU, lowest addresses first, above what is
    /// skipped.
    pub fn new(settings: &Settings, ram: Region) -> Result<Self, DoesNotFit> {
        let hot = u64::try_from(settings.cpus).unwrap_or(u64::MAX).saturating_mul(settings.hot);
        let wanted = settings.skip.saturating_add(settings.fixed).saturating_add(hot);
        let refusal = DoesNotFit { wanted, usable: ram.len() };
        let mut free = ram;
        free.take(settings.skip).ok_or(refusal)?;
        let mut plan = Self { fixed: free.take(settings.fixed).ok_or(refusal)?, ..Self::default() };
        for region in &mut plan.hot[..settings.cpus] {
            *region = free.take(settings.hot).ok_or(refusal)?;
        }
        Ok(plan)
    }
}
