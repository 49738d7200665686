//! One record on a disk: its bytes, and what is refused. Pure.
//!
//! 512 bytes, numbers little-endian: magic 8, sequence 8, run 8, monotonic ns 8, realtime ns 8,
//! payload 468 ([`pattern`](crate::pattern) of the sequence), CRC-32 of all before it 4.

use thiserror::Error;

use crate::clocks::Clocks;
use crate::fields::{take, take_u32, take_u64};
use crate::pattern::{self, Stream};

/// Bytes of a record: one sector, so that a record is never torn by a disk that writes whole
/// sectors.
pub const RECORD_BYTES: usize = 512;

const MAGIC: [u8; 8] = *b"witness1";
const PAYLOAD_BYTES: usize = RECORD_BYTES - 5 * 8 - 4;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its place in the file, from 0.
    pub sequence: u64,
    /// Which run of the writer made it. Monotonic clocks of different runs (boots) have nothing
    /// to do with each other.
    pub run: u64,
    /// When it was made.
    pub clocks: Clocks,
}

/// Why bytes are not the record that was written.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    /// The first bytes are not those of a record.
    #[error("no record begins here: the bytes were lost, or belong to something else")]
    Magic,
    /// The bytes do not have the checksum that they carry.
    #[error("its checksum is {got:#010x} and not {carried:#010x}: a byte was changed")]
    Checksum {
        /// The checksum in the record.
        carried: u32,
        /// The checksum of its bytes.
        got: u32,
    },
    /// The checksum is right and the payload is another's.
    #[error("it says sequence {0}, and its payload is not that of this sequence")]
    Payload(u64),
}

impl Record {
    /// The bytes of the record.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut payload = [0; PAYLOAD_BYTES];
        pattern::fill(Stream::Record, self.sequence, &mut payload);
        let mut bytes = Vec::with_capacity(RECORD_BYTES);
        bytes.extend_from_slice(&MAGIC);
        let Self { sequence, run, clocks: Clocks { monotonic_ns, realtime_ns } } = self;
        for number in [sequence, run, monotonic_ns, realtime_ns] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&payload);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        let mut record = [0; RECORD_BYTES];
        record.copy_from_slice(&bytes);
        record
    }

    /// Reads a record.
    ///
    /// # Errors
    /// When the bytes are not exactly those of a record.
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Result<Self, RecordError> {
        let (signed, mut checksum) = bytes.split_at(RECORD_BYTES - 4);
        let mut rest = signed;
        if take::<8>(&mut rest) != Some(MAGIC) {
            return Err(RecordError::Magic);
        }
        let carried = take_u32(&mut checksum).ok_or(RecordError::Magic)?;
        let got = crc32fast::hash(signed);
        if carried != got {
            return Err(RecordError::Checksum { carried, got });
        }
        let mut number = || take_u64(&mut rest).ok_or(RecordError::Magic);
        let (sequence, run) = (number()?, number()?);
        let clocks = Clocks { monotonic_ns: number()?, realtime_ns: number()? };
        let mut payload = [0; PAYLOAD_BYTES];
        pattern::fill(Stream::Record, sequence, &mut payload);
        if rest != payload {
            return Err(RecordError::Payload(sequence));
        }
        Ok(Self { sequence, run, clocks })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(sequence: u64) -> Record {
        let clocks = Clocks { monotonic_ns: 5_000_000_000, realtime_ns: 1_700_000_000_000_000_000 };
        Record { sequence, run: 42, clocks }
    }

    #[test]
    fn a_record_is_read_back_as_it_was_written() {
        assert_eq!(Record::decode(&record(9).encode()), Ok(record(9)));
    }

    #[test]
    fn an_empty_sector_is_no_record() {
        assert_eq!(Record::decode(&[0; RECORD_BYTES]), Err(RecordError::Magic));
    }

    #[test]
    fn a_payload_of_another_record_is_refused_even_with_a_right_checksum() {
        let mut forged = record(9).encode();
        forged[40..508].copy_from_slice(&record(8).encode()[40..508]);
        let checksum = crc32fast::hash(&forged[..508]).to_le_bytes();
        forged[508..].copy_from_slice(&checksum);
        assert_eq!(Record::decode(&forged), Err(RecordError::Payload(9)));
    }

    proptest! {
        #[test]
        fn any_changed_bit_of_a_record_is_noticed(byte in 0..RECORD_BYTES, bit in 0u8..8) {
            let mut bytes = record(9).encode();
            bytes[byte] ^= 1u8 << bit;
            prop_assert!(Record::decode(&bytes).is_err());
        }

        #[test]
        fn hostile_bytes_are_no_record(bytes in proptest::array::uniform32(any::<u8>())) {
            let mut record = record(9).encode();
            record[..8].copy_from_slice(&MAGIC);
            record[8..40].copy_from_slice(&bytes);
            prop_assert!(Record::decode(&record).is_err());
        }
    }
}
