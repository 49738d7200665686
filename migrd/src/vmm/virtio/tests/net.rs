//! The network interface, with a pair of sockets for its tap.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use migr_proto::v1 as proto;

use super::super::mmio::EVENT_IDX;
use super::super::net::{HEADER_BYTES, Net};
use super::moves::moved;
use super::*;
use crate::units::Mac;

const MAC: Mac = [2, 0, 0, 0, 0, 7];
const CSUM: u64 = 1;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const CTRL_VQ: u64 = 1 << 17;
const RECEIVE: usize = 0;
const SEND: usize = 1;
const CONTROL: usize = 2;

/// An interface, and the other end of its tap.
fn net() -> (Box<Net>, UnixDatagram) {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut net = Net::new(MAC);
    assert!(!net.attached());
    net.attach(File::from(OwnedFd::from(tap))).unwrap();
    assert!(net.attached());
    (Box::new(net), wire)
}

/// As a tap gives and takes it: a header, and `length` bytes of `fill`.
fn frame(fill: u8, length: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.resize(HEADER_BYTES + length, fill);
    frame
}

fn received(wire: &UnixDatagram) -> Vec<u8> {
    let mut frame = vec![0; 1 << 17];
    let length = wire.recv(&mut frame).unwrap();
    frame.truncate(length);
    frame
}

fn bytes(rig: &Rig, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rig.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Sends a frame that lies in two pieces, as drivers have it.
fn send(rig: &mut Rig, frame: &[u8]) {
    rig.memory.write_slice(frame, GuestAddress(DATA)).unwrap();
    let (header, length) = (12_u32, u32::try_from(frame.len()).unwrap());
    rig.ask(SEND, &[(DATA, header, false), (DATA + u64::from(header), length - header, false)]);
    assert_eq!(rig.answered(SEND).1, 0);
}

#[test]
fn the_driver_finds_its_address_and_a_link_that_is_up() {
    let (net, _wire) = net();
    let rig = Rig::working(net, 0);
    let mut space = [0; 8];
    rig.device.read(0x100, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 7, 1, 0]);
    assert_eq!(rig.read(0x8), 1, "a network interface");
}

#[test]
fn frames_go_out_in_order_and_whole() {
    for features in [0, EVENT_IDX] {
        let (net, wire) = net();
        let mut rig = Rig::working(net, features);
        for fill in 1..20 {
            let sent = frame(fill, 60 + usize::from(fill));
            send(&mut rig, &sent);
            assert_eq!(received(&wire), sent);
        }
    }
}

#[test]
fn what_the_driver_leaves_to_the_device_goes_to_the_tap_only_if_they_agreed() {
    let mut offloaded = frame(5, 200);
    offloaded[0] = 1;
    for (features, header) in [(0, 0), (CSUM, 1)] {
        let (net, wire) = net();
        let mut rig = Rig::working(net, features);
        send(&mut rig, &offloaded);
        assert_eq!(received(&wire)[0], header);
    }
}

#[test]
fn frames_that_no_wire_would_carry_are_lost_and_the_next_ones_are_not() {
    let (net, wire) = net();
    let mut rig = Rig::working(net, 0);
    send(&mut rig, &frame(1, 13));
    rig.ask(SEND, &[(DATA, 80_000, false)]);
    rig.answered(SEND);
    let good = frame(3, 14);
    send(&mut rig, &good);
    assert_eq!(received(&wire), good);
}

#[test]
fn a_tap_without_room_loses_frames_and_nobody_waits() {
    let (net, wire) = net();
    let mut rig = Rig::working(net, 0);
    for _ in 0..2000 {
        send(&mut rig, &frame(9, 1500));
    }
    wire.set_nonblocking(true).unwrap();
    let mut through = 0;
    while wire.recv(&mut [0; 2000]).is_ok() {
        through += 1;
    }
    assert!((1..2000).contains(&through), "{through}");
}

#[test]
fn frames_come_in_with_the_number_of_their_buffers() {
    let (net, wire) = net();
    let mut rig = Rig::working(net, 0);
    for fill in 1..20_u8 {
        rig.ask(RECEIVE, &[(DATA, 12, true), (DATA + 12, 1518, true)]);
        let mut sent = frame(fill, 100);
        wire.send(&sent).unwrap();
        let (_, length) = rig.answered(RECEIVE);
        assert_eq!(usize::try_from(length).unwrap(), sent.len());
        sent[10] = 1;
        assert_eq!(bytes(&rig, DATA, sent.len()), sent);
    }
}

#[test]
fn frames_wait_in_the_tap_until_there_are_buffers() {
    for features in [0, EVENT_IDX] {
        let (net, wire) = net();
        let mut rig = Rig::working(net, features);
        for fill in 1..5 {
            wire.send(&frame(fill, 60)).unwrap();
        }
        for fill in 1..5 {
            rig.ask(RECEIVE, &[(DATA, 1530, true)]);
            rig.answered(RECEIVE);
            assert_eq!(bytes(&rig, DATA + 12, 60), vec![fill; 60]);
        }
    }
}

#[test]
fn a_frame_longer_than_the_buffer_is_lost_and_the_buffer_is_not() {
    let (net, wire) = net();
    let mut rig = Rig::working(net, 0);
    rig.ask(RECEIVE, &[(DATA, 1530, true)]);
    wire.send(&frame(1, 9000)).unwrap();
    wire.send(&frame(2, 60)).unwrap();
    assert_eq!(rig.answered(RECEIVE).1, 72);
    assert_eq!(bytes(&rig, DATA + 12, 60), vec![2; 60]);
}

#[test]
fn a_tap_that_is_gone_stops_nothing_else() {
    let (net, wire) = net();
    let mut rig = Rig::working(net, CTRL_VQ);
    rig.ask(RECEIVE, &[(DATA, 1530, true)]);
    drop(wire);
    send(&mut rig, &frame(1, 60));
    rig.ask(CONTROL, &[(DATA, 2, false), (DATA + 8, 1, true)]);
    rig.answered(CONTROL);
}

#[test]
fn after_a_move_the_network_and_the_guest_are_told() {
    let (net_there, _wire) = net();
    let rig = Rig::working(net_there, GUEST_ANNOUNCE | CTRL_VQ);
    rig.drain();
    let (net_here, wire) = net();
    let mut new = moved(&rig, net_here).unwrap();
    wire.set_nonblocking(true).unwrap();
    let nothing = wire.recv(&mut [0; 100]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock, "nothing is said before it runs");
    wire.set_nonblocking(false).unwrap();
    new.gate.open();
    for _ in 0..5 {
        let rarp = received(&wire);
        assert_eq!(rarp.len(), 72);
        assert_eq!((&rarp[12..18], &rarp[18..24]), (&[0xff; 6][..], &MAC[..]));
        assert_eq!(rarp[24..26], [0x80, 0x35]);
    }
    let status = |rig: &Rig| rig.read(0x104) >> 16;
    assert_eq!(status(&new), 3, "the link is up, and the driver shall announce itself");
    assert_eq!(new.read(0x60) & 2, 2, "it was interrupted for that");
    let kind = new.device.save().kind;
    let pending = proto::NetState { announce_pending: true };
    assert_eq!(kind, Some(proto::virtio_state::Kind::Net(pending)));
    new.memory.write_slice(&[3, 0], GuestAddress(DATA)).unwrap();
    new.ask(CONTROL, &[(DATA, 2, false), (DATA + 8, 1, true)]);
    assert_eq!(new.answered(CONTROL).1, 1);
    assert_eq!((bytes(&new, DATA + 8, 1), status(&new)), (vec![0], 1));
}

#[test]
fn a_pause_alone_is_not_announced() {
    let (net, wire) = net();
    let mut rig = Rig::working(net, GUEST_ANNOUNCE | CTRL_VQ);
    rig.drain();
    rig.gate.open();
    let sent = frame(6, 60);
    send(&mut rig, &sent);
    assert_eq!(received(&wire), sent, "the first thing that is heard");
    assert_eq!(rig.read(0x104) >> 16, 1);
}

#[test]
fn a_command_that_is_not_known_is_answered_with_an_error() {
    let (net, _wire) = net();
    let mut rig = Rig::working(net, CTRL_VQ);
    rig.memory.write_slice(&[0, 0, 1], GuestAddress(DATA)).unwrap();
    rig.ask(CONTROL, &[(DATA, 3, false), (DATA + 8, 1, true)]);
    rig.answered(CONTROL);
    assert_eq!(bytes(&rig, DATA + 8, 1), [1]);
}

/// Buffers by which a driver abuses a queue, and what is said of that.
type Abused = (usize, &'static [(u64, u32, bool)], &'static str);

#[test]
fn a_driver_that_abuses_a_queue_ends_its_guest_with_the_reason() {
    let abuses: [Abused; 6] = [
        (RECEIVE, &[(DATA, 16, false)], "queue 0: a request with a buffer of the wrong direction"),
        (SEND, &[(DATA, 72, true)], "queue 1: a request with a buffer of the wrong direction"),
        (SEND, &[(DATA, 11, false)], "queue 1: a request without room for the header"),
        (SEND, &[(1 << 40, 72, false)], "queue 1: 72 bytes at 0x10000000000 are not"),
        (CONTROL, &[(DATA, 1, false)], "queue 2: a request without room for a command"),
        (CONTROL, &[(DATA, 2, false)], "queue 2: a request without room for the answer"),
    ];
    for (queue, buffers, expected) in abuses {
        let (net, wire) = net();
        let mut rig = Rig::working(net, CTRL_VQ);
        if queue == RECEIVE {
            wire.send(&frame(1, 60)).unwrap();
        }
        rig.ask(queue, buffers);
        let stop = rig.ended();
        assert_eq!(stop.kind, StopKind::DeviceAbused);
        assert!(stop.details.contains("(network)"), "{stop:?}");
        assert!(stop.details.contains(expected), "{stop:?}");
    }
}

#[test]
fn an_address_that_no_interface_can_have_is_refused() {
    for mac in [vec![], vec![0; 6], vec![1, 0, 0, 0, 0, 1], vec![2; 7]] {
        let nets = vec![proto::NetConfig { mac: mac.into(), ..Default::default() }];
        let config = proto::VmConfig { version: 2, nets, ..Default::default() };
        let refused = Slots::new(&config, &new_memory()).unwrap_err().to_string();
        assert!(refused.contains("network interface 0"), "{refused}");
    }
}
