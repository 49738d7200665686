//! The command line of the witness.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use witness::memory::{Filled, parse_size};
use witness::stop::Stop;
use witness::{client, guest, records};

/// Notices what a migration must not do to a Linux guest: lost bytes on its disk and its
/// connections, stalls, clocks that go back.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Append checksummed records to a file and sync each, until SIGTERM.
    Records(RecordsArgs),
    /// Check every record of a file and print what is there.
    Check {
        /// The file of records.
        file: PathBuf,
    },
    /// Serve clients over TCP, until SIGTERM.
    Serve(ServeArgs),
    /// Keep one connection to a server and check every byte; prints JSON lines.
    Client(ClientArgs),
    /// Watch that no clock goes back on any CPU, until SIGTERM.
    Clock {
        /// End after this many seconds.
        #[arg(long = "for", value_name = "SECONDS")]
        end_after: Option<u64>,
    },
    /// Fill memory with data that does not compress, then free it.
    Memory {
        /// How much, such as 512M.
        #[arg(value_parser = parse_size)]
        size: usize,
        /// Keep it this many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        hold: u64,
    },
    /// All that a guest does: records, server, clocks, and a heartbeat each second.
    Guest(GuestArgs),
}

#[derive(Args)]
struct RecordsArgs {
    /// The file of records; what it has is checked and kept.
    file: PathBuf,
    /// Records a second.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
}

#[derive(Args)]
struct ServeArgs {
    /// The port, on all addresses.
    port: u16,
    /// Milliseconds between two ticks.
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
}

#[derive(Args)]
struct ClientArgs {
    /// The server's address.
    address: IpAddr,
    /// The server's port.
    port: u16,
    /// Milliseconds between two frames.
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// End after this many seconds; else at SIGTERM or SIGINT.
    #[arg(long = "for", value_name = "SECONDS")]
    end_after: Option<u64>,
    /// Seconds that the last frames may take to come back.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain: u64,
}

#[derive(Args)]
struct GuestArgs {
    /// Where records go; none are written without it.
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
    /// The port that is served.
    #[arg(long, default_value_t = 7007)]
    port: u16,
    /// Seconds between two heartbeats; 0: none.
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    heartbeat: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = Stop::on_signal()
        .map_err(|errno| format!("cannot wait for signals: {errno}"))
        .and_then(|stop| run(cli.verb, &stop));
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("witness: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all was as it must be.
fn run(verb: Verb, stop: &Stop) -> Result<bool, String> {
    match verb {
        Verb::Records(RecordsArgs { file, rate }) => {
            let record_every = Duration::from_secs(1) / rate;
            part(guest::Options { records: Some(file), record_every, ..nothing() }, stop)
        }
        Verb::Check { file } => {
            let found = records::check(&file).map_err(|error| error.to_string())?;
            print(&found);
            Ok(true)
        }
        Verb::Serve(ServeArgs { port, every }) => {
            let tick_every = Duration::from_millis(every);
            part(guest::Options { port: Some(port), tick_every, ..nothing() }, stop)
        }
        Verb::Client(arguments) => Ok(connect(&arguments, stop)),
        Verb::Clock { end_after } => {
            end_later(end_after, stop);
            part(guest::Options { clocks: true, ..nothing() }, stop)
        }
        Verb::Memory { size, hold } => {
            let filled = Filled::new(size);
            println!("filled {} bytes", filled.bytes());
            let _ = stop.sleep_until(std::time::Instant::now() + Duration::from_secs(hold));
            drop(filled);
            println!("freed {size} bytes");
            Ok(true)
        }
        Verb::Guest(GuestArgs { records, port, heartbeat }) => {
            let heartbeat = Duration::from_secs(heartbeat);
            let all = guest::Options { records, port: Some(port), clocks: true, ..nothing() };
            part(guest::Options { heartbeat, ..all }, stop)
        }
    }
}

/// A guest that does nothing.
fn nothing() -> guest::Options {
    guest::Options {
        records: None,
        record_every: Duration::from_millis(20),
        port: None,
        tick_every: Duration::from_millis(20),
        clocks: false,
        heartbeat: Duration::ZERO,
    }
}

/// What the parts of a guest have seen, at the end.
#[derive(Serialize)]
struct Seen {
    records: u64,
    faults: u64,
    clocks: witness::clocks::ClockReport,
}

fn part(options: guest::Options, stop: &Stop) -> Result<bool, String> {
    let status = guest::run(&options, stop).map_err(|error| error.to_string())?;
    let (records, faults, clocks) = (status.records(), status.faults(), status.clocks().report());
    print(&Seen { records, faults, clocks });
    Ok(faults == 0)
}

fn connect(arguments: &ClientArgs, stop: &Stop) -> bool {
    let options = client::Options {
        address: SocketAddr::new(arguments.address, arguments.port),
        every: Duration::from_millis(arguments.every),
        report_every: Duration::from_secs(1),
        end_after: arguments.end_after.map(Duration::from_secs),
        drain: Duration::from_secs(arguments.drain),
    };
    let summary = client::run(&options, stop, print);
    print(&summary);
    summary.good
}

/// Sets the flag after some seconds.
fn end_later(seconds: Option<u64>, stop: &Stop) {
    if let Some(seconds) = seconds {
        let stop = stop.clone();
        std::thread::spawn(move || {
            if stop.sleep_until(std::time::Instant::now() + Duration::from_secs(seconds)) {
                stop.now();
            }
        });
    }
}

/// One JSON line.
fn print(what: &impl Serialize) {
    match serde_json::to_string(what) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("witness: cannot print: {error}"),
    }
}
