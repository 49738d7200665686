//! A request to a disk (virtio 1.2, 5.2.6), taken apart and checked.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::sys::vm::Memory;
use crate::vmm::virtio::chain::{Buffers, Chain};
use crate::vmm::virtio::queue::Abuse;

/// Bytes of a sector, in which requests count whatever the disk's block size.
pub const SECTOR_BYTES: u64 = 512;

const HEADER_BYTES: usize = 16;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// To read from this sector on.
    Read {
        /// The first sector.
        sector: u64,
        /// Where to.
        into: Buffers,
    },
    /// To write from this sector on.
    Write {
        /// The first sector.
        sector: u64,
        /// What.
        from: Buffers,
    },
    /// To make all writes last.
    Flush,
    /// The disk's name.
    Name {
        /// Where to.
        into: Buffers,
    },
    /// Something that was not offered.
    Unknown,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub order: Order,
    /// The byte for the answer.
    pub status: Buffers,
}

impl Request {
    /// Takes `chain` apart.
    ///
    /// # Errors
    /// When it is none that a driver may make.
    pub fn parse(memory: &Memory, chain: &Chain) -> Result<Self, Abuse> {
        let (mut readable, mut writable) = (chain.readable.clone(), chain.writable.clone());
        let mut header = [0; HEADER_BYTES];
        if readable.read(memory, &mut header)? < HEADER_BYTES {
            return Err(Abuse::Short("its header"));
        }
        let status = writable.split_back(1);
        if status.length() == 0 {
            return Err(Abuse::Short("its status"));
        }
        // Type, then four bytes of no meaning, then the sector.
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let order = match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN if readable.length() > 0 => {
                return Err(Abuse::Direction("the data to be read"));
            }
            VIRTIO_BLK_T_IN => Order::Read { sector, into: writable },
            VIRTIO_BLK_T_OUT if writable.length() > 0 => {
                return Err(Abuse::Direction("the data to be written"));
            }
            VIRTIO_BLK_T_OUT => Order::Write { sector, from: readable },
            VIRTIO_BLK_T_FLUSH => Order::Flush,
            VIRTIO_BLK_T_GET_ID => Order::Name { into: writable },
            _ => Order::Unknown,
        };
        Ok(Self { order, status })
    }
}
