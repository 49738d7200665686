use std::collections::HashMap;
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use super::*;
use crate::sys::sockets::set_option;

/// A listening socket and both ends of a connection to it, with their names.
fn sockets(listener: TcpListener) -> [(&'static str, OwnedFd); 3] {
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    [("listener", listener.into()), ("near", near.into()), ("far", far.into())]
}

fn known(name: &str) -> &'static Known {
    ALL.iter().find(|known| known.name == name).unwrap()
}

fn value(name: &str, socket: &OwnedFd) -> Option<Vec<u8>> {
    known(name).read(socket, Shape::of(socket).unwrap())
}

/// Values that are no kernel's defaults.
fn chosen() -> Vec<(&'static Known, Vec<u8>)> {
    let number = |name, value: i32| (known(name), value.to_ne_bytes().to_vec());
    vec![
        (known("TCP_CONGESTION"), b"reno".to_vec()),
        (known("SO_MAX_PACING_RATE"), 5_000_000_u64.to_ne_bytes().to_vec()),
        number("SO_ZEROCOPY", 1),
        number("SO_TIMESTAMPNS", 1),
        number("TCP_USER_TIMEOUT", 34_567),
        number("TCP_NOTSENT_LOWAT", 16_384),
        number("TCP_SYNCNT", 3),
        number("TCP_LINGER2", -1),
        number("TCP_THIN_LINEAR_TIMEOUTS", 1),
        number("TCP_INQ", 1),
        number("TCP_MAXSEG", 1000),
        number("TCP_WINDOW_CLAMP", 40_000),
        number("TCP_DEFER_ACCEPT", 7),
        number("TCP_FASTOPEN", 5),
        number("TCP_FASTOPEN_NO_COOKIE", 1),
        number("TCP_SAVE_SYN", 1),
        number("IP_MTU_DISCOVER", 0),
        number("IP_MINTTL", 1),
        number("IP_RECVERR", 1),
        number("IP_TOS", 0x10),
        number("IP_TTL", 33),
        number("IPV6_TCLASS", 0x20),
        number("IPV6_UNICAST_HOPS", 44),
        number("IPV6_MTU_DISCOVER", 0),
        number("IPV6_MINHOPCOUNT", 1),
        number("IPV6_RECVERR", 1),
    ]
}

fn saved_of(sockets: &[(&str, OwnedFd)]) -> Vec<Socket> {
    let mut defaults = Defaults::default();
    let own = std::process::id();
    let all = of_process(own, 7, &mut defaults, &mut HashSet::new());
    let mut all = all.expect("run the tests as root");
    // Other tests of this process may have sockets.
    let ours: Vec<_> = sockets.iter().map(|(_, socket)| socket.as_raw_fd()).collect();
    all.retain(|socket| ours.contains(&socket.descriptor));
    all
}

#[test]
fn a_new_socket_has_nothing_but_what_criu_sets_wrongly() {
    let sockets = sockets(TcpListener::bind("127.0.0.1:0").unwrap());
    let saved = saved_of(&sockets);
    assert_eq!(saved.len(), 3);
    for socket in saved {
        let names: Vec<_> = socket.options.iter().map(|o| o.known().unwrap().name).collect();
        assert_eq!(names, ["SO_REUSEPORT"]);
    }
}

#[test]
fn options_of_connections_and_listeners_are_read_and_set_again() {
    for listener in [TcpListener::bind("127.0.0.1:0"), TcpListener::bind((Ipv6Addr::LOCALHOST, 0))]
    {
        // Without IPv6 half of it is shown.
        let Ok(listener) = listener else { continue };
        let old = sockets(listener);
        let mut wanted = HashMap::new();
        for (name, socket) in &old {
            let shape = Shape::of(socket).unwrap();
            for (known, value) in chosen() {
                if known.read(socket, shape).is_some() {
                    known.set(socket, &value).unwrap();
                    // It keeps some of them in units of its own.
                    let value = known.read(socket, shape).unwrap();
                    wanted.insert((*name, known.name), value);
                }
            }
        }
        assert!(wanted.len() >= 3 * 13 + 6, "{}", wanted.len());
        let saved = saved_of(&old);
        // Each is put where the old one was, as CRIU does, with what CRIU sets.
        let new = sockets_like(&old);
        for (_, socket) in &new {
            set_option(socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, &1_i32.to_ne_bytes()).unwrap();
        }
        let saved = TcpOptions(Saved { sockets: moved(saved, &old, &new) });
        let mut failures = Failures::default();
        saved.apply_to(vec![(std::process::id(), 7)], &mut failures);
        assert_eq!(failures.0, 0);
        for (name, socket) in &new {
            assert_eq!(value("SO_REUSEPORT", socket).unwrap(), [0; 4]);
            for ((_, option), value_of_old) in wanted.iter().filter(|((of, _), _)| of == name) {
                assert_eq!(value(option, socket).as_ref(), Some(value_of_old), "{name} {option}");
            }
        }
    }
}

/// The same sockets anew.
fn sockets_like(old: &[(&str, OwnedFd); 3]) -> [(&'static str, OwnedFd); 3] {
    match Shape::of(&old[0].1).unwrap().family {
        libc::AF_INET6 => sockets(TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap()),
        _ => sockets(TcpListener::bind("127.0.0.1:0").unwrap()),
    }
}

/// What was read of the old ones, for the new ones' descriptors.
fn moved(saved: Vec<Socket>, old: &[(&str, OwnedFd)], new: &[(&str, OwnedFd)]) -> Vec<Socket> {
    let number = |all: &[(&str, OwnedFd)], index: usize| all[index].1.as_raw_fd();
    let place = |socket: Socket| {
        let index = (0..old.len()).find(|i| number(old, *i) == socket.descriptor).unwrap();
        Socket { descriptor: number(new, index), ..socket }
    };
    saved.into_iter().map(place).collect()
}

#[test]
fn a_change_of_the_service_leaves_the_priority_as_it_was() {
    let [_, (_, near), _] = sockets(TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap());
    let option = Value {
        level: libc::IPPROTO_IP,
        number: libc::IP_TOS,
        value: 0x10_u32.to_ne_bytes().to_vec(),
    };
    let descriptor = near.as_raw_fd();
    let socket = Socket { process: 7, descriptor, options: vec![option] };
    let mut failures = Failures::default();
    set_all(&PidFd::open(std::process::id()).unwrap(), &socket, &mut failures);
    assert_eq!(failures.0, 0);
    assert_eq!(value("IP_TOS", &near).unwrap(), [0x10, 0, 0, 0]);
    assert_eq!(getsockopt(&near, sockopt::Priority), Ok(0));
}

#[test]
fn what_can_not_be_set_leaves_the_rest_and_is_counted() {
    let [(_, listener), (_, near), _] = sockets(TcpListener::bind("127.0.0.1:0").unwrap());
    let text = |name: &str, value: &[u8]| {
        let Known { level, number, .. } = *known(name);
        Value { level, number, value: value.to_vec() }
    };
    let options = vec![
        text("TCP_CONGESTION", b"no-such-module"),
        text("TCP_SYNCNT", &(-5_i32).to_ne_bytes()),
        text("TCP_INQ", &1_i32.to_ne_bytes()),
    ];
    let of = |process, descriptor| Socket { process, descriptor, options: options.clone() };
    let file = tempfile::tempfile().unwrap();
    let sockets = vec![
        of(7, near.as_raw_fd()),
        of(7, file.as_raw_fd()),
        of(7, -1),
        of(7, i32::MAX),
        of(8, listener.as_raw_fd()),
    ];
    let mut failures = Failures::default();
    let saved = TcpOptions(Saved { sockets });
    saved.apply_to(vec![(std::process::id(), 7)], &mut failures);
    assert_eq!(failures.0, 2 + 3 + 1 + 1 + 1, "two values, a file, two numbers, a process");
    assert_eq!(value("TCP_INQ", &near).unwrap(), [1, 0, 0, 0]);
    assert_eq!(value("TCP_INQ", &listener).unwrap(), [0; 4], "another process' stay");
}

#[test]
fn a_socket_with_two_descriptors_is_written_once_and_others_are_not() {
    let sockets = sockets(TcpListener::bind("127.0.0.1:0").unwrap());
    let again = sockets[0].1.try_clone().unwrap();
    let _udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut saved = saved_of(&sockets);
    saved.extend(saved_of(&[("again", again)]));
    assert_eq!(saved.len(), 3);
}

#[test]
fn what_was_set_outlives_the_end_of_the_repair_mode() {
    let [_, (_, near), _] = sockets(TcpListener::bind("127.0.0.1:0").unwrap());
    let of_connections = |known: &Known| known.of == table::Of::Every;
    let shape = Shape::of(&near).unwrap();
    for (known, value) in chosen().into_iter().filter(|(known, _)| of_connections(known)) {
        known.set(&near, &value).unwrap();
    }
    let all = || ALL.iter().map(|known| known.read(&near, shape)).collect::<Vec<_>>();
    let before = all();
    setsockopt(&near, sockopt::TcpRepair, &1).expect("run the tests as root");
    setsockopt(&near, sockopt::TcpRepair, &0).unwrap();
    assert_eq!(all(), before);
}
