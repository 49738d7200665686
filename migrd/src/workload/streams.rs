//! The bytes of a workload that travel as numbered streams, read at the source and
//! written at the destination.

/// Number of one stream of a workload: a memory region, a log, a disk, an
/// image file. Chosen by the workload, carried on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamKey(pub u32);

/// One stream as the manifest announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// Its number.
    pub key: StreamKey,
    /// For people: `ram0`, `serial-log`.
    pub name: String,
    /// Length in bytes, a multiple of the page size.
    pub length: u64,
    /// How many bytes of it need room on a disk at the destination, about; 0
    /// for what needs none.
    pub used: u64,
}

/// An access outside a stream, or to a stream that does not exist.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("stream {} has no bytes {offset}..{offset}+{length}", key.0)]
pub struct OutOfStream {
    /// The stream.
    pub key: StreamKey,
    /// First byte asked for.
    pub offset: u64,
    /// Number of bytes asked for.
    pub length: u64,
}

/// The bytes of a workload's streams, read while it runs: what a chunk holds is
/// what was there at some instant of the call.
pub trait ChunkSource: Send + Sync {
    /// Fills `into` with the stream's bytes from `offset` on.
    ///
    /// # Errors
    /// When the stream has no such bytes; `into` is then unspecified.
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream>;

    /// Whether the `length` bytes from `offset` on are all zero.
    ///
    /// # Errors
    /// When the stream has no such bytes.
    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream>;

    /// Whether reading that stream may have to wait for storage.
    fn waits(&self, key: StreamKey) -> bool;
}

/// Where the bytes of a workload's streams are put at the destination.
pub trait ChunkSink: Send + Sync {
    /// Puts `bytes` into the stream from `offset` on.
    ///
    /// # Errors
    /// When the stream has no such bytes; nothing is then written.
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream>;

    /// Makes the `length` bytes from `offset` on zero, without taking memory
    /// for what never held anything.
    ///
    /// # Errors
    /// When the stream has no such bytes; nothing is then written.
    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream>;

    /// Why something was refused that the stream has room for, with what to do about
    /// it; `None` where nothing but that is known.
    fn trouble(&self) -> Option<String> {
        None
    }
}

/// BLAKE3 of one stream; what exactly is hashed is in `docs/protocol.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHash {
    /// The stream.
    pub key: StreamKey,
    /// Its hash.
    pub hash: [u8; 32],
}
