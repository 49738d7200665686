use std::net::{Ipv4Addr, TcpListener};

use super::*;
use crate::server::{self, Status};

const QUICK: Duration = Duration::from_millis(2);

fn options(address: SocketAddr) -> Options {
    Options {
        address,
        every: QUICK,
        report_every: QUICK,
        end_after: None,
        drain: Duration::from_secs(60),
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn served() -> (Arc<Status>, SocketAddr) {
    let (listener, address) = listener();
    let status = Arc::new(Status::default());
    let of_server = Arc::clone(&status);
    thread::spawn(move || server::serve(&listener, &of_server, QUICK));
    (status, address)
}

/// A server that reads one frame and then sends `bytes`.
fn sends(bytes: Vec<u8>) -> SocketAddr {
    let (listener, address) = listener();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        Frame::read(&mut stream).unwrap();
        stream.write_all(&bytes).unwrap();
        // Open until the client hangs up.
        while let Ok(Some(_)) = Frame::read(&mut stream) {}
    });
    address
}

fn frame(kind: Kind, sequence: u64, monotonic_ns: u64) -> Frame {
    let clocks = Clocks { monotonic_ns, realtime_ns: 1 };
    Frame { kind, sequence, clocks, records: 0, faults: 0 }
}

fn error_of(bytes: Vec<u8>) -> String {
    let summary = run(&options(sends(bytes)), &Stop::new(), |_| {});
    assert!(!summary.good);
    summary.error.unwrap()
}

#[test]
fn server_and_client_exchange_frames_until_the_client_is_stopped() {
    let (status, address) = served();
    status.set_records(7);
    let stop = Stop::new();
    let summary = run(&options(address), &stop, |progress| {
        if progress.ticks >= 20 && progress.echoed >= 20 {
            stop.now();
        }
    });
    assert_eq!(summary.error, None);
    assert!(summary.good);
    let progress = summary.progress;
    assert!(progress.ticks >= 20, "{progress:?}");
    assert_eq!(progress.asked, progress.echoed);
    assert_eq!((progress.server_records, progress.server_faults), (7, 0));
}

#[test]
fn a_fault_of_the_server_makes_the_client_fail() {
    let (status, address) = served();
    status.fault("a test's fault");
    let options = Options { end_after: Some(Duration::from_millis(100)), ..options(address) };
    let summary = run(&options, &Stop::new(), |_| {});
    assert!(!summary.good);
    assert!(summary.error.unwrap().contains("1 faults on its side"));
}

#[test]
fn damaged_bytes_from_a_client_are_a_fault_of_the_connection() {
    let (status, address) = served();
    let mut stream = TcpStream::connect(address).unwrap();
    let mut bytes = frame(Kind::Ask, 0, 1).encode();
    bytes[60] ^= 1;
    stream.write_all(&bytes).unwrap();
    // The server hangs up, after the ticks it had sent.
    while let Ok(Some(_)) = Frame::read(&mut stream) {}
    while status.clients() > 0 || status.faults() == 0 {
        thread::yield_now();
    }
    assert_eq!(status.faults(), 1);
}

#[test]
fn damaged_bytes_from_the_server_make_the_client_fail() {
    let mut bytes = frame(Kind::Tick, 0, 1).encode();
    bytes[70] ^= 1;
    assert!(error_of(bytes).contains("checksum"));
}

#[test]
fn a_missing_frame_makes_the_client_fail() {
    let error = error_of(frame(Kind::Tick, 1, 1).encode());
    assert!(error.contains("Tick frame with number 1 came where 0 was due"), "{error}");
}

#[test]
fn an_echo_of_what_was_never_sent_makes_the_client_fail() {
    let (mut ears, now) = (Ears::new(Instant::now()), Instant::now());
    let wall = Clocks { monotonic_ns: 0, realtime_ns: 0 };
    let error = ears.heard(&frame(Kind::Echo, 0, 1), 0, now, wall).unwrap_err();
    assert!(matches!(error, ClientError::Unexpected { kind: Kind::Echo, .. }), "{error}");
}

#[test]
fn a_server_whose_clock_goes_back_makes_the_client_fail() {
    let mut bytes = frame(Kind::Tick, 0, 500).encode();
    bytes.extend(frame(Kind::Tick, 1, 499).encode());
    assert!(error_of(bytes).contains("monotonic clock went back by 1 ns"));
}

#[test]
fn a_server_that_hangs_up_makes_the_client_fail() {
    let (listener, address) = listener();
    thread::spawn(move || drop(listener.accept().unwrap()));
    let summary = run(&options(address), &Stop::new(), |_| {});
    assert!(!summary.good);
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let (listener, address) = listener();
    drop(listener);
    let summary = run(&options(address), &Stop::new(), |_| {});
    assert!(summary.error.unwrap().contains(&address.to_string()));
}

#[test]
fn echoes_that_never_come_are_counted_as_missing() {
    let address = sends(frame(Kind::Tick, 0, 1).encode());
    let options = Options {
        drain: Duration::from_millis(50),
        end_after: Some(Duration::from_millis(50)),
        ..options(address)
    };
    let summary = run(&options, &Stop::new(), |_| {});
    assert!(summary.error.unwrap().contains("did not come back"));
}

#[test]
fn the_longest_silence_is_measured_between_frames() {
    let start = Instant::now();
    let wall = Clocks { monotonic_ns: 0, realtime_ns: 0 };
    let mut ears = Ears::new(start);
    let after = |ms| start + Duration::from_millis(ms);
    for (sequence, ms) in [(0, 10), (1, 310), (2, 330)] {
        ears.heard(&frame(Kind::Tick, sequence, ms), 0, after(ms), wall).unwrap();
    }
    let progress = ears.report(0, after(400));
    assert_eq!((progress.longest_silence_ms, progress.longest_silence_at_ms), (300, 310));
    assert_eq!((progress.silent_ms, progress.elapsed_ms), (70, 400));
}

#[test]
fn the_wall_offset_is_that_of_the_least_delayed_tick_since_the_last_report() {
    let start = Instant::now();
    let mut ears = Ears::new(start);
    // The server's wall clock always says 1 ns; so the later it is here, the longer the way was.
    for (sequence, here_us) in [(0, 2_000), (1, 500), (2, 900)] {
        let wall = Clocks { monotonic_ns: 0, realtime_ns: here_us * 1000 + 1 };
        ears.heard(&frame(Kind::Tick, sequence, sequence), 0, start, wall).unwrap();
    }
    assert_eq!(ears.report(0, start).wall_offset_us, -500);
    assert_eq!(ears.report(0, start).wall_offset_us, -500);
    let wall = Clocks { monotonic_ns: 0, realtime_ns: 3_000_001 };
    ears.heard(&frame(Kind::Tick, 3, 3), 0, start, wall).unwrap();
    assert_eq!(ears.report(0, start).wall_offset_us, -3000);
}
