//! Taps and bridges of network namespaces that the tests make.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;

fn net(tap: &str, bridge: &str) -> NetConfig {
    NetConfig { tap: tap.into(), bridge: bridge.into(), mac: vec![2, 0, 0, 0, 0, 9].into() }
}

fn said(nets: &[NetConfig]) -> String {
    check(nets).map_or_else(|e| e.to_string(), |()| String::new())
}

/// Runs `test` in a network namespace of its own, which needs root.
fn alone(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root");
        test();
    });
    thread.join().unwrap();
}

/// The `ip` of iproute2, in this thread's namespace.
fn ip(args: &str) -> String {
    let ran = Command::new("ip").args(args.split(' ')).output().expect("install iproute2");
    assert!(ran.status.success(), "ip {args}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

fn codes(nets: &[NetConfig]) -> Vec<&'static str> {
    problems(nets).iter().map(|problem| problem.code).collect()
}

#[test]
fn names_and_addresses_that_can_be_are_taken() {
    assert_eq!(said(&[]), "");
    assert_eq!(
        said(&[net("tap0", ""), NetConfig { mac: vec![4; 6].into(), ..net("t1", "br-0") }]),
        ""
    );
}

#[test]
fn names_and_addresses_that_cannot_be_are_refused() {
    for name in ["", "a b", "../x", "tap%d", "-x", "a/b", "tap\0", "sixteen-letters-"] {
        assert!(said(&[net(name, "")]).contains("can't be an interface"), "{name:?}");
        if !name.is_empty() {
            assert!(said(&[net("tap0", name)]).contains("can't be an interface"), "{name:?}");
        }
    }
    for mac in [vec![], vec![2; 5], vec![1, 0, 0, 0, 0, 0], vec![0; 6]] {
        let odd = NetConfig { mac: mac.into(), ..net("tap0", "") };
        assert!(said(&[odd]).contains("address"));
    }
    assert!(said(&[net("tap0", ""), net("tap0", "")]).contains("twice"));
    assert!(said(&[net("tap0", ""), net("tap1", "")]).contains("twice"));
    assert!(said(&vec![net("tap0", ""); 5]).contains("at most 4"));
}

#[test]
fn what_the_user_leaves_open_is_chosen_so_that_it_can_be() {
    let mut open = NetConfig { bridge: "br0".into(), ..NetConfig::default() };
    complete(&mut open);
    assert_eq!(said(std::slice::from_ref(&open)), "");
    let mut other = NetConfig { bridge: "br0".into(), ..NetConfig::default() };
    complete(&mut other);
    assert!(open.mac != other.mac && open.tap != other.tap);
    let mut fixed = net("tap0", "br0");
    complete(&mut fixed);
    assert_eq!(fixed, net("tap0", "br0"));
}

#[test]
fn a_tap_that_is_there_is_found_by_name_and_named_when_it_is_in_use() {
    alone(|| {
        ip("tuntap add dev tap0 mode tap");
        let of_tap0 = net("tap0", "");
        assert_eq!(codes(std::slice::from_ref(&of_tap0)), Vec::<&str>::new());
        let opened = open(&of_tap0).unwrap();
        assert!(ip("-o link show tap0").contains(",UP"));
        assert_eq!(codes(std::slice::from_ref(&of_tap0)), ["destination-tap-busy"]);
        let busy = open(&of_tap0).unwrap_err();
        assert_eq!(busy.to_string(), "the tap tap0 is in use by another VM or process");
        drop(opened);
        assert_eq!(codes(std::slice::from_ref(&of_tap0)), Vec::<&str>::new());
        ip("link show tap0");
    });
}

#[test]
fn looking_for_problems_changes_nothing() {
    alone(|| {
        ip("link add br0 type bridge");
        let before = ip("-o link");
        let nets = [net("tap0", ""), net("lo", ""), net("tap1", "br1"), net("tap2", "br0")];
        let expected =
            ["destination-tap-missing", "destination-tap-missing", "destination-bridge-missing"];
        assert_eq!(codes(&nets), expected);
        assert_eq!(ip("-o link"), before);
    });
}

#[test]
fn with_a_bridge_the_tap_is_made_joins_it_and_goes_when_it_is_closed() {
    alone(|| {
        ip("link add br0 type bridge");
        let made = open(&net("tap7", "br0")).unwrap();
        let shown = ip("-o link show tap7");
        assert!(shown.contains("master br0") && shown.contains("fe:00:00:00:00:09"), "{shown}");
        drop(made);
        assert_eq!(tap::look("tap7").unwrap(), None);
        assert_eq!(tap::look("br0").unwrap(), Some(Interface::Bridge));
    });
}

#[test]
fn a_tap_that_is_in_its_bridge_already_stays_there() {
    alone(|| {
        ip("link add br0 type bridge");
        ip("tuntap add dev tap0 mode tap");
        ip("link set tap0 master br0");
        drop(open(&net("tap0", "br0")).unwrap());
        assert!(ip("-o link show tap0").contains("master br0"));
    });
}

#[test]
fn frames_go_through_a_tap_with_their_header() {
    use std::io::{Read, Write};
    alone(|| {
        ip("link add br0 type bridge");
        ip("link set br0 up");
        let mut ends: Vec<std::fs::File> = [9, 10]
            .map(|last| NetConfig {
                mac: vec![2, 0, 0, 0, 0, last].into(),
                ..net(&format!("tap{last}"), "br0")
            })
            .iter()
            .map(|net| open(net).unwrap().into())
            .collect();
        let mut frame = vec![0; HEADER_BYTES];
        frame.extend([0xff; 6]);
        frame.extend([2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
        frame.resize(HEADER_BYTES + 60, 7);
        // A port needs a moment until it forwards, and others speak too.
        let found = (0..2000).any(|_| {
            ends[0].write_all(&frame).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
            let mut got = vec![0; 2000];
            while let Ok(length) = ends[1].read(&mut got) {
                if got[HEADER_BYTES..length] == frame[HEADER_BYTES..] {
                    return true;
                }
            }
            false
        });
        assert!(found, "no frame came through the bridge");
    });
}
