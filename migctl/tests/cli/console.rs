//! The console: with a terminal, without one, and across hosts.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use crate::fake::*;

#[test]
fn piped_input_is_sent_and_output_printed_until_it_ends() {
    let console = Some(vec![chunk(10, "login: ", 0), chunk(17, "bye\n", 0)]);
    let fake = Fake::start(Script { console, ..Script::default() });
    let run = fake.migctl(&["console", "web"]);
    assert_eq!((run.status, run.stdout.as_str()), (0, "login: bye\n"), "{}", run.stderr);
    assert!(fake.requests()[0].contains("from_offset: None"));
}

#[test]
fn a_script_leaves_after_the_end_of_its_input() {
    let fake = Fake::start(Script::default());
    let mut running = fake.spawn(&["console", "web", "--detach-after", "2s"]);
    running.type_in("echo \x1d me\n", true);
    let run = running.end();
    assert_eq!((run.status, run.stdout.as_str()), (0, "echo \x1d me\n"), "{}", run.stderr);
}

#[test]
fn the_console_follows_a_move() {
    let there = Fake::start(Script {
        console: Some(vec![chunk(4, "ab", 0), chunk(6, "cd\n", 0)]),
        ..Script::default()
    });
    let here = Fake::start(Script {
        console: Some(vec![chunk(3, "zab", 0), moved(there.address, 6)]),
        ..Script::default()
    });
    let run = here.migctl(&["console", "web"]);
    assert_eq!((run.status, run.stdout.as_str()), (0, "zabcd\n"), "{}", run.stderr);
    assert!(there.requests()[0].contains("from_offset: Some(6)"), "{:?}", there.requests());
}

/// Attaches with a terminal, lets `leave` end it, and gives the exit status.
fn on_a_terminal(leave: impl FnOnce(&mut File, Pid)) -> i32 {
    let fake = Fake::start(Script::default());
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let mut keyboard = File::from(pty.master);
    let mut child = Command::new(BINARY)
        .args(["--host", &fake.address.to_string(), "console", "web"])
        .stdin(Stdio::from(pty.slave.try_clone().unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while tcgetattr(&pty.slave).unwrap().local_flags.contains(LocalFlags::ICANON) {
        assert!(child.try_wait().unwrap().is_none(), "it ended without raw mode");
        std::thread::sleep(Duration::from_millis(10));
    }
    leave(&mut keyboard, Pid::from_raw(child.id().try_into().unwrap()));
    let status = child.wait().unwrap().code().unwrap();
    assert!(tcgetattr(&pty.slave).unwrap() == before, "the terminal was not put back");
    status
}

#[test]
fn the_escape_key_detaches_and_puts_the_terminal_back() {
    assert_eq!(on_a_terminal(|keyboard, _| keyboard.write_all(b"ls\r\x1d").unwrap()), 0);
}

#[test]
fn a_signal_puts_the_terminal_back() {
    assert_eq!(on_a_terminal(|_, pid| kill(pid, Signal::SIGTERM).unwrap()), 143);
}
