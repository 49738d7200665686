//! Serial output on its way to the log: vCPUs put bytes here and never wait; a
//! thread of its own writes them down.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Output that waits for the log, at most (bytes). What a guest prints beyond
/// that, while the disk does not take it, is counted and lost.
const WAITING_BYTES: usize = 1 << 20;

/// How long the beginning of a line waits for its end before it is written: a
/// guest prints byte by byte, and a wake-up for each would cost it dearly.
const LINE_WAIT: Duration = Duration::from_millis(5);

/// A line of output, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// CLOCK_REALTIME in ns when the line's first byte came.
    pub line_unix_ns: u64,
    /// Whether it begins the line.
    pub starts_line: bool,
    /// Its bytes, with the line feed if it ends the line.
    pub bytes: Vec<u8>,
}

/// Takes output down.
pub trait Log: Send + 'static {
    /// Writes the pieces, in order.
    fn write(&mut self, pieces: &[Piece]);

    /// Bytes that could not be written so far.
    fn lost(&self) -> u64;
}

#[derive(Debug)]
struct Waiting {
    pieces: Vec<Piece>,
    bytes: usize,
    /// The last byte that came ended a line, or none came.
    at_line_start: bool,
    /// Something else than a begun line waits, or someone waits for it.
    urgent: bool,
    /// The thread is writing what it has taken.
    writing: bool,
    dropped: u64,
    /// What the log could not write.
    lost: u64,
    /// When the line that is being printed began.
    line_unix_ns: u64,
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    came: Condvar,
    written: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the serial port puts its output. Takes every byte at once.
#[derive(Clone, Debug)]
pub struct ConsoleSink(Arc<Shared>);

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl ConsoleSink {
    fn push(&self, byte: u8) {
        let mut waiting = self.0.lock();
        if waiting.bytes >= WAITING_BYTES {
            waiting.dropped += 1;
            return;
        }
        let begins = waiting.at_line_start;
        if begins || waiting.pieces.is_empty() {
            if begins {
                waiting.line_unix_ns = now_ns();
            }
            let line_unix_ns = waiting.line_unix_ns;
            waiting.pieces.push(Piece { line_unix_ns, starts_line: begins, bytes: Vec::new() });
        }
        let first = waiting.bytes == 0;
        if let Some(piece) = waiting.pieces.last_mut() {
            piece.bytes.push(byte);
        }
        waiting.bytes += 1;
        waiting.at_line_start = byte == b'\n';
        if byte == b'\n' {
            waiting.urgent = true;
        }
        if first || byte == b'\n' {
            self.0.came.notify_one();
        }
    }
}

impl Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.push(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The other end of a [`ConsoleSink`].
#[derive(Clone, Debug)]
pub struct Console(Arc<Shared>);

impl Default for Console {
    fn default() -> Self {
        let waiting = Waiting {
            pieces: Vec::new(),
            bytes: 0,
            at_line_start: true,
            urgent: false,
            writing: false,
            dropped: 0,
            lost: 0,
            line_unix_ns: 0,
        };
        Self(Arc::new(Shared {
            waiting: Mutex::new(waiting),
            came: Condvar::new(),
            written: Condvar::new(),
        }))
    }
}

impl Console {
    /// For the serial port.
    #[must_use]
    pub fn sink(&self) -> ConsoleSink {
        ConsoleSink(Arc::clone(&self.0))
    }

    /// Bytes lost because the log did not take them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        let waiting = self.0.lock();
        waiting.dropped + waiting.lost
    }

    /// Returns when everything put in so far was written, or lost.
    pub fn flush(&self) {
        let mut waiting = self.0.lock();
        while waiting.bytes > 0 || waiting.writing {
            waiting.urgent = true;
            self.0.came.notify_one();
            waiting = self.0.written.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Writes to `log` for ever.
    pub fn drain(&self, log: &mut impl Log) {
        loop {
            let pieces = self.take();
            log.write(&pieces);
            let mut waiting = self.0.lock();
            waiting.writing = false;
            waiting.lost = log.lost();
            drop(waiting);
            self.0.written.notify_all();
        }
    }

    /// Waits for output that is worth a write.
    fn take(&self) -> Vec<Piece> {
        let waiting = self.0.lock();
        let waiting = self.0.came.wait_while(waiting, |w| w.bytes == 0);
        let waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        let begun = self.0.came.wait_timeout_while(waiting, LINE_WAIT, |w| !w.urgent);
        let (mut waiting, _) = begun.unwrap_or_else(PoisonError::into_inner);
        waiting.urgent = false;
        waiting.bytes = 0;
        waiting.writing = true;
        std::mem::take(&mut waiting.pieces)
    }
}
