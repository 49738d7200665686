//! A device's queues (virtio 1.2, 2.7), as its driver fills them and as the
//! device empties them.

use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_queue::{Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::chain::{Buffer, Chain};
use super::gate::Gate;
use super::irq::{self, Interrupt};
use crate::sys::vm::{Memory, free};
use crate::units::PAGE_SIZE;

/// What no driver may do in a queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Abuse {
    /// A ring that is not where a ring can be.
    #[error("its rings are not usable: {0}")]
    Rings(String),
    /// More requests than the ring holds.
    #[error("its available ring jumped further than it is long")]
    Jump,
    /// A descriptor that is not in its table.
    #[error("it names descriptor {index} of a table of {length}")]
    Descriptor {
        /// Which.
        index: u16,
        /// How many there are.
        length: u16,
    },
    /// A loop, or more descriptors than the queue has.
    #[error("a chain has more descriptors than the queue, or bites its tail")]
    TooLong,
    /// More bytes than a chain may have.
    #[error("a chain has more than 4 GiB")]
    TooMuch,
    /// Memory that the guest does not have.
    #[error("{length} bytes at {address:#x} are not in the guest's memory")]
    Outside {
        /// Guest-physical.
        address: u64,
        /// In bytes.
        length: u32,
    },
    /// What the device reads comes after what it writes.
    #[error("a chain has a buffer to read behind one to write")]
    Order,
    /// An indirect table where none may be, or none that can be one.
    #[error("an indirect descriptor is not allowed or not valid")]
    Indirect,
    /// A request that lacks a part.
    #[error("a request without room for {0}")]
    Short(&'static str),
    /// A buffer that the device may write where it wants to read, or the other
    /// way round.
    #[error("a request with a buffer of the wrong direction for {0}")]
    Direction(&'static str),
}

impl Abuse {
    pub(super) fn outside(buffer: Buffer) -> Self {
        Self::Outside { address: buffer.address.0, length: buffer.length }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::InvalidAvailRingIndex => Self::Jump,
            other => Self::Rings(other.to_string()),
        }
    }
}

/// An abuse, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {queue}: {abuse}")]
pub struct QueueAbuse {
    /// Number of the queue.
    pub queue: usize,
    /// What was done there.
    #[source]
    pub abuse: Abuse,
}

/// A queue as the driver has set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Number of descriptors.
    pub size: u16,
    /// The driver says that the rest is set.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring, which the driver writes.
    pub available: u64,
    /// Guest-physical address of the used ring, which the device writes.
    pub used: u64,
}

/// How far device and driver have come in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The next entry of the available ring.
    pub available: u16,
    /// The next entry of the used ring.
    pub used: u16,
}

/// A queue in use: `None` where the driver has set up none.
pub(super) type Rings = Option<Queue>;

/// Takes a queue into use.
///
/// # Errors
/// When it is not where a queue can be.
pub(super) fn rings(
    memory: &Memory,
    max_size: u16,
    setup: Setup,
    at: Position,
    event_idx: bool,
) -> Result<Rings, Abuse> {
    if !setup.ready {
        return Ok(None);
    }
    let state = QueueState {
        max_size,
        next_avail: at.available,
        next_used: at.used,
        event_idx_enabled: event_idx,
        size: setup.size,
        ready: setup.ready,
        desc_table: setup.descriptors,
        avail_ring: setup.available,
        used_ring: setup.used,
    };
    let queue = Queue::try_from(state).map_err(|e| Abuse::of(&e))?;
    // With room for the event indices; sizes as in virtio 1.2, 2.7.
    let size = u32::from(setup.size);
    let parts = [
        (setup.descriptors, 16 * size),
        (setup.available, 6 + 2 * size),
        (setup.used, 6 + 8 * size),
    ];
    for (address, length) in parts {
        let bytes = usize::try_from(length).unwrap_or(usize::MAX);
        if address == 0 || !memory.check_range(GuestAddress(address), bytes) {
            return Err(Abuse::Rings(Abuse::Outside { address, length }.to_string()));
        }
    }
    Ok(Some(queue))
}

/// What a device works with, each time that it works.
#[derive(Debug)]
pub struct Turn<'a> {
    /// The guest's memory.
    pub memory: &'a Memory,
    /// The features that driver and device have agreed on; 0 before they have.
    pub features: u64,
    pub(super) queues: &'a mut [Rings],
    pub(super) interrupt: &'a Interrupt,
    pub(super) gate: &'a Gate,
    /// Somebody waits for the device to put its work down.
    pub(super) wanted: &'a AtomicUsize,
    /// Requests answered since the driver was last interrupted, a queue each.
    pub(super) answered: u64,
}

impl Turn<'_> {
    /// Whether the device shall take nothing more for now. It is asked again
    /// later, about every queue.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.gate.is_closed() || self.wanted.load(Ordering::SeqCst) > 0
    }

    /// Whether the driver has said that the device may work.
    #[must_use]
    pub fn driver_is_ready(&self) -> bool {
        self.queues.iter().any(Option::is_some)
    }

    /// The next request of a queue. `None`: there is none now, and the driver
    /// will ring when there is; or the turn is over.
    ///
    /// # Errors
    /// When the driver did there what no driver may.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, QueueAbuse> {
        let at = |abuse| QueueAbuse { queue, abuse };
        let (memory, features) = (self.memory, self.features);
        loop {
            if self.is_over() {
                return Ok(None);
            }
            let Some(rings) = self.rings(queue) else { return Ok(None) };
            let head = rings.iter(memory).map_err(|e| at(Abuse::of(&e)))?.next();
            if let Some(head) = head {
                let (table, size) = (GuestAddress(rings.desc_table()), rings.size());
                let indirect = features & super::mmio::INDIRECT_DESC != 0;
                let chain = Chain::parse(memory, table, size, head.head_index(), indirect);
                return chain.map(Some).map_err(at);
            }
            if !rings.enable_notification(memory).map_err(|e| at(Abuse::of(&e)))? {
                return Ok(None);
            }
        }
    }

    /// Puts the request that was popped last back.
    pub fn unpop(&mut self, queue: usize, _chain: Chain) {
        if let Some(rings) = self.rings(queue) {
            rings.go_to_previous_position();
        }
    }

    /// Answers a request, with `written` bytes at the start of what it may
    /// write. The driver is interrupted by [`Self::signal`], at the latest when
    /// the device's turn ends.
    ///
    /// # Errors
    /// When the ring is gone.
    pub fn push(&mut self, queue: usize, chain: &Chain, written: u32) -> Result<(), QueueAbuse> {
        let memory = self.memory;
        if let Some(rings) = self.rings(queue) {
            let added = rings.add_used(memory, chain.head(), written);
            added.map_err(|e| QueueAbuse { queue, abuse: Abuse::of(&e) })?;
            self.answered |= 1 << queue;
        }
        Ok(())
    }

    /// Interrupts the driver for what was answered in a queue, if it wants it.
    ///
    /// # Errors
    /// When the ring is gone.
    pub fn signal(&mut self, queue: usize) -> Result<(), QueueAbuse> {
        if self.answered & (1 << queue) == 0 {
            return Ok(());
        }
        self.answered &= !(1 << queue);
        let memory = self.memory;
        let Some(rings) = self.rings(queue) else { return Ok(()) };
        let wants = rings.needs_notification(memory);
        if wants.map_err(|e| QueueAbuse { queue, abuse: Abuse::of(&e) })? {
            self.interrupt.raise(irq::USED);
        }
        Ok(())
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.interrupt.raise(irq::CONFIG);
    }

    /// Gives the whole pages of a range back to the host; they read as zeros
    /// from now on, and count as written by the VMM.
    ///
    /// # Errors
    /// When the guest has no such memory.
    pub fn free(&self, start: GuestAddress, length: u64) -> Result<(), Abuse> {
        let first = start.0.checked_next_multiple_of(PAGE_SIZE);
        let end = start.0.checked_add(length).map(|end| end - end % PAGE_SIZE);
        let outside = || Abuse::Outside {
            address: start.0,
            length: u32::try_from(length).unwrap_or(u32::MAX),
        };
        let first = first.ok_or_else(outside)?;
        let length = end.ok_or_else(outside)?.saturating_sub(first);
        let bytes = usize::try_from(length).map_err(|_| outside())?;
        if bytes == 0 {
            return Ok(());
        }
        if !self.memory.check_range(GuestAddress(first), bytes) {
            return Err(outside());
        }
        // What the host does not take back costs memory and does no harm.
        let _ = free(self.memory, GuestAddress(first), bytes);
        Ok(())
    }

    /// Ends the turn.
    pub(super) fn end(mut self) -> Result<(), QueueAbuse> {
        (0..self.queues.len()).try_for_each(|queue| self.signal(queue))
    }

    fn rings(&mut self, queue: usize) -> Option<&mut Queue> {
        self.queues.get_mut(queue)?.as_mut()
    }
}
