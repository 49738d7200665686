//! The registers, as a driver sees them.

use super::super::entropy::Entropy;
use super::super::mmio::EVENT_IDX;
use super::*;

fn idle() -> Rig {
    Rig::new(Box::<Entropy>::default(), new_memory())
}

#[test]
fn a_driver_finds_the_device_and_what_it_offers() {
    let rig = idle();
    assert_eq!(rig.read(0), 0x7472_6976, "the magic value");
    assert_eq!(rig.read(4), 2, "the version");
    assert_eq!(rig.read(8), 4, "the device id");
    rig.write(0x14, 1);
    assert_eq!(rig.read(0x10), 1, "VERSION_1 is bit 32");
    rig.write(0x14, 2);
    assert_eq!(rig.read(0x10), 0, "there are no features beyond 63");
    assert_eq!(rig.read(0x34), 64, "the size of queue 0");
    rig.write(0x30, 1);
    assert_eq!(rig.read(0x34), 0, "there is no queue 1");
    rig.write(0x30, u32::MAX);
    assert_eq!((rig.read(0x34), rig.read(0x44)), (0, 0));
}

#[test]
fn features_that_were_not_offered_are_not_agreed_to() {
    for features in [0, 1 << 31, VERSION_1 | 1 << 40, VERSION_1 | 1] {
        let rig = idle();
        assert_eq!(rig.agree(features) & FEATURES_OK, 0, "{features:#x}");
        rig.write(0x70, 1 | 2 | FEATURES_OK | DRIVER_OK);
        assert_eq!(rig.read(0x70) & DRIVER_OK, 0, "{features:#x}");
    }
    assert_eq!(idle().agree(VERSION_1 | EVENT_IDX) & FEATURES_OK, FEATURES_OK);
}

#[test]
fn a_reset_forgets_the_driver_and_the_device_starts_anew() {
    let mut rig = Rig::working(Box::<Entropy>::default(), 0);
    rig.ask(0, &[(DATA, 16, true)]);
    rig.answered(0);
    assert_eq!(rig.read(0x60), 1, "the interrupt's reason");
    rig.write(0x70, 0);
    assert_eq!((rig.read(0x70), rig.read(0x44), rig.read(0x60)), (0, 0, 0));
    rig.memory.write_obj(0_u32, GuestAddress(Rig::rings(0) + AVAILABLE)).unwrap();
    rig.memory.write_obj(0_u32, GuestAddress(Rig::rings(0) + USED)).unwrap();
    rig.made = vec![0];
    assert_eq!(rig.set_up(0), None);
    rig.ask(0, &[(DATA, 16, true)]);
    assert_eq!(rig.answered(0).1, 16);
}

#[test]
fn what_was_set_up_stays_while_the_device_works() {
    let rig = Rig::working(Box::<Entropy>::default(), 0);
    rig.write(0x30, 0);
    rig.write(0x44, 0);
    rig.write(0x20, u32::MAX);
    assert_eq!(rig.read(0x44), 1);
    assert_eq!(rig.device.save().driver_features, VERSION_1);
}

#[test]
fn accesses_of_odd_widths_and_places_do_nothing() {
    let rig = idle();
    for width in 0..=16 {
        for offset in (0..0x1000).step_by(3) {
            let mut data = vec![0xaa; width];
            rig.device.read(offset, &mut data);
            assert_eq!(rig.device.write(offset, &vec![0; width]), None);
        }
    }
    assert_eq!(rig.device.write(u64::MAX, &[0; 4]), None);
    assert_eq!(rig.read(0x70), 0);
}

#[test]
fn an_acknowledged_interrupt_is_over_and_the_others_stay() {
    let irq = Interrupt::new(event());
    irq.raise(irq::USED);
    irq.raise(irq::CONFIG);
    irq.acknowledge(irq::USED);
    assert_eq!(irq.status(), irq::CONFIG);
    assert_eq!(irq.line().read().unwrap(), 2, "raised twice");
}

#[test]
fn the_driver_writes_only_what_it_may_of_the_configuration_space() {
    let space = ConfigSpace::new(vec![1, 2, 3, 4], 1..3);
    space.write(0, &[9; 8]);
    let mut all = [7; 6];
    space.read(0, &mut all);
    assert_eq!(all, [1, 9, 9, 4, 0, 0]);
    space.read(usize::MAX, &mut all);
    assert_eq!(all, [0; 6]);
    assert_eq!(space.generation(), 0);
    space.change(3, &[5, 6]);
    assert_eq!((space.generation(), space.word(0)), (1, 0x0509_0901));
}
