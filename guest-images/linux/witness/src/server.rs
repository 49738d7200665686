//! The server's side of the connections: sends ticks at its own pace and echoes what comes.
//!
//! Each connection has two threads: one reads and checks, the other sends. A client whose bytes
//! are wrong is disconnected, and that counts as a fault which all others are told of.

use std::io::{BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::clocks::{Clocks, Seen};
use crate::frame::{Frame, FrameError, Kind};

/// More connections than this are not served.
const MOST_CLIENTS: usize = 16;
/// Frames of a client that wait for their echo; then no more are read.
const MOST_ECHOES: usize = 256;

/// What this machine has seen so far, as ticks and heartbeats say it.
#[derive(Debug, Default)]
pub struct Status {
    records: AtomicU64,
    faults: AtomicU64,
    clients: AtomicUsize,
    clocks: Arc<Seen>,
}

impl Status {
    /// What the watch of the clocks writes to.
    #[must_use]
    pub fn clocks(&self) -> &Arc<Seen> {
        &self.clocks
    }

    /// Records on the disk.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    /// The disk has this many records now.
    pub fn set_records(&self, records: u64) {
        self.records.store(records, Ordering::Relaxed);
    }

    /// Something went wrong: says it on stderr, and counts it.
    pub fn fault(&self, what: &str) {
        eprintln!("witness: FAULT: {what}");
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// What went wrong so far, clocks that went back included.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed).saturating_add(self.clocks.report().violations())
    }

    /// Connections now.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.load(Ordering::Relaxed)
    }

    fn frame(&self, kind: Kind, sequence: u64) -> Result<Frame, FrameError> {
        let clocks = Clocks::now().map_err(std::io::Error::from)?;
        Ok(Frame { kind, sequence, clocks, records: self.records(), faults: self.faults() })
    }
}

/// Serves connections for ever, with a tick `every` so often.
pub fn serve(listener: &TcpListener, status: &Arc<Status>, every: Duration) {
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) if status.clients() < MOST_CLIENTS => stream,
            // One client too many: it is disconnected.
            Ok(_) => continue,
            Err(error) => {
                eprintln!("witness: cannot accept a connection: {error}");
                thread::sleep(every);
                continue;
            }
        };
        status.clients.fetch_add(1, Ordering::Relaxed);
        let status = Arc::clone(status);
        thread::spawn(move || {
            let ended = connection(&stream, &status, every);
            let _ = stream.shutdown(Shutdown::Both);
            status.clients.fetch_sub(1, Ordering::Relaxed);
            match ended {
                Ok(()) => {}
                // The client is gone, or the network between: it will say which.
                Err(Ended::Frame(FrameError::Io(error))) => {
                    eprintln!("witness: a connection ended: {error}");
                }
                Err(error) => status.fault(&format!("from a client: {error}")),
            }
        });
    }
}

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("frame {got} of kind {kind:?} came where frame {expected} was due")]
    Unexpected { kind: Kind, got: u64, expected: u64 },
}

fn connection(stream: &TcpStream, status: &Arc<Status>, every: Duration) -> Result<(), Ended> {
    stream.set_nodelay(true).map_err(FrameError::Io)?;
    let (echoes, due) = sync_channel(MOST_ECHOES);
    let writer = stream.try_clone().map_err(FrameError::Io)?;
    let sender_status = Arc::clone(status);
    let sender = thread::spawn(move || {
        let sent = send(&writer, &due, &sender_status, every);
        // Wakes the reader, should it be the sender that failed.
        let _ = writer.shutdown(Shutdown::Both);
        sent
    });
    let received = receive(stream, &echoes);
    drop(echoes);
    let sent = sender.join().unwrap_or(Ok(()));
    received.and(sent.map_err(Ended::Frame))
}

/// Reads the client's frames until it closes; they must come in order.
fn receive(stream: &TcpStream, echoes: &SyncSender<u64>) -> Result<(), Ended> {
    let mut reader = BufReader::new(stream);
    let mut expected = 0;
    while let Some(Frame { kind, sequence, .. }) = Frame::read(&mut reader)? {
        if kind != Kind::Ask || sequence != expected {
            return Err(Ended::Unexpected { kind, got: sequence, expected });
        }
        expected += 1;
        if echoes.send(sequence).is_err() {
            break;
        }
    }
    Ok(())
}

/// Sends echoes as they are due and ticks in between, until there is nobody to hear from.
fn send(
    mut writer: &TcpStream,
    due: &Receiver<u64>,
    status: &Status,
    every: Duration,
) -> Result<(), FrameError> {
    let mut ticks = 0;
    let mut next_tick = Instant::now();
    loop {
        let now = Instant::now();
        let frame = if now >= next_tick {
            next_tick = now + every;
            ticks += 1;
            status.frame(Kind::Tick, ticks - 1)?
        } else {
            match due.recv_timeout(next_tick - now) {
                Ok(sequence) => status.frame(Kind::Echo, sequence)?,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        };
        writer.write_all(&frame.encode())?;
    }
}
