//! The frames of a connection: their bytes, and what is refused.
//!
//! Numbers little-endian: magic 4, kind 4, sequence 8, monotonic ns 8, realtime ns 8, records 8,
//! faults 8, payload length 4, payload ([`pattern`](crate::pattern) of kind and sequence, which
//! also give its length), CRC-32 of all before it 4.

use std::io::{self, ErrorKind, Read};

use thiserror::Error;

use crate::clocks::Clocks;
use crate::fields::{take, take_u32, take_u64};
use crate::pattern::{Numbers, Stream};

const MAGIC: [u8; 4] = *b"wit1";
const HEADER_BYTES: usize = 4 + 4 + 5 * 8 + 4;
const SHORTEST_PAYLOAD: usize = 32;
/// Payload lengths are powers of two between these, so that frames and segments never align.
const PAYLOAD_DOUBLINGS: u64 = 7;
/// No payload is longer, in bytes; a frame that says so is refused before any memory is taken.
pub const LONGEST_PAYLOAD: usize = SHORTEST_PAYLOAD << (PAYLOAD_DOUBLINGS - 1);

/// Who sent a frame, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the server, at its own pace.
    Tick,
    /// From the client.
    Ask,
    /// From the server: the client's frame came.
    Echo,
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Self::Tick => 1,
            Self::Ask => 2,
            Self::Echo => 3,
        }
    }

    fn of(code: u32) -> Option<Self> {
        [Self::Tick, Self::Ask, Self::Echo].into_iter().find(|kind| kind.code() == code)
    }

    /// An echo carries the payload of what it answers.
    fn stream(self) -> Stream {
        match self {
            Self::Tick => Stream::Tick,
            Self::Ask | Self::Echo => Stream::Ask,
        }
    }
}

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Who sent it, and why.
    pub kind: Kind,
    /// Counts ticks, or asks, of one connection from 0.
    pub sequence: u64,
    /// The sender's clocks when it was made.
    pub clocks: Clocks,
    /// Records that the sender has on its disk.
    pub records: u64,
    /// What the sender found wrong so far.
    pub faults: u64,
}

/// Why bytes are not the frame that was sent.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The connection ended within a frame.
    #[error("the connection ended in the middle of a frame")]
    Torn,
    /// The bytes are none of a frame.
    #[error("no frame begins here: bytes were lost, doubled or changed")]
    Magic,
    /// No such kind of frame.
    #[error("a frame says it is of kind {0}, which there is none of")]
    Kind(u32),
    /// The length is not the one of this sequence number.
    #[error("frame {sequence} says that its payload has {got} bytes, and it has {expected}")]
    Length {
        /// The frame.
        sequence: u64,
        /// What it says.
        got: u32,
        /// What it should say.
        expected: usize,
    },
    /// The bytes do not have the checksum that they carry.
    #[error("frame {sequence} has the checksum {got:#010x} and not {carried:#010x}")]
    Checksum {
        /// The frame.
        sequence: u64,
        /// The checksum in the frame.
        carried: u32,
        /// The checksum of its bytes.
        got: u32,
    },
    /// The checksum is right and the payload is another's.
    #[error("the payload of frame {0} is not its own")]
    Payload(u64),
}

/// The payload of a frame.
fn payload(kind: Kind, sequence: u64) -> Vec<u8> {
    let mut numbers = Numbers::of(kind.stream(), sequence);
    let doublings = numbers.next_number() % PAYLOAD_DOUBLINGS;
    let mut bytes = vec![0; SHORTEST_PAYLOAD << doublings];
    numbers.fill(&mut bytes);
    bytes
}

impl Frame {
    /// The bytes of the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Self { kind, sequence, clocks, records, faults } = self;
        let payload = payload(*kind, *sequence);
        // Our own payloads are short.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len() + 4);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&kind.code().to_le_bytes());
        for number in [sequence, &clocks.monotonic_ns, &clocks.realtime_ns, records, faults] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&payload);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Reads the next frame; nothing when the connection ended before it.
    ///
    /// # Errors
    /// When the connection fails, or brings anything else than whole frames.
    pub fn read(reader: &mut impl Read) -> Result<Option<Self>, FrameError> {
        let mut header = [0; HEADER_BYTES];
        if !read_or_end(reader, &mut header)? {
            return Ok(None);
        }
        let (frame, expected) = Self::decode_header(&header)?;
        let mut body = vec![0; expected.len() + 4];
        reader.read_exact(&mut body).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => FrameError::Torn,
            _ => FrameError::Io(error),
        })?;
        let (got, mut checksum) = body.split_at(expected.len());
        let sequence = frame.sequence;
        let carried = take_u32(&mut checksum).ok_or(FrameError::Torn)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header);
        hasher.update(got);
        let sum = hasher.finalize();
        if carried != sum {
            return Err(FrameError::Checksum { sequence, carried, got: sum });
        }
        if got != expected {
            return Err(FrameError::Payload(sequence));
        }
        Ok(Some(frame))
    }

    /// The frame of a header, and the payload that must follow.
    fn decode_header(header: &[u8; HEADER_BYTES]) -> Result<(Self, Vec<u8>), FrameError> {
        let mut rest = header.as_slice();
        if take::<4>(&mut rest) != Some(MAGIC) {
            return Err(FrameError::Magic);
        }
        let code = take_u32(&mut rest).ok_or(FrameError::Torn)?;
        let kind = Kind::of(code).ok_or(FrameError::Kind(code))?;
        let mut number = || take_u64(&mut rest).ok_or(FrameError::Torn);
        let sequence = number()?;
        let clocks = Clocks { monotonic_ns: number()?, realtime_ns: number()? };
        let (records, faults) = (number()?, number()?);
        let got = take_u32(&mut rest).ok_or(FrameError::Torn)?;
        let expected = payload(kind, sequence);
        if usize::try_from(got) != Ok(expected.len()) {
            return Err(FrameError::Length { sequence, got, expected: expected.len() });
        }
        Ok((Self { kind, sequence, clocks, records, faults }, expected))
    }
}

/// Fills `bytes`; false when the connection ends before the first of them.
fn read_or_end(reader: &mut impl Read, bytes: &mut [u8]) -> Result<bool, FrameError> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(FrameError::Torn),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Io(error)),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: Kind, sequence: u64) -> Frame {
        let clocks = Clocks { monotonic_ns: 77, realtime_ns: 1_700_000_000_000_000_000 };
        Frame { kind, sequence, clocks, records: 12, faults: 0 }
    }

    fn read(bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
        Frame::read(&mut &*bytes)
    }

    #[test]
    fn frames_are_read_back_in_order() {
        let mut bytes = frame(Kind::Tick, 0).encode();
        bytes.extend(frame(Kind::Echo, 5).encode());
        let mut reader = bytes.as_slice();
        assert_eq!(Frame::read(&mut reader).unwrap(), Some(frame(Kind::Tick, 0)));
        assert_eq!(Frame::read(&mut reader).unwrap(), Some(frame(Kind::Echo, 5)));
        assert_eq!(Frame::read(&mut reader).unwrap(), None);
    }

    #[test]
    fn payloads_have_all_lengths_up_to_the_longest() {
        let lengths: std::collections::BTreeSet<usize> =
            (0..200).map(|sequence| payload(Kind::Ask, sequence).len()).collect();
        assert_eq!(lengths.first(), Some(&SHORTEST_PAYLOAD));
        assert_eq!(lengths.last(), Some(&LONGEST_PAYLOAD));
    }

    #[test]
    fn a_length_that_is_not_the_frames_is_refused_before_anything_is_read() {
        let mut bytes = frame(Kind::Ask, 3).encode();
        bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = read(&bytes[..HEADER_BYTES]).unwrap_err();
        assert!(matches!(error, FrameError::Length { sequence: 3, got: u32::MAX, .. }), "{error}");
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let mut bytes = frame(Kind::Ask, 3).encode();
        bytes[4] = 9;
        assert!(matches!(read(&bytes), Err(FrameError::Kind(9))));
    }

    #[test]
    fn a_payload_of_another_frame_is_refused_even_with_a_right_checksum() {
        let mut bytes = frame(Kind::Ask, 3).encode();
        let end = bytes.len() - 4;
        bytes[HEADER_BYTES..HEADER_BYTES + 2].copy_from_slice(&[0, 0]);
        let checksum = crc32fast::hash(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&checksum);
        assert!(matches!(read(&bytes), Err(FrameError::Payload(3))));
    }

    proptest! {
        #[test]
        fn a_frame_that_ends_early_is_torn(cut in 1usize..100) {
            let bytes = frame(Kind::Tick, 2).encode();
            let short = bytes.len().saturating_sub(cut).max(1);
            prop_assert!(matches!(read(&bytes[..short]), Err(FrameError::Torn)));
        }

        #[test]
        fn any_changed_bit_of_a_frame_is_noticed(place in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = frame(Kind::Echo, 4).encode();
            let byte = place.index(bytes.len());
            bytes[byte] ^= 1u8 << bit;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn hostile_bytes_are_no_frame(mut bytes in prop::collection::vec(any::<u8>(), 1..300)) {
            prop_assert!(read(&bytes).is_err());
            for (byte, magic) in bytes.iter_mut().zip(MAGIC) {
                *byte = magic;
            }
            prop_assert!(read(&bytes).is_err());
        }
    }
}
