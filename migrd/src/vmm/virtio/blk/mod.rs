//! A disk (virtio 1.2, 5.2).
//!
//! Nothing is cached here: a write is a write to the file, a flush is
//! `fdatasync`. What the file refuses becomes an I/O error of that request, and
//! both guest and VMM live.

pub mod log;
mod request;
pub mod volume;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;
use std::time::Instant;

use migr_proto::v1 as proto;
use migr_proto::v1::virtio_state;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use super::chain::Buffers;
use super::device::{Device, Kind, StateError};
use super::queue::{QueueAbuse, Turn};
use super::space::ConfigSpace;
use crate::sys::vm::Memory;
use log::DiskLog;
use request::{Order, Request, SECTOR_BYTES};
use volume::Volume;

const QUEUE_SIZE: u16 = 256;
/// Pieces of memory in one request: header and status take the other two.
const SEGMENTS: u32 = 254;
/// Bytes that go to or from the file in one system call.
const PIECE_BYTES: u64 = 1 << 20;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const READ_ONLY: u64 = 1 << VIRTIO_BLK_F_RO;

/// The configuration space (5.2.4): its length, and where in it is what.
const SPACE_BYTES: usize = 60;
const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    index: usize,
    bytes: u64,
    read_only: bool,
    volume: Option<Box<dyn Volume>>,
    /// A sync that the guest did not ask for has failed, and its next flush
    /// says so: the system says it only once.
    sync_failed: bool,
    /// The same, for who closes the disk.
    failed_standing: bool,
    space: Arc<ConfigSpace>,
    log: Arc<DiskLog>,
}

/// How a request ended.
enum Outcome {
    Done,
    /// Done, and so many bytes of data were written to the guest.
    Filled(u64),
    Failed,
    Unsupported,
}

impl Disk {
    /// Disk `index` of a VM, of so many bytes. Nothing is behind it yet.
    #[must_use]
    pub fn new(index: usize, bytes: u64, read_only: bool) -> Self {
        let space = ConfigSpace::new(vec![0; SPACE_BYTES], 0..0);
        space.change(CAPACITY, &(bytes / SECTOR_BYTES).to_le_bytes());
        space.change(SEG_MAX, &SEGMENTS.to_le_bytes());
        space.change(BLK_SIZE, &512_u32.to_le_bytes());
        space.set_generation(0);
        let (space, log) = (Arc::new(space), Arc::new(DiskLog::new(bytes)));
        Self {
            index,
            bytes,
            read_only,
            volume: None,
            sync_failed: false,
            failed_standing: false,
            space,
            log,
        }
    }

    /// What of it was written.
    #[must_use]
    pub fn log(&self) -> Arc<DiskLog> {
        Arc::clone(&self.log)
    }

    /// Puts something behind it.
    pub fn put(&mut self, volume: Box<dyn Volume>) {
        self.volume = Some(volume);
    }

    fn execute(&mut self, order: Order, turn: &Turn<'_>) -> Outcome {
        let done = match order {
            Order::Read { sector, into } => {
                let length = into.length();
                return match self.read(sector, into, turn.memory) {
                    Ok(()) => Outcome::Filled(length),
                    Err(_) => Outcome::Failed,
                };
            }
            Order::Write { sector, from } => {
                let written = self.write(sector, from, turn.memory);
                // Without flushes a write that is done must last (5.2.6.2).
                let lasts = turn.features & FLUSH != 0;
                if lasts { written } else { written.and_then(|()| self.sync()) }
            }
            Order::Flush => self.sync(),
            Order::Name { mut into } => {
                let mut name = format!("migr-disk-{}", self.index).into_bytes();
                name.resize(usize::try_from(VIRTIO_BLK_ID_BYTES).unwrap_or(20), 0);
                return match into.write(turn.memory, &name) {
                    Ok(length) => Outcome::Filled(length as u64),
                    Err(_) => Outcome::Failed,
                };
            }
            Order::Unknown => return Outcome::Unsupported,
        };
        if done.is_ok() { Outcome::Done } else { Outcome::Failed }
    }

    /// The offset in bytes of a request that is on the disk.
    fn place(&self, sector: u64, length: u64) -> io::Result<u64> {
        let offset = sector.checked_mul(SECTOR_BYTES);
        let end = offset.and_then(|offset| offset.checked_add(length));
        match offset {
            Some(offset)
                if length.is_multiple_of(SECTOR_BYTES)
                    && end.is_some_and(|end| end <= self.bytes) =>
            {
                Ok(offset)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn volume(&self) -> io::Result<&dyn Volume> {
        self.volume.as_deref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn read(&self, sector: u64, into: Buffers, memory: &Memory) -> io::Result<()> {
        let offset = self.place(sector, into.length())?;
        let volume = self.volume()?;
        pieces(offset, into, |at, piece| {
            volume.read_at(at, &piece.slices(memory).map_err(io::Error::other)?)
        })
    }

    fn write(&self, sector: u64, from: Buffers, memory: &Memory) -> io::Result<()> {
        let length = from.length();
        let offset = self.place(sector, length)?;
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let volume = self.volume()?;
        let written = pieces(offset, from, |at, piece| {
            volume.write_at(at, &piece.slices(memory).map_err(io::Error::other)?)
        });
        // All of it, also when it failed in the middle.
        self.log.wrote(offset, length);
        written
    }

    fn sync_volume(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.volume()?.sync() }
    }

    fn sync(&mut self) -> io::Result<()> {
        let synced = self.sync_volume();
        if std::mem::take(&mut self.sync_failed) {
            return Err(io::Error::other("an earlier write could not be made to last"));
        }
        synced
    }
}

/// Does `work` with one piece after the other until all bytes are through.
fn pieces(
    mut offset: u64,
    mut buffers: Buffers,
    work: impl Fn(u64, &Buffers) -> io::Result<usize>,
) -> io::Result<()> {
    while buffers.length() > 0 {
        let mut piece = buffers.split_front(PIECE_BYTES);
        while piece.length() > 0 {
            match work(offset, &piece) {
                // The file is shorter than it was.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => {
                    piece.split_front(done as u64);
                    offset += done as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

impl Device for Disk {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let read_only = if self.read_only { READ_ONLY } else { 0 };
        FLUSH | (1 << VIRTIO_BLK_F_SEG_MAX) | (1 << VIRTIO_BLK_F_BLK_SIZE) | read_only
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn space(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.space)
    }

    fn serve(&mut self, queue: usize, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        let at = |abuse| QueueAbuse { queue, abuse };
        while let Some(chain) = turn.pop(queue)? {
            let Request { order, mut status } = Request::parse(turn.memory, &chain).map_err(at)?;
            let data = chain.writable.length() - status.length();
            // What was written to the guest counts from its first buffer on, and
            // the status is the last (virtio 1.2, 2.7.8.2).
            let (code, written) = match self.execute(order, turn) {
                Outcome::Filled(length) if length == data => (VIRTIO_BLK_S_OK, length + 1),
                Outcome::Filled(length) => (VIRTIO_BLK_S_OK, length),
                Outcome::Done => (VIRTIO_BLK_S_OK, u64::from(data == 0)),
                Outcome::Failed => (VIRTIO_BLK_S_IOERR, u64::from(data == 0)),
                Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, u64::from(data == 0)),
            };
            let code = u8::try_from(code).unwrap_or(u8::MAX);
            status.write(turn.memory, &[code]).map_err(at)?;
            turn.push(queue, &chain, u32::try_from(written).unwrap_or(u32::MAX))?;
            // The next request may take long.
            turn.signal(queue)?;
        }
        Ok(())
    }

    fn source(&self) -> Option<Arc<File>> {
        None
    }

    fn source_ready(&mut self, _: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn timer(&mut self, _: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        Ok(())
    }

    fn resume(&mut self, _: bool, _: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        Ok(())
    }

    /// Makes what was written last, so that to let go of the disk takes no
    /// time, and a disk that can't write any more is found while the guest runs.
    fn stand(&mut self) {
        if self.volume.is_some() && self.sync_volume().is_err() {
            self.sync_failed = true;
            self.failed_standing = true;
        }
    }

    fn reset(&mut self) {}

    fn attach(&mut self, mut backing: File) -> io::Result<()> {
        let length = backing.seek(SeekFrom::End(0))?;
        if length < self.bytes {
            return Err(io::Error::other(format!(
                "the image has {length} bytes and the disk {}: it was cut short, or it is another",
                self.bytes
            )));
        }
        self.put(Box::new(backing));
        Ok(())
    }

    fn attached(&self) -> bool {
        self.volume.is_some()
    }

    fn detach(&mut self) -> io::Result<()> {
        if self.volume.is_none() {
            return Ok(());
        }
        // Kept when it fails: the guest may go on here, and its next flush fails.
        let synced = self.sync_volume();
        self.sync_failed |= synced.is_err();
        synced?;
        if std::mem::take(&mut self.failed_standing) {
            return Err(io::Error::other("an earlier write could not be made to last"));
        }
        self.volume = None;
        Ok(())
    }

    fn save(&self) -> virtio_state::Kind {
        virtio_state::Kind::Block(proto::BlockState { sync_failed: self.sync_failed })
    }

    fn restore(&mut self, state: &virtio_state::Kind) -> Result<(), StateError> {
        match state {
            virtio_state::Kind::Block(proto::BlockState { sync_failed }) => {
                self.sync_failed = *sync_failed;
                Ok(())
            }
            _ => Err(StateError("its state is not that of a disk".into())),
        }
    }
}
