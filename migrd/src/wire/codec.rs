//! Batches as bytes, without a copy of their data that protobuf would make.
//!
//! What is written and read is an ordinary gRPC message of `migr.v1.Batch`
//! with its fields in ascending order, as every protobuf encoder writes them.

use bytes::{BufMut, Bytes, BytesMut};

use super::limits::{self, BatchError, MAX_RUN_BYTES, MAX_RUNS};
use crate::workload::StreamKey;

const SEQUENCE: u8 = 1 << 3;
const CRC32: u8 = 2 << 3 | 5;
const RUNS: u8 = 3 << 3 | 2;
const DATA: u8 = 4 << 3 | 2;
const GRPC_PREFIX: usize = 5;

/// What a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Its bytes are in the batch's data.
    Data,
    /// All zero.
    Zero,
}

/// Neighbouring bytes of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which stream.
    pub stream: StreamKey,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Whether its bytes travel.
    pub kind: RunKind,
}

/// A batch but for its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHead {
    /// Its place in the lane.
    pub sequence: u64,
    /// Its runs.
    pub runs: Vec<Run>,
    /// Bytes of data that follow.
    pub data_length: usize,
}

fn put_varint(into: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        into.put_u8(u8::try_from(value & 0x7f).expect("seven bits") | 0x80);
        value >>= 7;
    }
    into.put_u8(u8::try_from(value).expect("seven bits"));
}

fn varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, BatchError> {
    let mut value = 0_u64;
    for (i, byte) in bytes.iter().enumerate() {
        let bits = u64::from(byte & 0x7f);
        if i == 10 || (i == 9 && bits > 1) {
            return Err(BatchError::Malformed("a varint is over 64 bits"));
        }
        value |= bits << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(Some((value, i + 1)));
        }
    }
    Ok(None)
}

fn put_run(into: &mut BytesMut, run: &Run) {
    let mut body = BytesMut::with_capacity(MAX_RUN_BYTES);
    let kind = match run.kind {
        RunKind::Data => 1,
        RunKind::Zero => 2,
    };
    let fields = [(8, u64::from(run.stream.0)), (16, run.offset), (24, run.length), (32, kind)];
    for (tag, value) in fields.into_iter().filter(|(_, value)| *value != 0) {
        body.put_u8(tag);
        put_varint(&mut body, value);
    }
    into.put_u8(RUNS);
    put_varint(into, body.len() as u64);
    into.put_slice(&body);
}

fn run(mut body: &[u8]) -> Result<Run, BatchError> {
    const SHORT: BatchError = BatchError::Malformed("a run ends within a field");
    let mut fields = [0_u64; 4];
    let mut last = 0;
    while let Some((tag, rest)) = body.split_first() {
        let number = usize::from(tag >> 3);
        if tag & 7 != 0 || !(1..=4).contains(&number) || number <= last {
            return Err(BatchError::Malformed("a run has a field it should not have"));
        }
        let (value, length) = varint(rest)?.ok_or(SHORT)?;
        fields[number - 1] = value;
        last = number;
        body = &rest[length..];
    }
    let [stream, offset, length, kind] = fields;
    let stream = u32::try_from(stream).map_err(|_| BatchError::Malformed("a stream's number"))?;
    let kind = match kind {
        1 => RunKind::Data,
        2 => RunKind::Zero,
        _ => return Err(BatchError::Malformed("a run is of no known kind")),
    };
    Ok(Run { stream: StreamKey(stream), offset, length, kind })
}

/// Everything of the gRPC message that stands before the bytes of `data`: the
/// two together are what goes over the wire.
#[must_use]
pub fn encode_head(sequence: u64, runs: &[Run], data: &[u8]) -> Bytes {
    let mut encoded_runs = BytesMut::with_capacity(runs.len() * 24);
    runs.iter().for_each(|run| put_run(&mut encoded_runs, run));
    let mut crc = crc32fast::Hasher::new();
    crc.update(&encoded_runs);
    crc.update(data);
    let mut head = BytesMut::with_capacity(encoded_runs.len() + 32);
    head.put_bytes(0, GRPC_PREFIX);
    if sequence != 0 {
        head.put_u8(SEQUENCE);
        put_varint(&mut head, sequence);
    }
    head.put_u8(CRC32);
    head.put_u32_le(crc.finalize());
    head.put_slice(&encoded_runs);
    if !data.is_empty() {
        head.put_u8(DATA);
        put_varint(&mut head, data.len() as u64);
    }
    let length = u32::try_from(head.len() - GRPC_PREFIX + data.len()).expect("limits are below");
    head[1..GRPC_PREFIX].copy_from_slice(&length.to_be_bytes());
    head.freeze()
}

/// Takes what a [`Decoder`] finds.
pub trait Apply {
    /// A batch begins. Refusing it ends the lane before any of its data is taken.
    ///
    /// # Errors
    /// Why it is refused.
    fn begin(&mut self, head: BatchHead) -> Result<(), BatchError>;

    /// Some more bytes of its data, never more than the head announced.
    ///
    /// # Errors
    /// Why they cannot be taken.
    fn data(&mut self, bytes: &[u8]) -> Result<(), BatchError>;

    /// The batch is whole and its checksum is right.
    ///
    /// # Errors
    /// Why it cannot be taken.
    fn end(&mut self) -> Result<(), BatchError>;
}

#[derive(Debug)]
enum State {
    /// The five bytes before a gRPC message.
    Prefix,
    /// Fields before the data.
    Head,
    /// So many bytes of data are still to come.
    Data(usize),
}

/// Reads batches from the bytes of a lane, however they are cut.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// The prefix or the field that is being read.
    field: Vec<u8>,
    /// Bytes of the message still to come.
    left: usize,
    last_tag: u8,
    sequence: u64,
    expected_crc: u32,
    runs: Vec<Run>,
    crc: crc32fast::Hasher,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            state: State::Prefix,
            field: Vec::with_capacity(MAX_RUN_BYTES + 2),
            left: 0,
            last_tag: 0,
            sequence: 0,
            expected_crc: 0,
            runs: Vec::new(),
            crc: crc32fast::Hasher::new(),
        }
    }
}

impl Decoder {
    /// Takes the next bytes of the lane and tells `to` what is in them. After
    /// an error nothing more can be read.
    ///
    /// # Errors
    /// What is wrong with the batch, or what `to` said.
    pub fn feed(&mut self, mut bytes: &[u8], to: &mut impl Apply) -> Result<(), BatchError> {
        while !bytes.is_empty() {
            match self.state {
                State::Prefix => {
                    self.field.push(bytes[0]);
                    bytes = &bytes[1..];
                    self.prefix(to)?;
                }
                State::Head => {
                    self.field.push(bytes[0]);
                    self.left -= 1;
                    bytes = &bytes[1..];
                    self.head_field(to)?;
                }
                State::Data(due) => {
                    let (now, later) = bytes.split_at(due.min(bytes.len()));
                    self.crc.update(now);
                    to.data(now)?;
                    self.left -= now.len();
                    bytes = later;
                    self.state = State::Data(due - now.len());
                    if due == now.len() {
                        self.end(to)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The lane has ended.
    ///
    /// # Errors
    /// [`BatchError::Truncated`] if that was within a batch.
    pub fn finish(&self) -> Result<(), BatchError> {
        match self.state {
            State::Prefix if self.field.is_empty() => Ok(()),
            State::Prefix | State::Head | State::Data(_) => Err(BatchError::Truncated),
        }
    }

    fn prefix(&mut self, to: &mut impl Apply) -> Result<(), BatchError> {
        let [flag, length @ ..] = self.field.as_slice() else { return Ok(()) };
        if *flag != 0 {
            return Err(BatchError::Compressed);
        }
        let Ok(length) = <[u8; 4]>::try_from(length) else { return Ok(()) };
        self.left = limits::check_length(u64::from(u32::from_be_bytes(length)))?;
        self.field.clear();
        self.state = State::Head;
        if self.left == 0 { self.begin(0, to) } else { Ok(()) }
    }

    fn head_field(&mut self, to: &mut impl Apply) -> Result<(), BatchError> {
        let whole = match (self.field[0], &self.field[1..]) {
            (SEQUENCE, value) => match varint(value)? {
                Some((sequence, _)) => {
                    self.sequence = sequence;
                    true
                }
                None => false,
            },
            (CRC32, value) => match <[u8; 4]>::try_from(value) {
                Ok(crc) => {
                    self.expected_crc = u32::from_le_bytes(crc);
                    true
                }
                Err(_) => false,
            },
            (RUNS, value) => self.run_field(varint(value)?)?,
            (DATA, value) => match varint(value)? {
                Some((length, _)) if length != self.left as u64 => {
                    return Err(BatchError::Malformed("data is not the last field"));
                }
                Some(_) => return self.begin(self.left, to),
                None => false,
            },
            _ => return Err(BatchError::Malformed("an unknown field")),
        };
        if whole {
            let tag = self.field[0];
            if tag < self.last_tag || (tag == self.last_tag && tag != RUNS) {
                return Err(BatchError::Malformed("fields are not in ascending order"));
            }
            self.last_tag = tag;
            self.field.clear();
            if self.left == 0 {
                return self.begin(0, to);
            }
        } else if self.left == 0 {
            return Err(BatchError::Malformed("it ends within a field"));
        }
        Ok(())
    }

    fn run_field(&mut self, length: Option<(u64, usize)>) -> Result<bool, BatchError> {
        let Some((length, width)) = length else { return Ok(false) };
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_RUN_BYTES);
        let length = length.ok_or(BatchError::Malformed("a run is too long"))?;
        let body = &self.field[1 + width..];
        if body.len() < length {
            return Ok(false);
        }
        if self.runs.len() == MAX_RUNS {
            return Err(BatchError::TooManyRuns);
        }
        self.runs.push(run(body)?);
        self.crc.update(&self.field);
        Ok(true)
    }

    fn begin(&mut self, data_length: usize, to: &mut impl Apply) -> Result<(), BatchError> {
        let runs = std::mem::take(&mut self.runs);
        to.begin(BatchHead { sequence: self.sequence, runs, data_length })?;
        self.field.clear();
        self.state = State::Data(data_length);
        if data_length == 0 { self.end(to) } else { Ok(()) }
    }

    fn end(&mut self, to: &mut impl Apply) -> Result<(), BatchError> {
        if std::mem::take(&mut self.crc).finalize() != self.expected_crc {
            return Err(BatchError::Checksum { sequence: self.sequence });
        }
        to.end()?;
        *self = Self { field: std::mem::take(&mut self.field), ..Self::default() };
        Ok(())
    }
}
