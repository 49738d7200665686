//! Serial output of a workload, followed from host to host without a gap or a
//! repeated byte.

use std::time::Duration;

use migr_proto::v1::LogChunk;
use tonic::{Code, Streaming};

use crate::args::Format;
use crate::client::{Client, ClientError};
use crate::failure::{Failure, note};
use crate::output::write_out;

/// A daemon that starts again, or a destination that is about to run the
/// workload, gets this many tries of [`RETRY_PAUSE`].
pub const RETRIES: u32 = 20;
/// Pause between two tries.
pub const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Moves in a row without a byte of output before following gives up.
const MAX_IDLE_HOPS: u32 = 32;

/// Turns chunks into what is printed. Pure but for what it remembers.
pub struct Printer {
    format: Format,
    timestamps: bool,
    /// Offset of the first byte not yet printed; none if any will do.
    next: Option<u64>,
    line_start: bool,
    /// A later stream may begin with bytes that were printed already.
    resumed: bool,
}

/// What to print for a chunk, and how much output is lost before it.
#[derive(Debug, PartialEq, Eq)]
pub struct Rendered {
    pub bytes: Vec<u8>,
    pub missing: u64,
}

impl Printer {
    /// Begins at offset `from`, or at whatever comes first.
    pub fn new(format: Format, timestamps: bool, from: Option<u64>) -> Self {
        Self { format, timestamps, next: from, line_start: true, resumed: false }
    }

    /// Where the next stream should begin.
    pub fn next(&self) -> Option<u64> {
        self.next
    }

    /// Another stream begins; what it repeats is skipped.
    pub fn resume(&mut self) {
        self.resumed = true;
    }

    /// What to print for `chunk`.
    pub fn render(&mut self, chunk: &LogChunk) -> Rendered {
        let next = self.next.unwrap_or(chunk.offset);
        let overlap = if self.resumed { next.saturating_sub(chunk.offset) } else { 0 };
        let skip = usize::try_from(overlap).unwrap_or(usize::MAX).min(chunk.data.len());
        let data = &chunk.data[skip..];
        let mut rendered = Rendered { bytes: Vec::new(), missing: 0 };
        if data.is_empty() {
            return rendered;
        }
        rendered.missing = chunk.offset.saturating_sub(next);
        let length = u64::try_from(chunk.data.len()).unwrap_or(u64::MAX);
        self.next = Some(next.max(chunk.offset.saturating_add(length)));
        let broken_line = rendered.missing > 0 && !self.line_start;
        match self.format {
            Format::Json => {
                let offset = chunk.offset.saturating_add(overlap);
                rendered.bytes = self.object(data, offset, chunk.line_unix_ns);
            }
            Format::Human if self.timestamps => {
                if broken_line {
                    rendered.bytes.push(b'\n');
                    self.line_start = true;
                }
                self.prefixed(data, chunk.line_unix_ns, &mut rendered.bytes);
            }
            Format::Human => rendered.bytes.extend_from_slice(data),
        }
        self.line_start = data.ends_with(b"\n");
        rendered
    }

    fn object(&self, data: &[u8], offset: u64, line_unix_ns: i64) -> Vec<u8> {
        let object = serde_json::json!({
            "offset": offset,
            "line_unix_ns": line_unix_ns,
            "starts_line": self.line_start,
            "text": String::from_utf8_lossy(data),
        });
        format!("{object}\n").into_bytes()
    }

    fn prefixed(&self, data: &[u8], line_unix_ns: i64, into: &mut Vec<u8>) {
        let (seconds, nanos) =
            (line_unix_ns.div_euclid(1_000_000_000), line_unix_ns.rem_euclid(1_000_000_000));
        let mut line_start = self.line_start;
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            if line_start {
                into.extend_from_slice(format!("{seconds}.{nanos:09} ").as_bytes());
            }
            into.extend_from_slice(piece);
            line_start = true;
        }
    }

    /// Prints a chunk on stdout; says on stderr if output before it is lost.
    pub fn print(&mut self, chunk: &LogChunk) -> Result<bool, Failure> {
        let rendered = self.render(chunk);
        if rendered.missing > 0 {
            let text = format!("{} bytes of output are no longer kept", rendered.missing);
            note(self.format, &text);
        }
        if rendered.bytes.is_empty() {
            return Ok(false);
        }
        write_out(&rendered.bytes)?;
        Ok(true)
    }
}

/// How a stream of output ended.
#[derive(Debug)]
pub enum Ended {
    /// There is no more, or nobody wants more.
    Finished,
    /// The workload runs at another daemon now.
    MovedTo(String),
    /// The connection broke.
    Lost(ClientError),
}

/// What a received message, or the end of a stream, means: a chunk to print,
/// or how the stream ended.
pub fn received(
    client: &Client,
    doing: &str,
    message: Result<Option<LogChunk>, tonic::Status>,
) -> Result<Result<LogChunk, Ended>, ClientError> {
    match message {
        Ok(Some(chunk)) => Ok(Ok(chunk)),
        Ok(None) => Ok(Err(Ended::Finished)),
        Err(status) => {
            let error = client.explain(doing, &status);
            if is_passing(&error) { Ok(Err(Ended::Lost(error))) } else { Err(error) }
        }
    }
}

/// The hosts a workload was followed to.
pub struct Trail {
    workload: String,
    address: String,
    idle_hops: u32,
}

impl Trail {
    /// Begins at the daemon the user named.
    pub fn new(workload: &str, address: &str) -> Self {
        Self { workload: workload.to_owned(), address: address.to_owned(), idle_hops: 0 }
    }

    /// The daemon that has the workload now.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Goes to where a stream said the workload is; `printed`: it brought output.
    pub fn go_on(&mut self, moved_to: Option<String>, printed: bool) -> Result<(), Failure> {
        self.idle_hops = if printed { 0 } else { self.idle_hops + 1 };
        if self.idle_hops > MAX_IDLE_HOPS {
            return Err(Failure::Chasing { workload: self.workload.clone(), hops: self.idle_hops });
        }
        if let Some(address) = moved_to {
            self.address = address;
        }
        Ok(())
    }
}

/// Tries until it works, the failure is not one that passes, or patience ends.
pub async fn patiently<T>(
    mut attempt: impl AsyncFnMut() -> Result<T, ClientError>,
) -> Result<T, ClientError> {
    let mut tries = 0;
    loop {
        match attempt().await {
            Err(error) if tries < RETRIES && is_passing(&error) => {
                tries += 1;
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// Whether waiting may help: the daemon is starting, or the workload arriving.
fn is_passing(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { .. } | ClientError::Lost { .. } => true,
        ClientError::NotMigrd { .. } => false,
        ClientError::Refused { refusal, .. } => {
            matches!(refusal.status, Code::Unavailable | Code::NotFound)
        }
    }
}

/// Opens a stream with `open`, at once or with patience.
pub async fn opened(
    patient: bool,
    mut open: impl AsyncFnMut() -> Result<(Client, Streaming<LogChunk>), ClientError>,
) -> Result<(Client, Streaming<LogChunk>), ClientError> {
    if patient { patiently(open).await } else { open().await }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn chunk(offset: u64, data: &[u8], line_unix_ns: i64) -> LogChunk {
        LogChunk { data: Bytes::copy_from_slice(data), line_unix_ns, offset, ..LogChunk::default() }
    }

    fn shown(printer: &mut Printer, chunk: &LogChunk) -> String {
        String::from_utf8(printer.render(chunk).bytes).unwrap()
    }

    #[test]
    fn a_line_in_pieces_has_one_timestamp() {
        let mut printer = Printer::new(Format::Human, true, Some(0));
        assert_eq!(shown(&mut printer, &chunk(0, b"be", 1_000_000_002)), "1.000000002 be");
        assert_eq!(shown(&mut printer, &chunk(2, b"at\n", 1_000_000_002)), "at\n");
        assert_eq!(shown(&mut printer, &chunk(5, b"x\n", 2_500_000_000)), "2.500000000 x\n");
    }

    #[test]
    fn what_the_new_host_repeats_is_not_printed_again() {
        let mut printer = Printer::new(Format::Human, true, Some(0));
        shown(&mut printer, &chunk(0, b"one\ntw", 0));
        printer.resume();
        assert_eq!(shown(&mut printer, &chunk(0, b"one\n", 0)), "");
        assert_eq!(shown(&mut printer, &chunk(4, b"two\n", 0)), "o\n");
        assert_eq!(printer.next(), Some(8));
    }

    #[test]
    fn lost_output_is_counted_and_starts_a_new_line() {
        let mut printer = Printer::new(Format::Human, true, Some(0));
        shown(&mut printer, &chunk(0, b"half", 0));
        let rendered = printer.render(&chunk(10, b"rest\n", 0));
        assert_eq!(rendered.missing, 6);
        assert_eq!(rendered.bytes, b"\n0.000000000 rest\n");
    }

    #[test]
    fn an_attached_console_does_not_miss_what_came_before() {
        let mut printer = Printer::new(Format::Human, false, None);
        assert_eq!(printer.render(&chunk(900, b"now", 0)).missing, 0);
        assert_eq!(printer.next(), Some(903));
    }

    proptest! {
        /// However the output is cut into chunks, and wherever each stream
        /// begins again, every byte is printed once.
        #[test]
        fn every_byte_is_printed_once(
            text in prop::collection::vec(any::<u8>(), 1..200),
            streams in prop::collection::vec((0.0..1.0f64, 1usize..20), 1..6),
        ) {
            let mut printer = Printer::new(Format::Human, false, Some(0));
            let mut out = Vec::new();
            for (number, (back, size)) in streams.iter().enumerate() {
                let next = usize::try_from(printer.next().unwrap()).unwrap();
                let until = if number + 1 == streams.len() { text.len() } else { (next + 7).min(text.len()) };
                let start = if *back < 0.5 { 0 } else { next };
                for (index, piece) in text[start..until].chunks(*size).enumerate() {
                    let offset = u64::try_from(start + index * size).unwrap();
                    let rendered = printer.render(&chunk(offset, piece, 0));
                    prop_assert_eq!(rendered.missing, 0);
                    out.extend(rendered.bytes);
                }
                printer.resume();
            }
            prop_assert_eq!(out, text);
        }

        #[test]
        fn hostile_chunks_do_not_panic(
            chunks in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 0..9), any::<i64>()), 0..9),
            resumed in any::<bool>(),
            json in any::<bool>(),
        ) {
            let format = if json { Format::Json } else { Format::Human };
            let mut printer = Printer::new(format, true, Some(0));
            if resumed {
                printer.resume();
            }
            for (offset, data, ns) in chunks {
                printer.render(&chunk(offset, &data, ns));
            }
        }
    }
}
