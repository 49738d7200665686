//! Descriptor chains (virtio 1.2, 2.7.5): checked whole before any of it is
//! used, because what the driver wrote may be anything.

use std::collections::VecDeque;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::queue::Abuse;
use crate::sys::vm::{Memory, Slice};

/// Bytes of a descriptor in guest memory.
const DESCRIPTOR_BYTES: u32 = 16;

/// A piece of guest memory, known to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address of its first byte.
    pub address: GuestAddress,
    /// Its length in bytes, at least one.
    pub length: u32,
}

/// Pieces of guest memory, used up from the front.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    list: VecDeque<Buffer>,
    length: u64,
}

impl Buffers {
    fn push(&mut self, buffer: Buffer) {
        self.length += u64::from(buffer.length);
        self.list.push_back(buffer);
    }

    /// Bytes in all of them.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The pieces, in order.
    pub fn iter(&self) -> impl Iterator<Item = Buffer> {
        self.list.iter().copied()
    }

    /// Takes up to `bytes` off the front.
    pub fn split_front(&mut self, bytes: u64) -> Self {
        let mut front = Self::default();
        while let Some(first) = self.list.front_mut() {
            let left = bytes - front.length;
            if left == 0 {
                break;
            }
            let take = u32::try_from(left).unwrap_or(u32::MAX).min(first.length);
            front.push(Buffer { address: first.address, length: take });
            self.length -= u64::from(take);
            if take == first.length {
                self.list.pop_front();
            } else {
                first.address.0 += u64::from(take);
                first.length -= take;
            }
        }
        front
    }

    /// Takes the last `bytes`, or all if there are fewer.
    pub fn split_back(&mut self, bytes: u64) -> Self {
        let front = self.split_front(self.length.saturating_sub(bytes));
        std::mem::replace(self, front)
    }

    /// Copies from the front, which is used up; says how much.
    ///
    /// # Errors
    /// When the memory is not there, which it was when the chain was checked.
    pub fn read(&mut self, memory: &Memory, into: &mut [u8]) -> Result<usize, Abuse> {
        let mut done = 0;
        for piece in self.split_front(into.len() as u64).iter() {
            let end = done + bytes_of(piece)?;
            let part = into.get_mut(done..end).ok_or(Abuse::outside(piece))?;
            memory.read_slice(part, piece.address).map_err(|_| Abuse::outside(piece))?;
            done = end;
        }
        Ok(done)
    }

    /// Copies to the front, which is used up; says how much had room.
    ///
    /// # Errors
    /// When the memory is not there, which it was when the chain was checked.
    pub fn write(&mut self, memory: &Memory, from: &[u8]) -> Result<usize, Abuse> {
        let mut done = 0;
        for piece in self.split_front(from.len() as u64).iter() {
            let end = done + bytes_of(piece)?;
            let part = from.get(done..end).ok_or(Abuse::outside(piece))?;
            memory.write_slice(part, piece.address).map_err(|_| Abuse::outside(piece))?;
            done = end;
        }
        Ok(done)
    }

    /// The memory itself, for a system call that reads or fills it.
    ///
    /// # Errors
    /// When the memory is not there, which it was when the chain was checked.
    pub fn slices<'m>(&self, memory: &'m Memory) -> Result<Vec<Slice<'m>>, Abuse> {
        let mut slices = Vec::with_capacity(self.list.len());
        for piece in self.iter() {
            for slice in memory.get_slices(piece.address, bytes_of(piece)?) {
                let slice: VolatileSlice<'m, _> = slice.map_err(|_| Abuse::outside(piece))?;
                slices.push(slice);
            }
        }
        Ok(slices)
    }
}

fn bytes_of(piece: Buffer) -> Result<usize, Abuse> {
    usize::try_from(piece.length).map_err(|_| Abuse::outside(piece))
}

/// One request of a driver: what the device may read, and what it may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    /// What the driver says.
    pub readable: Buffers,
    /// Where the device answers.
    pub writable: Buffers,
}

impl Chain {
    /// The number by which driver and device speak of it.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The chain that begins at descriptor `head` of a table of `size`.
    ///
    /// # Errors
    /// When it is none that a driver may make.
    pub(super) fn parse(
        memory: &Memory,
        table: GuestAddress,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<Self, Abuse> {
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut walk = Walk { table, length: size, left: size };
        let mut next = Some(head);
        let mut nested = false;
        while let Some(index) = next {
            let descriptor = walk.descriptor(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                if nested || !indirect || descriptor.has_next() {
                    return Err(Abuse::Indirect);
                }
                nested = true;
                walk = Walk::indirect(memory, descriptor, size)?;
                next = Some(0);
                continue;
            }
            chain.add(memory, descriptor)?;
            next = descriptor.has_next().then(|| descriptor.next());
        }
        Ok(chain)
    }

    fn add(&mut self, memory: &Memory, descriptor: Descriptor) -> Result<(), Abuse> {
        let buffer = Buffer { address: descriptor.addr(), length: descriptor.len() };
        if !descriptor.is_write_only() && !self.writable.list.is_empty() {
            return Err(Abuse::Order);
        }
        let total = self.readable.length + self.writable.length + u64::from(buffer.length);
        if total > u64::from(u32::MAX) {
            return Err(Abuse::TooMuch);
        }
        check(memory, buffer)?;
        if buffer.length == 0 {
            return Ok(());
        }
        if descriptor.is_write_only() {
            self.writable.push(buffer);
        } else {
            self.readable.push(buffer);
        }
        Ok(())
    }
}

fn check(memory: &Memory, buffer: Buffer) -> Result<(), Abuse> {
    if memory.check_range(buffer.address, bytes_of(buffer)?) {
        Ok(())
    } else {
        Err(Abuse::outside(buffer))
    }
}

/// A descriptor table, on the way along a chain in it.
struct Walk {
    table: GuestAddress,
    length: u16,
    /// Descriptors that may still come: as many as a chain may have (virtio
    /// 1.2, 2.7.5.3.1), so that one that bites its tail comes to an end.
    left: u16,
}

impl Walk {
    fn indirect(memory: &Memory, of: Descriptor, most: u16) -> Result<Self, Abuse> {
        let length = of.len() / DESCRIPTOR_BYTES;
        let whole = of.len().is_multiple_of(DESCRIPTOR_BYTES) && length > 0;
        let length = u16::try_from(length).ok().filter(|_| whole).ok_or(Abuse::Indirect)?;
        check(memory, Buffer { address: of.addr(), length: of.len() })?;
        Ok(Self { table: of.addr(), length, left: most })
    }

    fn descriptor(&mut self, memory: &Memory, index: u16) -> Result<Descriptor, Abuse> {
        if index >= self.length {
            return Err(Abuse::Descriptor { index, length: self.length });
        }
        self.left = self.left.checked_sub(1).ok_or(Abuse::TooLong)?;
        let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
        let place = Buffer { address: self.table, length: DESCRIPTOR_BYTES };
        let at = self.table.0.checked_add(offset).ok_or(Abuse::outside(place))?;
        memory.read_obj(GuestAddress(at)).map_err(|_| Abuse::outside(place))
    }
}
