//! The network interface (virtio 1.2, 5.1), in front of a tap.
//!
//! Frames that come while the driver has put up no buffer wait in the tap, as
//! long as that has room for them. Of the offloads only those of sending are
//! offered: whatever the driver leaves to the device the tap does, and says no
//! to a header that makes no sense. Frames that come are whole, because the tap
//! was told that nobody behind it can do anything.

mod announce;

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use migr_proto::v1::{self as proto, virtio_state};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::chain::Chain;
use super::device::{Device, Kind, StateError};
use super::queue::{Abuse, QueueAbuse, Turn};
use super::space::ConfigSpace;
use crate::units::Mac;
use announce::Announcement;

const RECEIVE: usize = 0;
const SEND: usize = 1;
const CONTROL: usize = 2;
/// Most descriptors of each.
const SIZES: &[u16] = &[256, 256, 64];

/// `struct virtio_net_hdr` with its last field, which every device of version 1
/// has (5.1.6). The tap has it before each frame too.
pub const HEADER_BYTES: usize = 12;
/// Where in it is the number of buffers of a frame that came.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Destination, source and type.
const FRAME_MIN: usize = 14;
/// The longest frame: 64 KiB to be cut into pieces, and its headers.
const FRAME_MAX: usize = 65_550;
/// Frames in one direction before the other one has its turn.
const BURST: usize = 64;

const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
const GUEST_ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
const FEATURES: u64 = CSUM
    | GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ;

/// Where the status is in the configuration space, after the address.
const STATUS_AT: usize = 6;

/// The interface.
#[derive(Debug)]
pub struct Net {
    mac: Mac,
    space: Arc<ConfigSpace>,
    tap: Option<Arc<File>>,
    /// The tap failed for good: why was told.
    broken: bool,
    /// The driver may have buffers for frames that come.
    hungry: bool,
    /// The driver was told to announce itself and has not said that it has.
    asked: bool,
    announcement: Option<Announcement>,
    frame: Vec<u8>,
}

/// What became of the attempt to receive a frame.
#[derive(PartialEq, Eq)]
enum Received {
    /// It is in the guest, or nowhere.
    One,
    /// There is none, or nowhere to put it.
    Nothing,
}

impl Net {
    /// An interface with this address, and no tap yet.
    #[must_use]
    pub fn new(mac: Mac) -> Self {
        let mut bytes = mac.to_vec();
        bytes.extend(status(false).to_le_bytes());
        Self {
            mac,
            space: Arc::new(ConfigSpace::new(bytes, 0..0)),
            tap: None,
            broken: false,
            hungry: false,
            asked: false,
            announcement: None,
            frame: vec![0; HEADER_BYTES + FRAME_MAX],
        }
    }

    fn set_asked(&mut self, asked: bool) {
        if self.asked != asked {
            self.asked = asked;
            self.space.change(STATUS_AT, &status(asked).to_le_bytes());
        }
    }

    /// Up to [`BURST`] frames from the tap to the driver.
    fn receive(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        for _ in 0..BURST {
            if !self.hungry || self.receive_one(turn)? == Received::Nothing {
                break;
            }
        }
        Ok(())
    }

    fn receive_one(&mut self, turn: &mut Turn<'_>) -> Result<Received, QueueAbuse> {
        let at = |abuse| QueueAbuse { queue: RECEIVE, abuse };
        let Some(tap) = self.tap.clone().filter(|_| !self.broken) else {
            return Ok(Received::Nothing);
        };
        // A buffer first: a frame that was read could not be put back.
        let Some(mut chain) = turn.pop(RECEIVE)? else {
            self.hungry = turn.is_over();
            return Ok(Received::Nothing);
        };
        if chain.readable.length() > 0 {
            return Err(at(Abuse::Direction("a frame that comes")));
        }
        self.frame[..HEADER_BYTES].fill(0);
        let length = match (&*tap).read(&mut self.frame) {
            Ok(length) if length >= HEADER_BYTES => length,
            Ok(_) => {
                turn.unpop(RECEIVE, chain);
                return Ok(Received::One);
            }
            Err(error) => {
                turn.unpop(RECEIVE, chain);
                self.failed(&error);
                return Ok(Received::Nothing);
            }
        };
        if length as u64 > chain.writable.length() {
            // Longer than what the driver takes: as a wire would, it goes.
            turn.unpop(RECEIVE, chain);
            return Ok(Received::One);
        }
        self.frame[NUM_BUFFERS].copy_from_slice(&1_u16.to_le_bytes());
        let frame = self.frame.get(..length).unwrap_or_default();
        chain.writable.write(turn.memory, frame).map_err(at)?;
        turn.push(RECEIVE, &chain, u32::try_from(length).unwrap_or(0))?;
        Ok(Received::One)
    }

    /// A tap whose interface was deleted never works again, and waiting for it
    /// would not wait.
    fn failed(&mut self, error: &io::Error) {
        if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
            eprintln!("the tap behind a network interface failed: {error}");
            self.broken = true;
        }
    }

    /// Every frame that the driver has to send.
    fn send(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        let mut sent = 0;
        while let Some(mut chain) = turn.pop(SEND)? {
            self.send_one(turn, &mut chain).map_err(|abuse| QueueAbuse { queue: SEND, abuse })?;
            turn.push(SEND, &chain, 0)?;
            sent += 1;
            if sent % BURST == 0 {
                self.receive(turn)?;
            }
        }
        Ok(())
    }

    fn send_one(&mut self, turn: &Turn<'_>, chain: &mut Chain) -> Result<(), Abuse> {
        if chain.writable.length() > 0 {
            return Err(Abuse::Direction("a frame to send"));
        }
        let length = chain.readable.length();
        if length < HEADER_BYTES as u64 {
            return Err(Abuse::Short("the header of a frame to send"));
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        // What no wire would carry is lost, as is what the tap has no room for:
        // the guest can't be told, and finds out as it would on any network.
        let Some(frame) = self.frame.get_mut(..length) else { return Ok(()) };
        chain.readable.read(turn.memory, frame)?;
        if length < HEADER_BYTES + FRAME_MIN {
            return Ok(());
        }
        if turn.features & CSUM == 0 {
            // It has agreed to leave nothing to the device.
            frame[..HEADER_BYTES].fill(0);
        }
        if let Some(tap) = &self.tap {
            let _ = (&**tap).write(frame);
        }
        Ok(())
    }

    /// Answers what the driver commands (5.1.6.5).
    fn control(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        let at = |abuse| QueueAbuse { queue: CONTROL, abuse };
        while let Some(mut chain) = turn.pop(CONTROL)? {
            let mut command = [0; 2];
            let read = chain.readable.read(turn.memory, &mut command).map_err(at)?;
            if read < command.len() {
                return Err(at(Abuse::Short("a command")));
            }
            let announced =
                command.map(u32::from) == [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK];
            let known = announced && turn.features & GUEST_ANNOUNCE != 0;
            if known {
                self.set_asked(false);
            }
            let answer = if known { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            let answer = [u8::try_from(answer).unwrap_or(u8::MAX)];
            if chain.writable.write(turn.memory, &answer).map_err(at)? == 0 {
                return Err(at(Abuse::Short("the answer to a command")));
            }
            turn.push(CONTROL, &chain, 1)?;
        }
        Ok(())
    }

    /// Tells the network where the guest is now.
    fn announce(&mut self) {
        let mut frame = vec![0; HEADER_BYTES];
        frame.extend(announce::rarp(self.mac));
        if let Some(tap) = &self.tap {
            // One that gets lost is why there are several.
            let _ = (&**tap).write(&frame);
        }
    }
}

fn status(asked: bool) -> u16 {
    let bits = VIRTIO_NET_S_LINK_UP | if asked { VIRTIO_NET_S_ANNOUNCE } else { 0 };
    u16::try_from(bits).unwrap_or(0)
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        SIZES
    }

    fn space(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.space)
    }

    fn serve(&mut self, queue: usize, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        match queue {
            RECEIVE => {
                // What waits in the tap makes it readable, so it comes next.
                self.hungry = turn.driver_is_ready();
                Ok(())
            }
            SEND => self.send(turn),
            _ => self.control(turn),
        }
    }

    fn source(&self) -> Option<Arc<File>> {
        self.tap.clone().filter(|_| self.hungry && !self.broken)
    }

    fn source_ready(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        self.receive(turn)
    }

    fn deadline(&self) -> Option<Instant> {
        self.announcement.as_ref().and_then(Announcement::next)
    }

    fn timer(&mut self, _: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        let Some(announcement) = &mut self.announcement else { return Ok(()) };
        if announcement.take(Instant::now()) {
            self.announce();
        }
        Ok(())
    }

    fn resume(&mut self, restored: bool, turn: &mut Turn<'_>) -> Result<(), QueueAbuse> {
        if !restored {
            return Ok(());
        }
        self.announcement = Some(Announcement::starting(Instant::now()));
        if turn.driver_is_ready() && turn.features & GUEST_ANNOUNCE != 0 {
            self.set_asked(true);
            turn.config_changed();
        }
        Ok(())
    }

    fn stand(&mut self) {}

    fn reset(&mut self) {
        self.hungry = false;
        self.announcement = None;
        self.set_asked(false);
    }

    fn attach(&mut self, backing: File) -> io::Result<()> {
        if self.tap.is_some() {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "it has a tap"));
        }
        self.tap = Some(Arc::new(backing));
        Ok(())
    }

    fn attached(&self) -> bool {
        self.tap.is_some()
    }

    fn detach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn save(&self) -> virtio_state::Kind {
        virtio_state::Kind::Net(proto::NetState { announce_pending: self.asked })
    }

    fn restore(&mut self, state: &virtio_state::Kind) -> Result<(), StateError> {
        let virtio_state::Kind::Net(proto::NetState { announce_pending }) = state else {
            return Err(StateError("it is not of a network interface".into()));
        };
        self.set_asked(*announce_pending);
        Ok(())
    }
}
