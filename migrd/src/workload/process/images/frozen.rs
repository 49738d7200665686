//! Memory that is not copied into an image: it stays in the processes, which stand
//! still, and is read there when it is sent.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::pages::PageBitmap;
use crate::units::{PAGE_SIZE, PageIndex, PageRun};

/// A process that stands still.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    /// Its number in the namespace of its tree.
    number: u32,
    /// Its memory: this one, also when another process has its number later.
    memory: File,
}

impl Process {
    /// The process that has `pid` now; its tree calls it `number`.
    ///
    /// # Errors
    /// When it is gone, or its memory may not be read.
    pub fn open(pid: u32, number: u32) -> io::Result<Self> {
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
        Ok(Self { pid, number, memory })
    }

    /// The same as [`Self::read`], also when it has stood still for so long that its number
    /// may be another's.
    ///
    /// # Errors
    /// When it is gone, or has nothing there.
    pub fn read_late(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(into, address)
    }

    /// Fills `into` with what it has at `address`.
    fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(address).map_err(io::Error::other)?;
        let length = into.len();
        let remote = [RemoteIoVec { base: from, len: length }];
        match process_vm_readv(self.pid, &mut [IoSliceMut::new(into)], &remote) {
            Ok(read) if read == length => Ok(()),
            // That call reads only what the process itself may.
            Ok(_) | Err(Errno::EFAULT) => self.memory.read_exact_at(into, address),
            Err(error) => Err(error.into()),
        }
    }
}

/// A part of an image that is in the memory of a process.
#[derive(Clone, Debug)]
struct Piece {
    /// Where in the image.
    offset: u64,
    length: u64,
    process: Arc<Process>,
    address: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// What of an image is in processes, in ascending order.
#[derive(Debug, Default)]
pub struct Frozen(RwLock<Vec<Piece>>);

impl Frozen {
    /// The next part: of `length` bytes at `offset` of the image, which is not before
    /// the end of the last.
    pub fn add(&self, offset: u64, length: u64, process: &Arc<Process>, address: u64) {
        let mut pieces = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match pieces.last_mut() {
            Some(last)
                if last.end() == offset
                    && last.address + last.length == address
                    && Arc::ptr_eq(&last.process, process) =>
            {
                last.length += length;
            }
            _ => pieces.push(Piece { offset, length, process: Arc::clone(process), address }),
        }
    }

    /// The pages of the image that are in processes.
    pub fn pages(&self, of: u64) -> PageBitmap {
        let pieces = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut pages = PageBitmap::none(of);
        for piece in pieces.iter() {
            let first = PageIndex(piece.offset / PAGE_SIZE);
            pages.insert(PageRun { first, count: piece.length / PAGE_SIZE });
        }
        pages
    }

    /// How much of it is in processes, in bytes.
    pub fn bytes(&self) -> u64 {
        let pieces = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pieces.iter().map(|piece| piece.length).sum()
    }

    /// Where they are: the number of a process, and the addresses from the first to the
    /// last of those that follow each other in the image.
    pub fn places(&self) -> Vec<(u32, Range<u64>)> {
        let pieces = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut places: Vec<(u32, Range<u64>)> = Vec::new();
        let mut next = 0;
        for Piece { offset, length, process, address } in pieces.iter() {
            let end = address + length;
            match places.last_mut() {
                Some((number, range))
                    if *offset == next && *number == process.number && range.end <= *address =>
                {
                    range.end = end;
                }
                _ => places.push((process.number, *address..end)),
            }
            next = offset + length;
        }
        places
    }

    /// Whether anything from `offset` on, of `length` bytes, is in a process.
    pub fn has(&self, offset: u64, length: u64) -> bool {
        let pieces = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let next = pieces.partition_point(|piece| piece.end() <= offset);
        pieces.get(next).is_some_and(|piece| piece.offset < offset + length)
    }

    /// Fills `into` with what the image has at `offset`; `file` fills a part that is in
    /// no process, at its own offset.
    ///
    /// # Errors
    /// When a process is gone, or what `file` says.
    pub fn read(
        &self,
        mut offset: u64,
        mut into: &mut [u8],
        file: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while !into.is_empty() {
            let (piece, length) = self.at(offset, into.len() as u64);
            let (now, rest) = into.split_at_mut(usize::try_from(length).unwrap_or(usize::MAX));
            match piece {
                Some(Piece { process, address, .. }) => process.read(address, now)?,
                None => file(offset, now)?,
            }
            offset += length;
            into = rest;
        }
        Ok(())
    }

    /// What is at `offset`, and how many of the next `length` bytes are of the same: a
    /// piece that begins just there, or none.
    fn at(&self, offset: u64, length: u64) -> (Option<Piece>, u64) {
        let pieces = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let next = pieces.partition_point(|piece| piece.end() <= offset);
        match pieces.get(next) {
            Some(piece) if piece.offset <= offset => {
                let within = offset - piece.offset;
                let address = piece.address + within;
                let count = length.min(piece.length - within);
                (Some(Piece { offset, address, ..piece.clone() }), count)
            }
            Some(piece) => (None, length.min(piece.offset - offset)),
            None => (None, length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads this test's own memory.
    fn this() -> Arc<Process> {
        Arc::new(Process::open(std::process::id(), 1).unwrap())
    }

    #[test]
    fn an_image_is_put_together_of_memory_and_file() {
        let (first, second) = (vec![1_u8; 100], vec![2_u8; 50]);
        let process = this();
        let frozen = Frozen::default();
        let at = |bytes: &Vec<u8>| bytes.as_ptr() as u64;
        frozen.add(10, 60, &process, at(&first));
        frozen.add(70, 40, &process, at(&first) + 60);
        frozen.add(120, 50, &process, at(&second));
        assert_eq!(frozen.0.read().unwrap().len(), 2, "what follows on is one piece");
        let mut image = vec![0; 200];
        frozen
            .read(0, &mut image, |offset, into| {
                assert!([(0, 10), (110, 10), (170, 30)].contains(&(offset, into.len())));
                into.fill(9);
                Ok(())
            })
            .unwrap();
        let count = |value| image.iter().filter(|byte| **byte == value).count();
        assert_eq!((count(1), count(2), count(9)), (100, 50, 50));
        assert_eq!((image[10], image[109], image[110], image[120], image[169]), (1, 1, 9, 2, 2));
        let mut middle = vec![0; 20];
        let nines = |_, into: &mut [u8]| {
            into.fill(9);
            Ok(())
        };
        frozen.read(100, &mut middle, nines).unwrap();
        assert_eq!(middle, [vec![1; 10], vec![9; 10]].concat());
        let has = |offset, length| frozen.has(offset, length);
        assert!(!has(0, 10) && has(0, 11) && has(109, 1) && !has(110, 10) && has(115, 6));
        assert!(!has(170, 1000));
    }

    #[test]
    fn what_follows_on_in_the_image_is_one_place_whatever_is_between() {
        let (one, other) = (this(), Arc::new(Process::open(std::process::id(), 2).unwrap()));
        let frozen = Frozen::default();
        frozen.add(0, 8192, &one, 0x1000);
        frozen.add(8192, 4096, &one, 0x9000);
        // Between these is a page of the image that is in no process.
        frozen.add(16384, 4096, &one, 0xc000);
        frozen.add(20480, 4096, &other, 0xe000);
        assert_eq!(
            frozen.places(),
            [(1, 0x1000..0xa000), (1, 0xc000..0xd000), (2, 0xe000..0xf000)]
        );
        let pages = frozen.pages(8);
        let there: Vec<u64> = (0..8).filter(|page| pages.contains(PageIndex(*page))).collect();
        assert_eq!(there, [0, 1, 2, 4, 5]);
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let frozen = Frozen::default();
        frozen.add(0, 4096, &this(), 4096);
        let read = frozen.read(0, &mut [0; 16], |_, _| Ok(()));
        assert!(read.is_err());
    }
}
