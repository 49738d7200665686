//! What a kind of device must be able to do.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use migr_proto::v1::virtio_state;

use super::queue::{QueueAbuse, Turn};
use super::space::ConfigSpace;

/// The kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network interface.
    Net,
    /// A disk.
    Block,
    /// A source of random numbers.
    Entropy,
    /// A memory balloon.
    Balloon,
}

impl Kind {
    /// The number that a driver knows it by (virtio 1.2, 5).
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Entropy => 4,
            Self::Balloon => 5,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Net => "network",
            Self::Block => "disk",
            Self::Entropy => "entropy",
            Self::Balloon => "balloon",
        })
    }
}

/// A saved state that no device of its kind can have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// One kind of virtio device, without its transport. It is used by one thread
/// at a time: the device's own, but for what is said to be called by others,
/// and that only while the device stands.
///
/// No method may wait for anything but the file behind the device. Of what it
/// has to do it does one request after the other, each taken by [`Turn::pop`],
/// which gives none any more when the device shall stand.
pub trait Device: Send + fmt::Debug {
    /// Which kind it is.
    fn kind(&self) -> Kind;

    /// The feature bits that are its kind's own (0 to 23 and from 50 on); the
    /// transport adds those of queues and transport.
    fn features(&self) -> u64;

    /// The most descriptors of each of its queues, powers of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Its configuration space, which vCPUs access without asking it.
    fn space(&self) -> Arc<ConfigSpace>;

    /// The driver has put something into `queue`, or may have.
    ///
    /// # Errors
    /// When the driver did there what no driver may.
    fn serve(&mut self, queue: usize, turn: &mut Turn<'_>) -> Result<(), QueueAbuse>;

    /// What it waits for besides its driver: a file that becomes readable.
    /// `None` while it has no use for what comes.
    fn source(&self) -> Option<Arc<File>>;

    /// Its source has become readable.
    ///
    /// # Errors
    /// When the driver did in a queue what no driver may.
    fn source_ready(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueAbuse>;

    /// When it wants [`Self::timer`] to be called.
    fn deadline(&self) -> Option<Instant>;

    /// Its deadline has passed.
    ///
    /// # Errors
    /// When the driver did in a queue what no driver may.
    fn timer(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueAbuse>;

    /// It may work, having stood. `restored`: for the first time after it was
    /// restored. Every queue is served right after this.
    ///
    /// # Errors
    /// When the driver did in a queue what no driver may.
    fn resume(&mut self, restored: bool, turn: &mut Turn<'_>) -> Result<(), QueueAbuse>;

    /// It is about to stand: it finishes what it has begun.
    fn stand(&mut self);

    /// The driver has reset it. Called by a vCPU's thread.
    fn reset(&mut self);

    /// Takes what is behind it. Called by the control thread.
    ///
    /// # Errors
    /// When it is not what the device was made for.
    fn attach(&mut self, backing: File) -> io::Result<()>;

    /// Whether it has what it needs to work.
    fn attached(&self) -> bool;

    /// Of a disk: closes what is behind it, with all writes on it. Nothing else
    /// has anything to do here. Called by the control thread.
    ///
    /// # Errors
    /// When not all writes could be made to last.
    fn detach(&mut self) -> io::Result<()>;

    /// What travels of it. Called by the control thread.
    fn save(&self) -> virtio_state::Kind;

    /// Becomes what was saved. Called by the control thread.
    ///
    /// # Errors
    /// When that is of another kind, or says what no device can be.
    fn restore(&mut self, state: &virtio_state::Kind) -> Result<(), StateError>;
}
