//! A memory balloon (virtio 1.2, 5.5). It asks for nothing by itself; what the
//! guest reports as free goes back to the host, and is not sent when the guest
//! moves.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use migr_proto::v1 as proto;
use migr_proto::v1::virtio_state;
use vm_memory::GuestAddress;

use super::chain::Chain;
use super::device::{Device, Kind, StateError};
use super::queue::{QueueAbuse, Turn};
use super::space::ConfigSpace;
use crate::units::PAGE_SIZE;

/// Feature bits (5.5.3): the guest may take pages back when it is short of
/// memory; and it says which pages it does not use.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

/// Queues (5.5.2). Of the three last ones the driver has only that for
/// reports, as no more is offered; which number it gives it depends on whether
/// it counts queues that it has not, so all are there and mean the same.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const QUEUES: [u16; 5] = [128; 5];

/// Offsets in the configuration space (5.5.4): what the device asks for, and
/// what the driver says it gave, in pages of 4 KiB.
const PAGES: usize = 0;
const ACTUAL: usize = 4;
const SPACE_BYTES: usize = 16;

/// Page numbers that are read at once.
const NUMBERS: usize = 256;

/// The device.
#[derive(Debug)]
pub struct Balloon {
    space: Arc<ConfigSpace>,
}

impl Default for Balloon {
    fn default() -> Self {
        let space = ConfigSpace::new(vec![0; SPACE_BYTES], ACTUAL..ACTUAL + 4);
        Self { space: Arc::new(space) }
    }
}

impl Balloon {
    /// Takes the pages whose numbers (32 bits each) are in a request.
    fn inflate(chain: &mut Chain, turn: &Turn<'_>) -> Result<(), QueueAbuse> {
        let at = |abuse| QueueAbuse { queue: INFLATE, abuse };
        let mut bytes = [0; NUMBERS * 4];
        loop {
            let read = chain.readable.read(turn.memory, &mut bytes).map_err(at)?;
            let given = bytes.get(..read).unwrap_or_default().as_chunks::<4>().0;
            if given.is_empty() {
                return Ok(());
            }
            let mut numbers: Vec<u64> =
                given.iter().map(|number| u32::from_le_bytes(*number).into()).collect();
            numbers.sort_unstable();
            // In as few pieces as they make.
            for run in numbers.chunk_by(|one, next| next - one <= 1) {
                if let (Some(first), Some(last)) = (run.first(), run.last()) {
                    let length = (last - first + 1) * PAGE_SIZE;
                    turn.free(GuestAddress(first * PAGE_SIZE), length).map_err(at)?;
                }
            }
        }
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUES
    }

    fn space(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.space)
    }

    fn serve(&mut self, queue: usize, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        while let Some(mut chain) = turn.pop(queue)? {
            match queue {
                INFLATE => Self::inflate(&mut chain, turn)?,
                // The driver may use them at once: their memory comes back by
                // itself.
                DEFLATE => {}
                _ => {
                    for free in chain.writable.iter() {
                        let freed = turn.free(free.address, free.length.into());
                        freed.map_err(|abuse| QueueAbuse { queue, abuse })?;
                    }
                }
            }
            turn.push(queue, &chain, 0)?;
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

    fn stand(&mut self) {}

    fn reset(&mut self) {
        self.space.change(PAGES, &[0; SPACE_BYTES]);
    }

    fn attach(&mut self, _: File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn attached(&self) -> bool {
        true
    }

    fn detach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn save(&self) -> virtio_state::Kind {
        let (pages, actual) = (self.space.word(PAGES), self.space.word(ACTUAL));
        virtio_state::Kind::Balloon(proto::BalloonState { pages, actual })
    }

    fn restore(&mut self, state: &virtio_state::Kind) -> Result<(), StateError> {
        let virtio_state::Kind::Balloon(proto::BalloonState { pages, actual }) = *state else {
            return Err(StateError("its state is not that of a balloon".into()));
        };
        self.space.change(PAGES, &pages.to_le_bytes());
        self.space.change(ACTUAL, &actual.to_le_bytes());
        Ok(())
    }
}
