//! How neighbours and bridges learn where an address has moved to: frames that
//! say it to all. And how the address learns where they are.
//!
//! A bridge needs any frame from the hardware address. Neighbours keep what they
//! know of the address, unless a frame says otherwise: each system heeds one of
//! the two forms of gratuitous ARP (RFC 5944, 4.6), so both are sent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::units::Mac;

const ALL: Mac = [0xff; 6];
/// `ff02::1`, all nodes, and its hardware address (RFC 2464, 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// Frames shorter than this do not exist on a wire (IEEE 802.3), without their
/// checksum.
const FRAME_BYTES: usize = 60;
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// Ethernet and IPv4 addresses, of 6 and 4 bytes (RFC 826).
const ARP_KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];

const NEXT_ICMPV6: u8 = 58;
/// Neighbour advertisement, override: what was known is wrong (RFC 4861, 4.4).
const ADVERTISEMENT: [u8; 8] = [136, 0, 0, 0, 0x20, 0, 0, 0];
/// Neighbour solicitation (RFC 4861, 4.3).
const SOLICITATION: [u8; 8] = [135, 0, 0, 0, 0, 0, 0, 0];
/// The hardware address of who asks, in units of 8 bytes (RFC 4861, 4.6.1).
const SOURCE_ADDRESS: [u8; 2] = [1, 1];
/// The hardware address of who is told of, in units of 8 bytes (RFC 4861, 4.6.1).
const TARGET_ADDRESS: [u8; 2] = [2, 1];
/// What comes from further away than a neighbour has less (RFC 4861, 7.1.2).
const HOP_LIMIT: u8 = 255;

/// The frames that tell that `address` is at `mac`.
pub(super) fn announcement(mac: Mac, address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => {
            let told = |operation, target| arp(mac, address, operation, (target, address));
            vec![told(ARP_REQUEST, [0; 6]), told(ARP_REPLY, ALL)]
        }
        IpAddr::V6(address) => vec![advertisement(mac, address)],
    }
}

/// The frame that asks for the hardware address of `of`; none, where the two have not the
/// same kind of address.
pub(super) fn question(mac: Mac, address: IpAddr, of: IpAddr) -> Option<Vec<u8>> {
    match (address, of) {
        (IpAddr::V4(address), IpAddr::V4(of)) => Some(arp(mac, address, ARP_REQUEST, ([0; 6], of))),
        (IpAddr::V6(address), IpAddr::V6(of)) => Some(solicitation(mac, address, of)),
        _ => None,
    }
}

fn header(to: Mac, from: Mac, kind: [u8; 2]) -> Vec<u8> {
    [&to[..], &from, &kind].concat()
}

fn arp(mac: Mac, address: Ipv4Addr, operation: [u8; 2], target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut frame = header(ALL, mac, TYPE_ARP);
    frame.extend(ARP_KIND);
    frame.extend(operation);
    for (hardware, address) in [(mac, address), target] {
        frame.extend(hardware);
        frame.extend(address.octets());
    }
    frame.resize(FRAME_BYTES, 0);
    frame
}

fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let body = [&ADVERTISEMENT[..], &address.octets(), &TARGET_ADDRESS, &mac].concat();
    icmpv6((mac, address), (ALL_NODES_MAC, ALL_NODES), body)
}

fn solicitation(mac: Mac, address: Ipv6Addr, of: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = of.octets();
    let group =
        Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    let body = [&SOLICITATION[..], &of.octets(), &SOURCE_ADDRESS, &mac].concat();
    icmpv6((mac, address), ([0x33, 0x33, 0xff, a, b, c], group), body)
}

/// A message of ICMPv6, whose checksum is not set yet.
fn icmpv6(from: (Mac, Ipv6Addr), to: (Mac, Ipv6Addr), mut body: Vec<u8>) -> Vec<u8> {
    let length = u8::try_from(body.len()).unwrap_or(u8::MAX);
    let pseudo =
        [&from.1.octets()[..], &to.1.octets(), &[0, 0, 0, length, 0, 0, 0, NEXT_ICMPV6], &body];
    let sum = checksum(&pseudo.concat());
    body[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = header(to.0, from.0, TYPE_IPV6);
    frame.extend([0x60, 0, 0, 0, 0, length, NEXT_ICMPV6, HOP_LIMIT]);
    frame.extend(from.1.octets());
    frame.extend(to.1.octets());
    frame.extend(body);
    frame
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter().map(|word| u16::from_be_bytes(*word));
    // Of a few dozen words: the carries fit.
    let sum: u32 = words.map(u32::from).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];

    #[test]
    fn an_ipv4_address_is_announced_by_a_request_and_a_reply_to_all() {
        let frames = announcement(MAC, "10.0.0.5".parse().unwrap());
        assert_eq!(frames.len(), 2);
        for (frame, operation) in frames.iter().zip([1, 2]) {
            assert_eq!(frame.len(), 60);
            assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &MAC[..]));
            assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
            assert_eq!((&frame[22..28], &frame[28..32]), (&MAC[..], &[10, 0, 0, 5][..]));
            assert_eq!(frame[38..42], [10, 0, 0, 5]);
            assert!(frame[42..].iter().all(|byte| *byte == 0));
        }
        assert_eq!((&frames[0][32..38], &frames[1][32..38]), (&[0; 6][..], &[0xff; 6][..]));
    }

    #[test]
    fn an_ipv6_address_is_announced_by_an_advertisement_to_all_nodes() {
        let frames = announcement(MAC, "fd00::5".parse().unwrap());
        let [frame] = &frames[..] else { panic!("{frames:?}") };
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(
            frame[..14],
            [0x33, 0x33, 0, 0, 0, 1, 2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0x86, 0xdd]
        );
        assert_eq!(frame[14..22], [0x60, 0, 0, 0, 0, 32, 58, 255]);
        let body = &frame[54..];
        assert_eq!((body[0], body[1], &body[4..8]), (136, 0, &[0x20, 0, 0, 0][..]));
        assert_eq!(body[8..24], frame[22..38]);
        assert_eq!((&body[24..26], &body[26..]), (&[2, 1][..], &MAC[..]));
        // A receiver's sum over everything, the checksum among it, is zero.
        let whole = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], body].concat();
        assert_eq!(checksum(&whole), 0);
    }

    #[test]
    fn a_neighbour_is_asked_by_a_request_or_a_solicitation() {
        let [own, other] = ["10.0.0.5", "10.0.0.9"].map(|text| text.parse().unwrap());
        let arp = question(MAC, own, other).unwrap();
        assert_eq!((&arp[..6], &arp[20..22]), (&[0xff; 6][..], &[0, 1][..]));
        assert_eq!(
            (&arp[28..32], &arp[32..42]),
            (&[10, 0, 0, 5][..], &[0, 0, 0, 0, 0, 0, 10, 0, 0, 9][..])
        );

        let [own6, other6] = ["fd00::5", "fd00::12:3456"].map(|text| text.parse().unwrap());
        let frame = question(MAC, own6, other6).unwrap();
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        let group: Ipv6Addr = "ff02::1:ff12:3456".parse().unwrap();
        assert_eq!(frame[38..54], group.octets());
        let body = &frame[54..];
        assert_eq!((body[0], &body[24..26], &body[26..]), (135, &[1, 1][..], &MAC[..]));
        let whole = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], body].concat();
        assert_eq!(checksum(&whole), 0);
        assert_eq!(question(MAC, own, other6), None);
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 1071, 3: the sum of these is ddf2.
        assert_eq!(checksum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
