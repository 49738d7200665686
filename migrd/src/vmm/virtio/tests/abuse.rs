//! Drivers that put into a queue what no driver may: the guest ends, with the
//! reason, and nothing else happens.

use proptest::prelude::*;

use super::super::blk::Disk;
use super::super::entropy::Entropy;
use super::super::mmio::INDIRECT_DESC;
use super::*;

fn disk() -> Box<Disk> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut disk = Disk::new(0, 1 << 20, false);
    disk.put(Box::new(file));
    Box::new(disk)
}

/// Has a driver do `abuse` and gives the reason for which the guest ended.
fn ends(features: u64, abuse: impl FnOnce(&mut Rig)) -> String {
    let mut rig = Rig::working(disk(), features);
    abuse(&mut rig);
    let Stop { kind, details } = rig.ended();
    assert_eq!(kind, StopKind::DeviceAbused);
    assert!(details.starts_with("virtio device 0 (disk), queue 0: "), "{details}");
    // The device is out of use, and can still be made to stand.
    rig.drain();
    details
}

#[test]
fn an_index_that_jumps_ends_the_guest() {
    let why = ends(0, |rig| {
        let index = GuestAddress(Rig::rings(0) + AVAILABLE + 2);
        rig.memory.write_obj(SIZE + 1, index).unwrap();
        rig.write(0x50, 0);
    });
    assert!(why.contains("jumped further than it is long"), "{why}");
}

#[test]
fn a_head_outside_the_table_ends_the_guest() {
    let why = ends(0, |rig| rig.make_available(0, SIZE));
    assert!(why.contains("descriptor 8 of a table of 8"), "{why}");
}

#[test]
fn a_loop_of_descriptors_ends_the_guest() {
    let why = ends(0, |rig| {
        for index in 0..SIZE {
            rig.descriptor(Rig::rings(0), index, (DATA, 16), NEXT);
        }
        rig.make_available(0, 0);
    });
    assert!(why.contains("bites its tail"), "{why}");
}

#[test]
fn a_buffer_outside_memory_ends_the_guest() {
    for (address, length) in
        [(MEMORY_BYTES - 8, 16), (MEMORY_BYTES, 1), (u64::MAX - 3, 16), (DATA, u32::MAX)]
    {
        let why = ends(0, |rig| {
            rig.ask(0, &[(address, length, false)]);
        });
        let expected = format!("{length} bytes at {address:#x} are not in the guest's memory");
        assert!(why.contains(&expected), "{why}");
    }
}

#[test]
fn more_than_4_gib_in_a_chain_end_the_guest() {
    // Each piece is in memory; together they are too much.
    let memory = new_memory();
    let rig = Rig::new(disk(), memory);
    let table = Rig::rings(0);
    let pieces: u16 = 1025;
    for index in 0..pieces {
        let length = u32::try_from(MEMORY_BYTES).unwrap();
        let at = GuestAddress(DATA + u64::from(index) * 16);
        rig.memory.write_obj(0_u64, at).unwrap();
        rig.memory.write_obj(length, GuestAddress(at.0 + 8)).unwrap();
        rig.memory.write_obj(NEXT, GuestAddress(at.0 + 12)).unwrap();
        rig.memory.write_obj(index + 1, GuestAddress(at.0 + 14)).unwrap();
    }
    rig.descriptor(table, 0, (DATA, u32::from(pieces) * 16), INDIRECT);
    let parsed = Chain::parse(&rig.memory, GuestAddress(table), 2048, 0, true);
    assert_eq!(parsed, Err(Abuse::TooMuch));
}

#[test]
fn buffers_in_the_wrong_order_end_the_guest() {
    let why = ends(0, |rig| {
        rig.ask(0, &[(DATA, 16, true), (DATA, 16, false)]);
    });
    assert!(why.contains("a buffer to read behind one to write"), "{why}");
}

#[test]
fn data_of_the_wrong_direction_ends_the_guest() {
    for (kind, write, expected) in [(0_u32, false, "the data to be read"), (1, true, "written")] {
        let why = ends(0, |rig| {
            rig.memory.write_obj(kind, GuestAddress(DATA)).unwrap();
            let data = (DATA + 0x1000, 512, write);
            rig.ask(0, &[(DATA, 16, false), data, (DATA + 0x100, 1, true)]);
        });
        assert!(why.contains("wrong direction") && why.contains(expected), "{why}");
    }
}

#[test]
fn a_request_without_header_or_status_ends_the_guest() {
    let cases = [
        (vec![(DATA, 15, false), (DATA, 1, true)], "its header"),
        (vec![(DATA, 1, true)], "its header"),
        (vec![(DATA, 16, false)], "its status"),
        (vec![(DATA, 16, false), (DATA, 0, true)], "its status"),
    ];
    for (parts, expected) in cases {
        let why = ends(0, |rig| {
            rig.ask(0, &parts);
        });
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn indirect_tables_that_are_none_end_the_guest() {
    let table = DATA + 0x800;
    // Not agreed on; of an odd length; empty; with a next one; one in another.
    let cases: [(u64, u32, u16, u16); 5] = [
        (0, 32, INDIRECT, 0),
        (INDIRECT_DESC, 31, INDIRECT, 0),
        (INDIRECT_DESC, 0, INDIRECT, 0),
        (INDIRECT_DESC, 32, INDIRECT | NEXT, 0),
        (INDIRECT_DESC, 32, INDIRECT, INDIRECT),
    ];
    for (features, length, flags, inner) in cases {
        let why = ends(features, |rig| {
            rig.descriptor(table, 0, (DATA, 16), inner);
            rig.descriptor(Rig::rings(0), 0, (table, length), flags);
            rig.make_available(0, 0);
        });
        assert!(why.contains("indirect descriptor"), "{why}");
    }
}

#[test]
fn rings_that_are_not_in_memory_end_the_guest_at_its_start() {
    let good = Rig::rings(0);
    let (available, used) = (good + AVAILABLE, good + USED);
    for at in [
        [MEMORY_BYTES - 16, available, used],
        [good, MEMORY_BYTES - 8, used],
        [good, available, MEMORY_BYTES - 8],
        [good, available, u64::MAX - 3],
        [0, available, used],
        [good + 1, available, used],
        [good, available + 1, used],
        [good, available, used + 2],
    ] {
        let rig = Rig::new(Box::<Entropy>::default(), new_memory());
        rig.agree(VERSION_1);
        rig.place_queue(0, at);
        let stop = rig.write(0x70, 1 | 2 | FEATURES_OK | DRIVER_OK).expect("{at:x?}");
        assert_eq!(stop.kind, StopKind::DeviceAbused);
        assert!(stop.details.contains("queue 0: its rings are not usable"), "{}", stop.details);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is in the rings, the device answers or says what is wrong.
    #[test]
    fn no_ring_makes_the_vmm_panic_or_loop(
        table in prop::collection::vec(
            (prop_oneof![0..MEMORY_BYTES + 64, any::<u64>()],
             prop_oneof![0..600_u32, any::<u32>()], 0..8_u16, 0..SIZE + 2),
            usize::from(SIZE)),
        heads in prop::collection::vec(0..SIZE + 1, usize::from(SIZE)),
        index in 0..SIZE + 2,
        kind in 0..12_u32,
        features in prop_oneof![Just(0), Just(INDIRECT_DESC)],
    ) {
        let mut rig = Rig::new(disk(), new_memory());
        prop_assert_eq!(rig.set_up(features), None);
        rig.memory.write_obj(kind, GuestAddress(DATA)).unwrap();
        for (number, (address, length, flags, next)) in (0_u64..).zip(&table) {
            let at = Rig::rings(0) + number * 16;
            rig.memory.write_obj(*address, GuestAddress(at)).unwrap();
            rig.memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            rig.memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            rig.memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
        for head in heads {
            rig.make_available(0, head);
        }
        let ring = GuestAddress(Rig::rings(0) + AVAILABLE + 2);
        rig.memory.write_obj(index, ring).unwrap();
        rig.gate.open();
        let served = rig.device.turn(|device, turn| device.serve(0, turn));
        if served.is_ok() {
            prop_assert_eq!(rig.used(0), index);
        } else {
            prop_assert!(rig.used(0) <= index);
        }
    }
}
