//! Devices that are saved in the middle of their work and go on elsewhere.

use std::fs::File;

use migr_proto::v1 as proto;

use super::super::balloon::Balloon;
use super::super::blk::Disk;
use super::super::entropy::Entropy;
use super::super::mmio::EVENT_IDX;
use super::*;

const DISK_BYTES: u64 = 1 << 20;
const FLUSH: u64 = 1 << 9;

fn disk(file: &File) -> Box<Disk> {
    let mut disk = Disk::new(0, DISK_BYTES, false);
    disk.put(Box::new(file.try_clone().unwrap()));
    Box::new(disk)
}

/// Another VMM's device over the same memory, with what was saved.
pub(super) fn moved(rig: &Rig, to: Box<dyn Device>) -> Result<Rig, StateError> {
    let state = rig.device.save();
    let mut new = Rig::new(to, Arc::clone(&rig.memory));
    let checked = new.device.check(&state)?;
    new.device.restore(checked)?;
    assert_eq!(new.device.save(), state);
    new.made = rig.made.clone();
    new.next_descriptor = rig.next_descriptor;
    new.live();
    Ok(new)
}

#[test]
fn requests_in_the_ring_are_served_once_after_a_move() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    for features in [FLUSH, FLUSH | EVENT_IDX] {
        let mut rig = Rig::working(disk(&file), features);
        for _ in 0..6 {
            rig.ask(0, &[(DATA, 16, false), (DATA + 0x100, 1, true)]);
            rig.answered(0);
        }
        rig.drain();
        // The vCPUs go on until they stand too.
        for request in 0..3 {
            rig.ask(0, &[(DATA, 16, false), (DATA + 0x100 + request, 1, true)]);
        }
        let new = moved(&rig, disk(&file)).unwrap();
        assert_eq!(new.used(0), 6, "nobody served them");
        new.gate.open();
        new.answered(0);
        assert_eq!(new.used(0), 9);
        wait(|| new.read(0x60) == 1);
        assert_eq!(rig.used(0), 9, "it is the same ring, and the old device stands");
    }
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again() {
    let mut rig = Rig::working(Box::<Entropy>::default(), 0);
    rig.ask(0, &[(DATA, 16, true)]);
    rig.answered(0);
    wait(|| rig.read(0x60) == 1);
    rig.drain();
    let new = moved(&rig, Box::<Entropy>::default()).unwrap();
    assert_eq!(new.read(0x60), 1);
    assert_eq!(new.device.line().read().unwrap(), 1);
}

#[test]
fn a_device_without_a_driver_moves_in_the_middle_of_its_setup() {
    let rig = Rig::new(Box::<Balloon>::default(), new_memory());
    rig.agree(VERSION_1);
    rig.place_queue(0, [0x1000, 0x2000, 0x3000]);
    rig.device.write(0x104, &7_u32.to_le_bytes());
    let new = moved(&rig, Box::<Balloon>::default()).unwrap();
    assert_eq!((new.read(0x44), new.read(0x104)), (1, 7));
    assert_eq!(new.read(0x70), rig.read(0x70));
}

/// What of a saved state is changed, and what the refusal says of it.
type Change = (&'static str, fn(&mut proto::VirtioState));

#[test]
fn a_state_that_no_device_can_have_is_refused_with_the_reason() {
    let mut rig = Rig::working(Box::<Entropy>::default(), EVENT_IDX);
    rig.ask(0, &[(DATA, 16, true)]);
    rig.answered(0);
    rig.drain();
    let good = rig.device.save();
    let changes: [Change; 18] = [
        ("device 5 in slot 0", |s| s.device_id = 5),
        ("device 4 in slot 1", |s| s.slot = 1),
        ("use the same migrd", |s| s.offered_features |= 1 << 50),
        ("status 0x10f", |s| s.status |= 0x100),
        ("interrupt status 0x4", |s| s.interrupt_status = 4),
        ("agreed to features", |s| s.driver_features |= 1 << 3),
        ("agreed to features", |s| s.driver_features = 0),
        ("has agreed to no features", |s| s.status &= !FEATURES_OK),
        ("has 0 queues", |s| s.queues.clear()),
        ("has 3 descriptors", |s| s.queues[0].size = 3),
        ("has 128 descriptors", |s| s.queues[0].size = 128),
        ("has 65536 descriptors", |s| s.queues[0].size = 65536),
        ("event indices", |s| s.queues[0].event_idx = false),
        ("is at entry 65536", |s| s.queues[0].next_available = 65536),
        ("is at entry 65537", |s| s.queues[0].next_used = 65537),
        ("not in the guest's memory", |s| s.queues[0].used = !3),
        ("alignment", |s| s.queues[0].descriptors += 1),
        ("of which kind", |s| s.kind = None),
    ];
    for (expected, change) in changes {
        let mut state = good.clone();
        change(&mut state);
        let new = Rig::new(Box::<Entropy>::default(), Arc::clone(&rig.memory));
        let refused = new.device.check(&state).expect_err(expected);
        assert!(refused.to_string().contains(expected), "{refused}");
        assert_eq!(new.read(0x70), 0, "nothing was changed");
    }
    let mut other = good;
    other.kind = Some(proto::virtio_state::Kind::Block(proto::BlockState::default()));
    let new = Rig::new(Box::<Entropy>::default(), Arc::clone(&rig.memory));
    let checked = new.device.check(&other).unwrap();
    let refused = new.device.restore(checked).unwrap_err();
    assert!(refused.to_string().contains("not that of an entropy source"), "{refused}");
}

fn config(version: u32) -> proto::VmConfig {
    proto::VmConfig { version, memory_bytes: MEMORY_BYTES, ..Default::default() }
}

fn disks(sizes: &[u64]) -> Vec<proto::DiskConfig> {
    sizes.iter().map(|bytes| proto::DiskConfig { bytes: *bytes, ..Default::default() }).collect()
}

#[test]
fn an_older_vm_has_no_devices_and_a_newer_is_refused_by_name() {
    let old = Slots::new(&config(1), &new_memory()).unwrap();
    assert_eq!(old.placed().count(), 0);
    assert!(old.check(&[]).unwrap().is_empty());
    let refused = Slots::new(&config(3), &new_memory()).unwrap_err();
    assert!(refused.to_string().contains("is of version 3"), "{refused}");
    let refused = Slots::new(&proto::VmConfig { disks: disks(&[512]), ..config(1) }, &new_memory());
    assert!(refused.unwrap_err().to_string().contains("version 1 has no devices"));
}

#[test]
fn devices_lie_side_by_side_each_with_an_interrupt_of_its_own() {
    let spec = proto::VmConfig { disks: disks(&[512; 8]), ..config(2) };
    let slots = Slots::new(&spec, &new_memory()).unwrap();
    let places: Vec<_> = slots.placed().map(|(_, place)| place).collect();
    let kinds: Vec<_> = slots.placed().map(|(device, _)| device.kind()).collect();
    assert_eq!(kinds[..3], [Kind::Entropy, Kind::Balloon, Kind::Block]);
    assert_eq!((places[2].address, places[2].gsi), (0xd000_2000, 18));
    let lines: std::collections::BTreeSet<u32> = places.iter().map(|place| place.gsi).collect();
    assert_eq!(lines.len(), places.len());
    let mut id = [0; 4];
    assert!(slots.read(0xd000_2008, &mut id));
    assert_eq!(id, [2, 0, 0, 0]);
    assert!(!slots.read(0xd000_a000, &mut id), "beyond the last");
    assert!(!slots.read(0xcfff_fffc, &mut id), "before the first");
}

#[test]
fn a_vm_runs_only_with_all_its_disks_and_each_refusal_names_the_disk() {
    let spec = proto::VmConfig { disks: disks(&[512, 1024]), ..config(2) };
    let slots = Slots::new(&spec, &new_memory()).unwrap();
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1024).unwrap();
        file
    };
    let backing =
        |index| proto::ChildBacking { device: Some(proto::child_backing::Device::Disk(index)) };
    let words = |result: Result<(), DeviceError>| result.unwrap_err().to_string();
    slots.attach(&[backing(0)], vec![file()]).unwrap();
    assert!(words(slots.expect_attached()).contains("disk 1 has nothing behind it"));
    assert!(words(slots.attach(&[backing(2)], vec![file()])).contains("no disk 2"));
    let two = words(slots.attach(&[backing(0), backing(1)], vec![file()]));
    assert!(two.contains("2 devices shall be attached, and 1"), "{two}");
    slots.attach(&[backing(1)], vec![file()]).unwrap();
    slots.expect_attached().unwrap();
    slots.detach().unwrap();
    assert!(words(slots.expect_attached()).contains("disk 0"));
}

#[test]
fn sizes_and_numbers_of_disks_are_checked() {
    for (sizes, expected) in [
        (vec![513], "disk 0 has 513 bytes"),
        (vec![512, 0], "disk 1 has 0 bytes"),
        (vec![u64::MAX - 511], "disk 0"),
        (vec![512; 9], "9 disks"),
    ] {
        let spec = proto::VmConfig { disks: disks(&sizes), ..config(2) };
        let refused = Slots::new(&spec, &new_memory()).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
}
