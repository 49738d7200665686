//! CRIU's log, of which no more is kept than a cause can be found in.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};

/// How much of a log is looked through (bytes). At its most talkative CRIU
/// writes some MiB for a tree of thousands of mappings.
const LOOKED_THROUGH: u64 = 256 << 20;
/// How many lines with an error are kept.
const ERRORS: usize = 256;
/// How much of a line is kept (bytes).
const LINE: usize = 4 << 10;
/// How much of the log's end is kept (bytes).
const TAIL: usize = 64 << 10;

/// The lines of a log that say that something went wrong, and its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    errors: Vec<String>,
    tail: String,
}

impl Log {
    /// Reads a log from where `from` stands to its end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(from: impl Read) -> io::Result<Self> {
        let mut from = BufReader::new(from.take(LOOKED_THROUGH));
        let mut log = Self::default();
        let mut tail = VecDeque::new();
        let mut line = Vec::new();
        while read_line(&mut from, &mut line)? {
            let text = String::from_utf8_lossy(&line);
            if log.errors.len() < ERRORS && text.contains("Error (") {
                log.errors.push(text.into_owned());
            }
            tail.extend(line.iter().copied().chain([b'\n']));
            tail.drain(..tail.len().saturating_sub(TAIL));
        }
        log.tail = String::from_utf8_lossy(tail.make_contiguous()).into_owned();
        Ok(log)
    }

    /// The lines with errors, from the first on.
    pub fn errors(&self) -> impl Iterator<Item = &str> {
        self.errors.iter().map(String::as_str)
    }

    /// The end of the log, at most 64 KiB.
    #[must_use]
    pub fn tail(&self) -> &str {
        &self.tail
    }

    pub(super) fn lines(&self) -> impl Iterator<Item = &str> {
        self.tail.lines()
    }

    pub(super) fn last_line(&self) -> Option<&str> {
        self.tail.lines().map(str::trim).rfind(|line| !line.is_empty())
    }
}

/// The next line, cut to what is kept of one; false at the end.
fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let mut any = false;
    loop {
        let buffered = match from.fill_buf() {
            Ok(buffered) => buffered,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if buffered.is_empty() {
            return Ok(any);
        }
        any = true;
        let end = buffered.iter().position(|byte| *byte == b'\n');
        let part = &buffered[..end.unwrap_or(buffered.len())];
        line.extend(part.iter().take(LINE - line.len()));
        let used = end.map_or(buffered.len(), |end| end + 1);
        from.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}
