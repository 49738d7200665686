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

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &[u8]) -> Vec<u8> {
        [text, b"\n"].concat()
    }

    #[test]
    fn a_flood_that_no_log_takes_is_dropped_and_counted() {
        let console = Console::default();
        let mut sink = console.sink();
        let flood = vec![b'x'; WAITING_BYTES];
        assert_eq!(sink.write(&flood).unwrap(), WAITING_BYTES);
        assert_eq!(console.dropped(), 0, "all of that may wait");
        assert_eq!(sink.write(b"too much").unwrap(), 8, "the guest never waits");
        assert_eq!(console.dropped(), 8);
        let taken: usize = console.take().iter().map(|piece| piece.bytes.len()).sum();
        assert_eq!(taken, WAITING_BYTES);
        assert_eq!(sink.write(b"y").unwrap(), 1);
        assert_eq!(console.dropped(), 8, "there is room again");
    }

    #[test]
    fn output_is_cut_into_lines() {
        let console = Console::default();
        let mut sink = console.sink();
        sink.write_all(b"one\ntwo\nthr").unwrap();
        let taken = console.take();
        let cut: Vec<_> = taken.iter().map(|p| (p.starts_line, p.bytes.clone())).collect();
        let expected = [(true, line(b"one")), (true, line(b"two")), (true, b"thr".to_vec())];
        assert_eq!(cut, expected);
        sink.write_all(b"ee\n").unwrap();
        let rest = console.take();
        assert_eq!(rest.len(), 1);
        assert!(!rest[0].starts_line, "it goes on with a line whose beginning was taken");
        assert_eq!(rest[0].line_unix_ns, taken[2].line_unix_ns);
        assert_eq!(rest[0].bytes, line(b"ee"));
    }

    /// Keeps what it is given, and says that it lost as much as told.
    struct Kept(std::sync::mpsc::Sender<Vec<Piece>>, u64);

    impl Log for Kept {
        fn write(&mut self, pieces: &[Piece]) {
            // The test may have seen enough.
            let _ = self.0.send(pieces.to_vec());
        }

        fn lost(&self) -> u64 {
            self.1
        }
    }

    #[test]
    fn what_the_log_lost_counts_as_dropped() {
        let console = Console::default();
        let (sender, written) = std::sync::mpsc::channel();
        let draining = console.clone();
        // Drains for ever: it ends with the process.
        std::thread::spawn(move || draining.drain(&mut Kept(sender, 5)));
        console.sink().write_all(b"half a line").unwrap();
        console.flush();
        let bytes: Vec<u8> = written.try_iter().flatten().flat_map(|p| p.bytes).collect();
        assert_eq!(bytes, b"half a line");
        assert_eq!(console.dropped(), 5);
    }
}
