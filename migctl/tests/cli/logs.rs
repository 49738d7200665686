//! The log, across hosts.

use std::process::{Command, Stdio};

use crate::fake::*;

#[test]
fn timestamps_stand_where_lines_start() {
    let logs = vec![
        chunk(0, "be", 1_700_000_000_000_000_007),
        chunk(2, "at 1\n", 1_700_000_000_000_000_007),
        chunk(7, "beat 2\n", 1_700_000_001_500_000_000),
    ];
    let fake = Fake::start(Script { logs, ..Script::default() });
    let run = fake.migctl(&["logs", "web", "--timestamps"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(run.stdout, "1700000000.000000007 beat 1\n1700000001.500000000 beat 2\n");
    assert_eq!(fake.migctl(&["logs", "web"]).stdout, "beat 1\nbeat 2\n");
    let json = fake.migctl(&["-o", "json", "logs", "web"]).stdout;
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!(keys(&first), ["line_unix_ns", "offset", "starts_line", "text"]);
}

#[test]
fn following_goes_on_at_the_new_host_where_it_stopped() {
    let there = Fake::start(Script {
        logs: vec![chunk(0, "one\ntwo\n", 5), chunk(8, "three\n", 6)],
        ..Script::default()
    });
    let here = Fake::start(Script {
        logs: vec![chunk(0, "one\ntw", 5), moved(there.address, 6)],
        ..Script::default()
    });
    let run = here.migctl(&["logs", "web", "--follow"]);
    assert_eq!((run.status, run.stdout.as_str()), (0, "one\ntwo\nthree\n"), "{}", run.stderr);
    assert!(there.requests()[0].contains("from_offset: 6"), "{:?}", there.requests());
    assert!(there.requests()[0].contains("follow: true"));
}

#[test]
fn a_workload_that_never_stays_is_given_up() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let fake = Fake::start_at(port, Script { logs: vec![moved(port, 0)], ..Script::default() });
    let run = fake.migctl(&["logs", "web", "--follow"]);
    assert_eq!(run.status, 1);
    assert!(run.stderr.contains("without ever staying"), "{}", run.stderr);
}

#[test]
fn lost_output_is_admitted() {
    let logs = vec![chunk(100, "late\n", 0)];
    let run = Fake::start(Script { logs, ..Script::default() }).migctl(&["logs", "web"]);
    assert_eq!(run.stdout, "late\n");
    assert!(run.stderr.contains("100 bytes of output are no longer kept"), "{}", run.stderr);
}

#[test]
fn a_reader_that_leaves_ends_it_quietly() {
    let logs = (0..60).map(|n| chunk(n * 4096, &"x".repeat(4096), 0)).collect();
    let fake = Fake::start(Script { logs, ..Script::default() });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(BINARY)
        .args(["--host", &fake.address.to_string(), "logs", "web"])
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(141), &b""[..]));
}

#[test]
fn following_survives_a_restart_of_the_daemon() {
    let logs = vec![chunk(0, "one\n", 0)];
    let first = Fake::start(Script { logs, hold: true, ..Script::default() });
    let mut running = first.spawn(&["logs", "web", "--follow"]);
    running.wait_for_output();
    let address = first.address;
    drop(first);
    let logs = vec![chunk(4, "two\n", 0)];
    let second = Fake::start_at(address, Script { logs, ..Script::default() });
    let run = running.end();
    assert_eq!((run.status, run.stdout.as_str()), (0, "one\ntwo\n"), "{}", run.stderr);
    assert!(second.requests()[0].contains("from_offset: 4"), "{:?}", second.requests());
}

#[test]
fn a_log_cut_short_is_an_error() {
    let logs = vec![chunk(0, "one\n", 0)];
    let fake = Fake::start(Script { logs, hold: true, ..Script::default() });
    let mut running = fake.spawn(&["logs", "web"]);
    running.wait_for_output();
    drop(fake);
    let run = running.end();
    assert_eq!((run.status, run.stdout.as_str()), (1, "one\n"));
    assert!(run.stderr.contains("was lost"), "{}", run.stderr);
}
