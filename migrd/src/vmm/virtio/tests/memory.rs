//! Devices that have to do with memory: the balloon and the source of random
//! numbers.

use nix::unistd::{Whence, lseek};
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryRegion;
use vm_memory::MmapRegion;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use super::super::balloon::Balloon;
use super::super::entropy::Entropy;
use super::*;

const REPORTING: u64 = 1 << 5;

/// Whether the page at this address, below the hole, takes memory of the host.
fn is_taken(memory: &Memory, at: u64) -> bool {
    let region = memory.iter().next().unwrap();
    let at = i64::try_from(at).unwrap();
    lseek(region.file_offset().unwrap().file(), at, Whence::SeekData) == Ok(at)
}

fn is_dirty(memory: &Memory, at: u64) -> bool {
    memory.iter().next().unwrap().bitmap().dirty_at(usize::try_from(at).unwrap())
}

/// Forgets what was written so far.
fn clean(memory: &Memory) {
    let mapping: &MmapRegion<AtomicBitmap> = memory.iter().next().unwrap();
    mapping.bitmap().reset();
}

fn byte(memory: &Memory, at: u64) -> u8 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn reported_pages_go_back_to_the_host_and_read_as_zeros() {
    let mut rig = Rig::working(Box::<Balloon>::default(), REPORTING);
    rig.memory.write_slice(&[9; 8 * 4096], GuestAddress(DATA)).unwrap();
    clean(&rig.memory);
    // Whole pages only: the first and the last are in use in part.
    rig.ask(2, &[(DATA + 1, 3 * 4096, true), (DATA + 5 * 4096, 4096, true)]);
    assert_eq!(rig.answered(2).1, 0);
    let taken: Vec<bool> = (0..8).map(|page| is_taken(&rig.memory, DATA + page * 4096)).collect();
    assert_eq!(taken, [true, false, false, true, true, false, true, true]);
    let content: Vec<u8> = (0..8).map(|page| byte(&rig.memory, DATA + page * 4096)).collect();
    assert_eq!(content, [9, 0, 0, 9, 9, 0, 9, 9]);
    let dirty: Vec<bool> = (0..8).map(|page| is_dirty(&rig.memory, DATA + page * 4096)).collect();
    assert_eq!(dirty, [false, true, true, false, false, true, false, false]);
}

#[test]
fn pages_given_to_the_balloon_go_back_to_the_host() {
    let mut rig = Rig::working(Box::<Balloon>::default(), 0);
    let pages = DATA + 0x4000;
    rig.memory.write_slice(&[9; 8 * 4096], GuestAddress(pages)).unwrap();
    let number = u32::try_from(pages / 4096).unwrap();
    let given = [number + 4, number + 1, number + 2, number + 1];
    for (i, number) in given.into_iter().enumerate() {
        let at = DATA + u64::try_from(i).unwrap() * 4;
        rig.memory.write_obj(number, GuestAddress(at)).unwrap();
    }
    rig.ask(0, &[(DATA, 10, false), (DATA + 10, 6, false)]);
    rig.answered(0);
    let content: Vec<u8> = (0..6).map(|page| byte(&rig.memory, pages + page * 4096)).collect();
    assert_eq!(content, [9, 0, 0, 9, 0, 9]);
    rig.ask(1, &[(DATA, 16, false)]);
    rig.answered(1);
    rig.device.write(0x104, &4_u32.to_le_bytes());
    assert_eq!(rig.read(0x104), 4, "the driver says how many it gave");
    rig.device.write(0x100, &4_u32.to_le_bytes());
    assert_eq!(rig.read(0x100), 0, "how many are asked for is not its to say");
}

#[test]
fn a_page_that_the_guest_does_not_have_cannot_be_given() {
    let mut rig = Rig::working(Box::<Balloon>::default(), 0);
    rig.memory.write_obj(u32::MAX, GuestAddress(DATA)).unwrap();
    rig.ask(0, &[(DATA, 4, false)]);
    let stop = rig.ended();
    assert_eq!(stop.kind, StopKind::DeviceAbused);
    assert!(stop.details.contains("(balloon), queue 0: 4096 bytes at 0xffffffff000"), "{stop:?}");
}

#[test]
fn random_numbers_fill_what_is_asked_for_up_to_a_limit() {
    let mut rig = Rig::working(Box::<Entropy>::default(), 0);
    rig.ask(0, &[(DATA, 1000, true), (DATA + 0x1000, 24, true)]);
    assert_eq!(rig.answered(0).1, 1024);
    let mut got = [0; 1000];
    rig.memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
    let different: std::collections::BTreeSet<u8> = got.into_iter().collect();
    assert!(different.len() > 100, "{different:?}");
    rig.ask(0, &[(DATA, 1 << 20, true)]);
    assert_eq!(rig.answered(0).1, 64 * 1024);
    assert_eq!(byte(&rig.memory, DATA + 64 * 1024), 0);
    rig.ask(0, &[(DATA, 16, false)]);
    assert_eq!(rig.answered(0).1, 0, "nothing to write into");
}
