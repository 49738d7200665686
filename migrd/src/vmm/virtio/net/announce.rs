//! How a network learns where a guest has moved to: frames from its address,
//! broadcast, so that every bridge on the way sees them come from the new side.

use std::time::{Duration, Instant};

use crate::units::Mac;

/// When, after the guest's first instant here. Several, because frames get
/// lost, and bridges may take a while before they forward.
const TIMES_MS: [u64; 5] = [0, 50, 150, 350, 750];

/// Frames shorter than this do not exist on a wire (IEEE 802.3), without their
/// checksum.
const FRAME_BYTES: usize = 60;
const TYPE_RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet and IPv4 addresses, of 6 and 4 bytes; "request reverse" (RFC 903).
const REQUEST_REVERSE: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// An announcement under way.
#[derive(Debug)]
pub(super) struct Announcement {
    began: Instant,
    made: usize,
}

impl Announcement {
    pub(super) fn starting(now: Instant) -> Self {
        Self { began: now, made: 0 }
    }

    /// When the next frame is due, if one more is.
    pub(super) fn next(&self) -> Option<Instant> {
        TIMES_MS.get(self.made).map(|ms| self.began + Duration::from_millis(*ms))
    }

    /// Whether one is due now, which then counts as made.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let due = self.next().is_some_and(|at| at <= now);
        self.made += usize::from(due);
        due
    }
}

/// A frame that asks for nothing but says where `mac` is: reverse ARP, as
/// nobody answers it, and no address of the guest need be known.
pub(super) fn rarp(mac: Mac) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend(TYPE_RARP);
    frame.extend(REQUEST_REVERSE);
    for _ in ["sender", "target"] {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(FRAME_BYTES, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_reverse_arp_request_from_the_guest() {
        let mac = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
        let frame = rarp(mac);
        assert_eq!(frame.len(), 60);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &mac[..]));
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[28..32]), (&mac[..], &[0; 4][..]));
        assert_eq!((&frame[32..38], &frame[38..42]), (&mac[..], &[0; 4][..]));
        assert!(frame[42..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn five_frames_are_sent_each_in_its_time() {
        let began = Instant::now();
        let mut announcement = Announcement::starting(began);
        let at = |ms| began + Duration::from_millis(ms);
        assert!(announcement.take(at(0)) && !announcement.take(at(49)));
        assert!(announcement.take(at(50)) && !announcement.take(at(50)));
        assert_eq!(announcement.next(), Some(at(150)));
        assert!(announcement.take(at(2000)) && announcement.take(at(2000)));
        assert!(announcement.take(at(2000)) && !announcement.take(at(9000)));
        assert_eq!(announcement.next(), None);
    }
}
