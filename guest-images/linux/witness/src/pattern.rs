//! What the bytes of a payload must be: a pure function of a stream and a sequence number, so
//! that a byte that was lost, doubled, aged or swapped with another payload's is seen, even if
//! its checksum moved along.

/// What a payload belongs to. Payloads of different streams differ at the same sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Records on a disk.
    Record,
    /// Frames that a server sends of its own accord.
    Tick,
    /// Frames that a client sends, and their echoes.
    Ask,
}

impl Stream {
    /// A constant without structure, so that seeds of neighbouring sequence numbers of different
    /// streams do not meet.
    fn seed(self) -> u64 {
        match self {
            Self::Record => 0x5bd1_e995_27d4_eb2f,
            Self::Tick => 0x9ae1_6a3b_2f90_404f,
            Self::Ask => 0xc3a5_c85c_97cb_3127,
        }
    }
}

/// A generator of pseudo-random numbers (splitmix64: small, and good enough for data that must
/// neither repeat nor compress).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of one payload.
    #[must_use]
    pub fn of(stream: Stream, sequence: u64) -> Self {
        let mut start = Self(stream.seed() ^ sequence);
        Self(start.next_number())
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.next_number().to_le_bytes();
            chunk.copy_from_slice(number.split_at(chunk.len()).0);
        }
    }
}

/// The payload of `sequence` in `stream`, written over all of `bytes`.
pub fn fill(stream: Stream, sequence: u64, bytes: &mut [u8]) {
    Numbers::of(stream, sequence).fill(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(stream: Stream, sequence: u64) -> [u8; 61] {
        let mut bytes = [0; 61];
        fill(stream, sequence, &mut bytes);
        bytes
    }

    #[test]
    fn a_payload_is_always_the_same() {
        assert_eq!(payload(Stream::Tick, 7), payload(Stream::Tick, 7));
    }

    #[test]
    fn payloads_of_neighbours_and_of_other_streams_differ() {
        assert_ne!(payload(Stream::Tick, 7), payload(Stream::Tick, 8));
        assert_ne!(payload(Stream::Tick, 7), payload(Stream::Ask, 7));
        assert_ne!(payload(Stream::Record, 7), payload(Stream::Ask, 7));
    }

    #[test]
    fn a_longer_payload_begins_like_a_shorter_one() {
        let mut long = [0; 64];
        fill(Stream::Ask, 3, &mut long);
        assert!(long.starts_with(&payload(Stream::Ask, 3)));
    }
}
