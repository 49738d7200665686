//! A source of random numbers (virtio 1.2, 5.4), so that a guest does not wait
//! for some at its start.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use migr_proto::v1 as proto;
use migr_proto::v1::virtio_state;

use super::device::{Device, Kind, StateError};
use super::queue::{QueueAbuse, Turn};
use super::space::ConfigSpace;
use crate::sys;

/// Most bytes that one request gets; a driver that wants more asks again.
const REQUEST_BYTES: usize = 64 * 1024;
/// Bytes that the kernel gives at once, whole.
const PIECE_BYTES: usize = 256;

/// The device.
#[derive(Debug)]
pub struct Entropy {
    space: Arc<ConfigSpace>,
}

impl Default for Entropy {
    fn default() -> Self {
        Self { space: Arc::new(ConfigSpace::new(Vec::new(), 0..0)) }
    }
}

impl Device for Entropy {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn space(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.space)
    }

    fn serve(&mut self, queue: usize, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        while let Some(mut chain) = turn.pop(queue)? {
            let mut written = 0;
            let mut piece = [0; PIECE_BYTES];
            while written < REQUEST_BYTES && chain.writable.length() > 0 {
                // The kernel's source is there from its start on; if it fails
                // all the same, the driver gets less.
                if sys::random(&mut piece).is_err() {
                    break;
                }
                let put = chain.writable.write(turn.memory, &piece);
                written += put.map_err(|abuse| QueueAbuse { queue, abuse })?;
            }
            turn.push(queue, &chain, u32::try_from(written).unwrap_or(u32::MAX))?;
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

    fn reset(&mut self) {}

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
        virtio_state::Kind::Entropy(proto::EntropyState {})
    }

    fn restore(&mut self, state: &virtio_state::Kind) -> Result<(), StateError> {
        match state {
            virtio_state::Kind::Entropy(proto::EntropyState {}) => Ok(()),
            _ => Err(StateError("its state is not that of an entropy source".into())),
        }
    }
}
