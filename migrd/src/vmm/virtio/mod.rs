//! The virtio devices, and their transport: virtio-mmio (virtio 1.2, 4.2).
//!
//! Owns registers, queues, the devices' threads and what of them is saved. May
//! not touch KVM, but for eventfds that were connected to it elsewhere, nor any
//! file but those it was given. What a driver writes is believed only after it
//! was checked; what no driver may write is [`queue::QueueAbuse`] and ends the
//! guest.
//!
//! | file | owns |
//! |---|---|
//! | `device` | the trait that a kind of device implements |
//! | `mmio`, `registers` | the registers as the driver sees them |
//! | `queue`, `chain` | rings in guest memory, and what is found in them |
//! | `irq`, `space` | what vCPUs touch without waiting for a device |
//! | `gate` | whether devices may work |
//! | `thread` | the thread of each device |
//! | `blk`, `net`, `entropy`, `balloon` | the kinds |
//! | `slots` | the devices of one VM, and what is done to all of them |
//! | `snapshot` | what of a device travels |
//!
//! A device works in its own thread, one request after the other, and vCPUs
//! only touch registers, which nobody holds for long. So a disk that hangs
//! hangs its thread and nothing else.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod device;
pub mod entropy;
pub mod gate;
pub mod irq;
pub mod mmio;
pub mod net;
pub mod queue;
mod registers;
pub mod slots;
pub mod snapshot;
pub mod space;
pub mod thread;

pub use chain::{Buffers, Chain};
pub use device::{Device, Kind, StateError};
pub use gate::Gate;
pub use irq::Interrupt;
pub use mmio::Transport;
pub use queue::{Abuse, QueueAbuse, Turn};
pub use slots::{DeviceError, Slots};
pub use space::ConfigSpace;

#[cfg(test)]
mod tests;
