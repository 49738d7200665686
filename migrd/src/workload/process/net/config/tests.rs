//! What can be a network, and what follows from an id.

use super::*;

const ID: &str = "0123abcd-ef45-4678-9abc-0102030405ff";

fn id() -> WorkloadId {
    ID.parse().unwrap()
}

fn net(address: &str, gateway: &str) -> ProcessNet {
    ProcessNet {
        address: address.into(),
        bridge: "br0".into(),
        gateway: gateway.into(),
        mac: vec![2, 0, 0, 0, 0, 9].into(),
    }
}

fn said(config: &ProcessNet) -> String {
    check(config).map_or_else(|e| e.to_string(), |()| String::new())
}

#[test]
fn networks_that_can_be_are_taken() {
    for (address, gateway) in [
        ("10.0.0.5/24", ""),
        ("10.0.0.5/24", "10.0.0.1"),
        ("10.0.1.0/23", "10.0.0.1"),
        ("10.0.0.4/31", "10.0.0.5"),
        ("10.0.0.5/32", ""),
        ("fd00::5/64", "fd00::1"),
        ("fd00::5/64", "fe80::1"),
        ("fd00::/127", "fd00::1"),
    ] {
        assert_eq!(said(&net(address, gateway)), "", "{address} {gateway}");
    }
}

#[test]
fn networks_that_cannot_be_are_refused() {
    for address in ["", "10.0.0.5", "10.0.0.5/", "10.0.0/24", "a/24", "10.0.0.5/+8", "10.0.0.5/256"]
    {
        assert!(said(&net(address, "")).contains("no address with a prefix length"), "{address}");
    }
    for address in ["10.0.0.5/0", "10.0.0.5/33", "fd00::5/129"] {
        assert!(said(&net(address, "")).contains("bits"), "{address}");
    }
    for address in [
        "10.0.0.0/24",
        "10.0.0.255/24",
        "0.0.0.0/32",
        "127.0.0.1/8",
        "224.0.0.1/24",
        "255.255.255.255/32",
        "0.1.2.3/24",
        "::1/64",
        "fd00::/64",
        "fe80::5/64",
        "ff02::5/64",
        "::ffff:10.0.0.5/120",
    ] {
        assert!(said(&net(address, "")).contains("can't be a workload's address"), "{address}");
    }
    for (address, gateway) in [
        ("10.0.0.5/24", "10.0.1.1"),
        ("10.0.0.5/24", "fe80::1"),
        ("10.0.0.5/24", "fd00::1"),
        ("fd00::5/64", "fd01::1"),
        ("fd00::5/64", "10.0.0.1"),
    ] {
        let said = said(&net(address, gateway));
        assert!(said.contains("is not in the network"), "{gateway}: {said}");
    }
    assert!(said(&net("10.0.0.5/24", "10.0.0.5")).contains("can't be both"));
    assert!(said(&net("10.0.0.5/24", "router")).contains("no gateway"));
    for bridge in ["", "a b", "../br", "br/0", "sixteen-letters-"] {
        let odd = ProcessNet { bridge: bridge.into(), ..net("10.0.0.5/24", "") };
        assert!(said(&odd).contains("can't be a bridge"), "{bridge}");
    }
    for mac in [vec![2; 5], vec![2; 7], vec![1, 0, 0, 0, 0, 0], vec![0; 6]] {
        let odd = ProcessNet { mac: mac.into(), ..net("10.0.0.5/24", "") };
        assert!(said(&odd).contains("can't be an interface's address"));
    }
}

#[test]
fn long_nonsense_is_not_repeated_in_full() {
    let long = "x".repeat(100_000);
    assert!(said(&net(&long, "")).len() < 200);
    assert!(said(&net("10.0.0.5/24", &long)).len() < 200);
    assert!(said(&ProcessNet { bridge: long, ..net("10.0.0.5/24", "") }).len() < 300);
    let mac = vec![2; 100_000].into();
    assert!(said(&ProcessNet { mac, ..net("10.0.0.5/24", "") }).len() < 200);
}

#[test]
fn a_hardware_address_follows_from_the_id_unless_one_is_given() {
    let open = ProcessNet { mac: Vec::new().into(), ..net("10.0.0.5/24", "") };
    assert_eq!(Plan::new(id(), &open).unwrap().mac, [2, 2, 3, 4, 5, 0xff]);
    let given = net("10.0.0.5/24", "");
    assert_eq!(Plan::new(id(), &given).unwrap().mac, [2, 0, 0, 0, 0, 9]);
}

#[test]
fn names_are_short_and_known_again() {
    let name = name_of(id());
    assert_eq!(name, "mgp0123abcdef");
    assert!(name.len() <= tap::NAME_MAX);
    assert_eq!(id_in(&alias_of(id())), Some(id()));
    for alias in ["", ID, "migr process ", "migr process mgp0123abcdef"] {
        assert_eq!(id_in(alias), None, "{alias}");
    }
}

#[test]
fn the_address_for_all_is_the_last_one() {
    for (address, last) in [("10.0.0.5/24", "10.0.0.255"), ("10.1.2.3/9", "10.127.255.255")] {
        let plan = Plan::new(id(), &net(address, "")).unwrap();
        assert_eq!(plan.broadcast(), Some(last.parse().unwrap()));
    }
    for address in ["10.0.0.5/31", "10.0.0.5/32", "fd00::5/64"] {
        assert_eq!(Plan::new(id(), &net(address, "")).unwrap().broadcast(), None);
    }
}

#[test]
fn the_interfaces_own_address_follows_from_its_hardware_address() {
    // RFC 2464, 4: the example.
    let mac = [0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
    assert_eq!(link_local(mac).to_string(), "fe80::3656:78ff:fe9a:bcde");
}
