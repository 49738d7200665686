//! Everything at once, as the guest's init starts it: records, clocks, server, heartbeat.

use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use thiserror::Error;

use crate::clocks::{self, Clocks};
use crate::records::Writer;
use crate::server::{self, Status};
use crate::stop::{Pace, Stop};

/// What is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where records go; nothing: none are written.
    pub records: Option<PathBuf>,
    /// A record is written this often.
    pub record_every: Duration,
    /// The port that is served, on all addresses; nothing: none.
    pub port: Option<u16>,
    /// A tick is sent to each client this often.
    pub tick_every: Duration,
    /// Whether the clocks are watched.
    pub clocks: bool,
    /// A heartbeat is printed this often; zero: never.
    pub heartbeat: Duration,
}

/// Why it cannot be started.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The port is not to be had.
    #[error("cannot listen on port {port}: {source}")]
    Listen {
        /// The port.
        port: u16,
        /// The system's reason.
        source: io::Error,
    },
    /// The clocks cannot be watched.
    #[error("cannot watch the clocks: {0}")]
    Clocks(#[from] nix::Error),
}

/// Runs all of it until it is stopped; the faults are in what is returned.
///
/// # Errors
/// When the port is not to be had or the clocks cannot be watched.
pub fn run(options: &Options, stop: &Stop) -> Result<Arc<Status>, GuestError> {
    let status = Arc::new(Status::default());
    let watch = match options.clocks {
        true => clocks::watch(status.clocks(), stop)?,
        false => Vec::new(),
    };
    if let Some(port) = options.port {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .map_err(|source| GuestError::Listen { port, source })?;
        let (status, every) = (Arc::clone(&status), options.tick_every);
        thread::spawn(move || server::serve(&listener, &status, every));
    }
    let writer = options.records.clone().map(|path| {
        let (status, every, stop) = (Arc::clone(&status), options.record_every, stop.clone());
        thread::spawn(move || write(path, every, &status, &stop))
    });
    heartbeats(options.heartbeat, &status, stop);
    for thread in watch {
        if let Ok(Err(errno)) = thread.join() {
            status.fault(&format!("the watch of the clocks ended: {errno}"));
        }
    }
    if let Some(writer) = writer {
        let _ = writer.join();
    }
    Ok(status)
}

/// Writes records until it is stopped or the disk fails.
fn write(path: PathBuf, every: Duration, status: &Status, stop: &Stop) {
    let mut writer = match Writer::open(&path) {
        Ok(writer) => writer,
        Err(error) => return status.fault(&format!("{}: {error}", path.display())),
    };
    status.set_records(writer.records());
    let mut pace = Pace::every(every);
    while pace.wait(stop) {
        if let Err(error) = writer.append() {
            return status.fault(&format!("{}: {error}", path.display()));
        }
        status.set_records(writer.records());
    }
}

/// Prints a line with all figures so often, until it is stopped.
fn heartbeats(every: Duration, status: &Status, stop: &Stop) {
    let printed = !every.is_zero();
    let mut pace = Pace::every(if printed { every } else { Duration::from_secs(1) });
    let mut beat: u64 = 0;
    while pace.wait(stop) {
        if printed {
            // A console that is gone is no reason to stop the rest.
            let _ = writeln!(io::stdout(), "{}", line(beat, status));
        }
        beat += 1;
    }
}

/// `witness beat=3 monotonic_ns=… realtime_ns=… records=150 clients=1 faults=0`
fn line(beat: u64, status: &Status) -> String {
    let clocks = Clocks::now().unwrap_or(Clocks { monotonic_ns: 0, realtime_ns: 0 });
    let Clocks { monotonic_ns, realtime_ns } = clocks;
    let (records, clients, faults) = (status.records(), status.clients(), status.faults());
    format!(
        "witness beat={beat} monotonic_ns={monotonic_ns} realtime_ns={realtime_ns} \
         records={records} clients={clients} faults={faults}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records;

    fn options(records: PathBuf) -> Options {
        Options {
            records: Some(records),
            record_every: Duration::from_millis(1),
            port: None,
            tick_every: Duration::from_millis(1),
            clocks: true,
            heartbeat: Duration::ZERO,
        }
    }

    #[test]
    fn records_are_written_until_it_is_stopped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("records");
        let (options, stop) = (options(path.clone()), Stop::new());
        let running = {
            let stop = stop.clone();
            thread::spawn(move || run(&options, &stop).unwrap())
        };
        while !running.is_finished() && records::check(&path).map_or(0, |s| s.records) < 3 {
            thread::yield_now();
        }
        stop.now();
        let status = running.join().unwrap();
        assert!(status.records() >= 3);
        assert_eq!(records::check(&path).unwrap().records, status.records());
        assert_eq!(status.faults(), status.clocks().report().violations());
    }

    #[test]
    fn a_disk_that_takes_no_records_is_a_fault_that_the_heartbeat_tells() {
        let status = Status::default();
        let nowhere = PathBuf::from("/dev/null/records");
        write(nowhere, Duration::ZERO, &status, &Stop::new());
        assert_eq!(status.faults(), 1);
        assert!(line(4, &status).starts_with("witness beat=4 monotonic_ns="));
        assert!(line(4, &status).ends_with("records=0 clients=0 faults=1"));
    }
}
