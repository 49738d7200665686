//! The switch that the hosts' network cards are plugged into: it learns which
//! address is where, as a real one does, so that a guest that has moved must
//! make itself known.
//!
//! QEMU's stream network back end sends each frame with its length before it,
//! four bytes, big-endian.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

/// The largest frame: QEMU's own limit (4 KiB and 64 KiB).
const MAX_FRAME: usize = (4 << 10) + (64 << 10);
/// Frames that wait for a host that does not take them; more are lost, as on a
/// real wire.
const QUEUE: usize = 512;
/// Addresses that are remembered.
const MAX_ADDRESSES: usize = 4096;

type Address = [u8; 6];
type Frame = Arc<[u8]>;

/// Which cards are plugged in, and which address was last seen where.
#[derive(Debug, Default)]
struct Table {
    ports: HashMap<u64, SyncSender<Frame>>,
    addresses: HashMap<Address, u64>,
    next: u64,
}

impl Table {
    fn plug(&mut self, out: SyncSender<Frame>) -> u64 {
        self.next += 1;
        self.ports.insert(self.next, out);
        self.next
    }

    fn unplug(&mut self, port: u64) {
        self.ports.remove(&port);
        self.addresses.retain(|_, at| *at != port);
    }

    fn forward(&mut self, from: u64, frame: &Frame) {
        let (Some(to), Some(sender)) = (address(frame, 0), address(frame, 6)) else { return };
        if self.addresses.len() >= MAX_ADDRESSES && !self.addresses.contains_key(&sender) {
            self.addresses.clear();
        }
        if !is_group(sender) {
            self.addresses.insert(sender, from);
        }
        let known = if is_group(to) { None } else { self.addresses.get(&to) };
        for (port, out) in &self.ports {
            if *port != from && known.is_none_or(|known| known == port) {
                // A full queue loses the frame.
                let _ = out.try_send(Arc::clone(frame));
            }
        }
    }
}

fn address(frame: &[u8], at: usize) -> Option<Address> {
    frame.get(at..at + 6)?.try_into().ok()
}

/// Broadcast and multicast addresses have the lowest bit of their first byte
/// set (IEEE 802, clause 8).
fn is_group(address: Address) -> bool {
    address[0] & 1 == 1
}

/// Serves at `socket` until the process is ended.
///
/// # Errors
/// When it can't listen.
pub fn serve(socket: &Path) -> Result<()> {
    let listener =
        UnixListener::bind(socket).with_context(|| format!("listen at {}", socket.display()))?;
    let table = Arc::new(Mutex::new(Table::default()));
    for card in listener.incoming() {
        plug_in(card?, &table)?;
    }
    Ok(())
}

fn plug_in(card: UnixStream, table: &Arc<Mutex<Table>>) -> io::Result<()> {
    let (out, frames) = sync_channel(QUEUE);
    let to_card = card.try_clone()?;
    std::thread::spawn(move || {
        // A card that is unplugged takes no more frames.
        let _ = deliver(to_card, &frames);
    });
    let table = Arc::clone(table);
    std::thread::spawn(move || {
        let locked = || table.lock().unwrap_or_else(PoisonError::into_inner);
        let port = locked().plug(out);
        let mut card = BufReader::with_capacity(256 << 10, card);
        while let Ok(frame) = read_frame(&mut card) {
            locked().forward(port, &frame);
        }
        locked().unplug(port);
    });
    Ok(())
}

fn deliver(mut card: UnixStream, frames: &Receiver<Frame>) -> io::Result<()> {
    for frame in frames {
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        card.write_all(&[&length.to_be_bytes(), &frame[..]].concat())?;
    }
    Ok(())
}

fn read_frame(card: &mut impl Read) -> io::Result<Frame> {
    let mut length = [0; 4];
    card.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_FRAME {
        return Err(io::Error::other("a frame that is too long"));
    }
    let mut frame = vec![0; length];
    card.read_exact(&mut frame)?;
    Ok(frame.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Frame {
        let mut bytes = [2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0].to_vec();
        if to == 0xff {
            bytes[..6].fill(0xff);
        }
        bytes.into()
    }

    /// How many frames each of three cards got when the frames were sent, each
    /// by the card of that index.
    fn delivered(sent: &[(usize, Frame)]) -> Vec<usize> {
        let mut table = Table::default();
        let cards: Vec<_> = (0..3).map(|_| sync_channel(QUEUE)).collect();
        let ports: Vec<_> = cards.iter().map(|(out, _)| table.plug(out.clone())).collect();
        for (card, frame) in sent {
            table.forward(ports[*card], frame);
        }
        cards.iter().map(|(_, frames)| frames.try_iter().count()).collect()
    }

    #[test]
    fn frames_go_to_where_their_address_was_last_seen() {
        assert_eq!(delivered(&[(0, frame(9, 1))]), [0, 1, 1]);
        assert_eq!(delivered(&[(1, frame(0xff, 9)), (0, frame(9, 1))]), [1, 1, 1]);
        // The guest 9 has moved from card 1 to card 2 and said so.
        let moved = [(1, frame(0xff, 9)), (2, frame(0xff, 9)), (0, frame(9, 1))];
        assert_eq!(delivered(&moved), [2, 1, 2]);
    }

    #[test]
    fn a_frame_that_is_cut_off_or_too_long_is_not_forwarded() {
        assert_eq!(delivered(&[(0, vec![1, 2, 3].into())]), [0, 0, 0]);
        assert!(read_frame(&mut [0xff, 0, 0, 0, 1].as_slice()).is_err());
        assert!(read_frame(&mut [0, 0, 0, 9, 1].as_slice()).is_err());
    }
}
