//! The client's side: one connection, every byte and every sequence number in both directions
//! checked, and the longest silence measured.
//!
//! One thread asks at a fixed pace, one reads; the caller's thread reports. At the end the client
//! stops asking and waits for the echoes that are still due.

use std::io::{self, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;

use crate::clocks::Clocks;
use crate::frame::{Frame, FrameError, Kind};
use crate::stop::{Pace, Stop};

/// How a client behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The server.
    pub address: SocketAddr,
    /// A frame is sent this often.
    pub every: Duration,
    /// A report is made this often.
    pub report_every: Duration,
    /// It ends by itself after this time; nothing: only when it is stopped.
    pub end_after: Option<Duration>,
    /// At the end, echoes that are due are waited for as long as this.
    pub drain: Duration,
}

/// What a client has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Time since the connection was made, in ms.
    pub elapsed_ms: u64,
    /// Ticks of the server.
    pub ticks: u64,
    /// Frames that were sent.
    pub asked: u64,
    /// Of them, those that came back.
    pub echoed: u64,
    /// The longest time in which no frame came, in ms.
    pub longest_silence_ms: u64,
    /// When that silence ended, in ms since the connection was made.
    pub longest_silence_at_ms: u64,
    /// Time since the last frame, in ms.
    pub silent_ms: u64,
    /// Records that the server said it has on its disk.
    pub server_records: u64,
    /// What the server found wrong on its side.
    pub server_faults: u64,
    /// The server's wall clock minus this machine's, in µs: that of the tick since the last
    /// report that was delayed least, since delay makes it smaller.
    pub wall_offset_us: i64,
    /// The server's monotonic clock at its last tick, in ns.
    pub server_monotonic_ns: u64,
}

/// The end of a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Whether everything was as it must be.
    pub good: bool,
    /// What was not.
    pub error: Option<String>,
    /// All that was seen.
    #[serde(flatten)]
    pub progress: Progress,
}

/// What a client found wrong.
#[derive(Debug, Error)]
pub enum ClientError {
    /// There is no connection.
    #[error("cannot connect to {address}: {source}; is the server up, and the way to it?")]
    Connect {
        /// The server.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// A frame is damaged, or the connection failed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The server closed the connection.
    #[error("the server ended the connection")]
    Closed,
    /// A frame came that was not due.
    #[error("a {kind:?} frame with number {got} came where {expected} was due")]
    Unexpected {
        /// Its kind.
        kind: Kind,
        /// Its number.
        got: u64,
        /// The number that was due.
        expected: u64,
    },
    /// A clock of the server went back between two frames.
    #[error("the server's {clock} clock went back by {back_ns} ns")]
    ClockWentBack {
        /// Which clock.
        clock: &'static str,
        /// By how much, in ns.
        back_ns: u64,
    },
    /// The server lost records that it had.
    #[error("the server had {before} records and has {after} now")]
    RecordsLost {
        /// Earlier.
        before: u64,
        /// Later.
        after: u64,
    },
    /// The server says that something is wrong on its side.
    #[error("the server found {0} faults on its side; its console says which")]
    ServerFaults(u64),
    /// Echoes did not come.
    #[error("{missing} frames did not come back within {waited:?} after the last was sent")]
    Missing {
        /// How many.
        missing: u64,
        /// How long they were waited for.
        waited: Duration,
    },
}

/// What the reader knows; shared with the reporter.
#[derive(Debug)]
struct Ears {
    started: Instant,
    last_frame: Instant,
    last: Option<Frame>,
    /// The largest wall offset since the last report, in µs.
    offset_us: Option<i64>,
    progress: Progress,
    failed: Option<ClientError>,
}

impl Ears {
    fn new(now: Instant) -> Self {
        let progress = Progress::default();
        Self { started: now, last_frame: now, last: None, offset_us: None, progress, failed: None }
    }

    /// A frame came at `now`; `asked` have been sent.
    fn heard(
        &mut self,
        frame: &Frame,
        asked: u64,
        now: Instant,
        wall: Clocks,
    ) -> Result<(), ClientError> {
        let (due, expected) = match frame.kind {
            Kind::Tick => (true, self.progress.ticks),
            Kind::Echo => (self.progress.echoed < asked, self.progress.echoed),
            Kind::Ask => (false, asked),
        };
        if !due || frame.sequence != expected {
            let (kind, got) = (frame.kind, frame.sequence);
            return Err(ClientError::Unexpected { kind, got, expected });
        }
        match frame.kind {
            Kind::Tick => {
                self.progress.ticks += 1;
                let offset = offset_us(frame.clocks.realtime_ns, wall.realtime_ns);
                self.offset_us = self.offset_us.max(Some(offset));
                self.progress.server_monotonic_ns = frame.clocks.monotonic_ns;
            }
            Kind::Ask | Kind::Echo => self.progress.echoed += 1,
        }
        if let Some(last) = self.last.replace(*frame) {
            follows(&last, frame)?;
        }
        self.silence(now);
        self.last_frame = now;
        self.progress.server_records = frame.records;
        self.progress.server_faults = frame.faults;
        Ok(())
    }

    fn silence(&mut self, now: Instant) {
        let silence = milliseconds(now.duration_since(self.last_frame));
        if silence > self.progress.longest_silence_ms {
            self.progress.longest_silence_ms = silence;
            self.progress.longest_silence_at_ms = milliseconds(now.duration_since(self.started));
        }
    }

    fn report(&mut self, asked: u64, now: Instant) -> Progress {
        self.progress.wall_offset_us =
            self.offset_us.take().unwrap_or(self.progress.wall_offset_us);
        let silent_ms = milliseconds(now.saturating_duration_since(self.last_frame));
        let elapsed_ms = milliseconds(now.duration_since(self.started));
        Progress { elapsed_ms, asked, silent_ms, ..self.progress.clone() }
    }
}

/// The server's frames are made by one thread in order: its clocks and records only grow.
fn follows(last: &Frame, frame: &Frame) -> Result<(), ClientError> {
    let clocks = [
        ("monotonic", last.clocks.monotonic_ns, frame.clocks.monotonic_ns),
        ("realtime", last.clocks.realtime_ns, frame.clocks.realtime_ns),
    ];
    for (clock, before, after) in clocks {
        if let Some(back_ns) = before.checked_sub(after).filter(|back| *back > 0) {
            return Err(ClientError::ClockWentBack { clock, back_ns });
        }
    }
    if frame.records < last.records {
        let (before, after) = (last.records, frame.records);
        return Err(ClientError::RecordsLost { before, after });
    }
    Ok(())
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn offset_us(server_ns: u64, here_ns: u64) -> i64 {
    let offset = (i128::from(server_ns) - i128::from(here_ns)) / 1000;
    i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX })
}

/// A reader that panicked left what it knew as it was.
fn lock(ears: &Mutex<Ears>) -> MutexGuard<'_, Ears> {
    ears.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a client until it is stopped, its time is over, or something is wrong. `report` is
/// called at the pace of the options.
pub fn run(options: &Options, stop: &Stop, mut report: impl FnMut(&Progress)) -> Summary {
    let address = options.address;
    let stream = match TcpStream::connect(address) {
        Ok(stream) => stream,
        Err(source) => {
            let error = ClientError::Connect { address, source };
            return summary(Progress::default(), Some(error));
        }
    };
    let ears = Arc::new(Mutex::new(Ears::new(Instant::now())));
    let asked = Arc::new(AtomicU64::new(0));
    let ended = talk(&stream, options, stop, (&ears, &asked), &mut report);
    let mut ears = lock(&ears);
    let progress = ears.report(asked.load(Ordering::Acquire), Instant::now());
    let faults = progress.server_faults;
    let error = ears.failed.take().or(ended.err());
    let error = error.or((faults > 0).then_some(ClientError::ServerFaults(faults)));
    summary(progress, error)
}

fn summary(progress: Progress, error: Option<ClientError>) -> Summary {
    Summary { good: error.is_none(), error: error.map(|error| error.to_string()), progress }
}

/// The whole of a connection. What the reader found wrong is in `ears`.
fn talk(
    stream: &TcpStream,
    options: &Options,
    stop: &Stop,
    (ears, asked): (&Arc<Mutex<Ears>>, &Arc<AtomicU64>),
    report: &mut impl FnMut(&Progress),
) -> Result<(), ClientError> {
    stream.set_nodelay(true).map_err(FrameError::Io)?;
    let quiet = Stop::new();
    let reader = stream.try_clone().map_err(FrameError::Io)?;
    let writer = stream.try_clone().map_err(FrameError::Io)?;
    let reading = {
        let (ears, asked, quiet) = (Arc::clone(ears), Arc::clone(asked), quiet.clone());
        thread::spawn(move || {
            if let Err(error) = listen(&reader, &ears, &asked) {
                // Only the first failure is one: later ones come of hanging up.
                lock(&ears).failed.get_or_insert(error);
            }
            quiet.now();
        })
    };
    let asking = {
        let (asked, quiet, every) = (Arc::clone(asked), quiet.clone(), options.every);
        thread::spawn(move || ask(&writer, &asked, &quiet, every))
    };
    watch(
        options,
        stop,
        &quiet,
        || lock(ears).report(asked.load(Ordering::Acquire), Instant::now()),
        report,
    );
    quiet.now();
    let missing = drain(options.drain, ears, asked, || asking.is_finished());
    let failure = lock(ears).failed.take();
    let _ = stream.shutdown(Shutdown::Both);
    let sent = asking.join().unwrap_or(Ok(()));
    let _ = reading.join();
    lock(ears).failed = failure;
    match missing {
        0 => Ok(()),
        missing => {
            sent?;
            Err(ClientError::Missing { missing, waited: options.drain })
        }
    }
}

/// Reports until it is time to end.
fn watch(
    options: &Options,
    stop: &Stop,
    quiet: &Stop,
    progress: impl Fn() -> Progress,
    report: &mut impl FnMut(&Progress),
) {
    let started = Instant::now();
    let end = options.end_after.map(|time| started + time);
    let mut next_report = started + options.report_every;
    while !quiet.is_set() {
        let now = Instant::now();
        if end.is_some_and(|end| now >= end) {
            return;
        }
        if now >= next_report {
            report(&progress());
            next_report = now + options.report_every;
        }
        // Short, so that a connection that fails is noticed between two reports.
        let nap = (now + Duration::from_millis(50)).min(next_report);
        if !stop.sleep_until(end.map_or(nap, |end| end.min(nap))) {
            return;
        }
    }
}

/// Waits for the echoes that are due; how many are missing.
fn drain(
    limit: Duration,
    ears: &Mutex<Ears>,
    asked: &AtomicU64,
    asker_ended: impl Fn() -> bool,
) -> u64 {
    let deadline = Instant::now() + limit;
    loop {
        // In this order: an asker that has ended adds no more.
        let ended = asker_ended();
        let missing = asked.load(Ordering::Acquire).saturating_sub(lock(ears).progress.echoed);
        let over = lock(ears).failed.is_some() || Instant::now() >= deadline;
        if over || (ended && missing == 0) {
            return missing;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn listen(stream: &TcpStream, ears: &Mutex<Ears>, asked: &AtomicU64) -> Result<(), ClientError> {
    let mut reader = BufReader::new(stream);
    while let Some(frame) = Frame::read(&mut reader)? {
        let wall = Clocks::now().map_err(|errno| FrameError::Io(errno.into()))?;
        let asked = asked.load(Ordering::Acquire);
        lock(ears).heard(&frame, asked, Instant::now(), wall)?;
    }
    Err(ClientError::Closed)
}

fn ask(
    mut stream: &TcpStream,
    asked: &AtomicU64,
    quiet: &Stop,
    every: Duration,
) -> Result<(), FrameError> {
    let mut pace = Pace::every(every);
    let mut sequence = 0;
    while pace.wait(quiet) {
        let clocks = Clocks::now().map_err(io::Error::from)?;
        let frame = Frame { kind: Kind::Ask, sequence, clocks, records: 0, faults: 0 };
        // Counted before it is sent: its echo may come before the call returns.
        sequence += 1;
        asked.store(sequence, Ordering::Release);
        stream.write_all(&frame.encode())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
