//! Disks: what guests ask of them, and files that fail or hang.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use migr_proto::v1 as proto;

use super::super::blk::Disk;
use super::super::blk::volume::Volume;
use super::super::mmio::{EVENT_IDX, INDIRECT_DESC};
use super::*;
use crate::pages::PageBitmap;
use crate::sys::vm::Slice;
use crate::units::PageIndex;

const DISK_BYTES: u64 = 1 << 20;
const FLUSH: u64 = 1 << 9;
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const NAME: u32 = 8;

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

fn with(volume: impl Volume + 'static) -> Box<Disk> {
    let mut disk = Disk::new(3, DISK_BYTES, false);
    disk.put(Box::new(volume));
    Box::new(disk)
}

impl Rig {
    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    /// One request with one buffer of data; gives status and used length.
    fn request(&mut self, kind: u32, sector: u64, length: u32) -> (u8, u32) {
        self.header(kind, sector);
        let data = (BUFFER, length, kind != OUT);
        let parts = [(HEADER, 16, false), data, (STATUS, 1, true)];
        let parts = parts.into_iter().filter(|(_, length, _)| *length > 0);
        self.ask(0, &parts.collect::<Vec<_>>());
        let (_, used) = self.answered(0);
        (self.status(), used)
    }
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_back() {
    let file = image();
    let mut rig = Rig::working(with(file.try_clone().unwrap()), FLUSH | EVENT_IDX);
    rig.memory.write_slice(&[0x5a; 4096], GuestAddress(BUFFER)).unwrap();
    assert_eq!(rig.request(OUT, 9, 4096), (0, 1));
    assert_eq!(rig.request(SYNC, 0, 0), (0, 1));
    let mut there = [0; 4096 + 512];
    file.read_exact_at(&mut there, 9 * 512).unwrap();
    assert!(there[..4096].iter().all(|b| *b == 0x5a) && there[4096..].iter().all(|b| *b == 0));
    rig.memory.write_slice(&[0; 4096], GuestAddress(BUFFER)).unwrap();
    assert_eq!(rig.request(IN, 8, 1024), (0, 1025));
    let mut back = [1; 1024];
    rig.memory.read_slice(&mut back, GuestAddress(BUFFER)).unwrap();
    assert!(back[..512].iter().all(|b| *b == 0) && back[512..].iter().all(|b| *b == 0x5a));
}

#[test]
fn many_requests_pass_a_small_ring_each_once() {
    let file = image();
    let mut rig = Rig::working(with(file.try_clone().unwrap()), FLUSH | EVENT_IDX);
    for round in 0..200_u64 {
        let mark = u8::try_from(round % 251).unwrap();
        rig.memory.write_slice(&[mark; 512], GuestAddress(BUFFER)).unwrap();
        assert_eq!(rig.request(OUT, round, 512), (0, 1));
        let mut there = [0; 512];
        file.read_exact_at(&mut there, round * 512).unwrap();
        assert_eq!(there, [mark; 512]);
    }
    assert_eq!(rig.used(0), 200);
}

#[test]
fn a_disk_has_a_name_and_a_size() {
    let mut rig = Rig::working(with(image()), 0);
    assert_eq!((rig.read(0x100), rig.read(0x104)), (2048, 0), "sectors of 512 bytes");
    assert_eq!(rig.request(NAME, 0, 20), (0, 21));
    let mut name = [0; 20];
    rig.memory.read_slice(&mut name, GuestAddress(BUFFER)).unwrap();
    assert_eq!(&name, b"migr-disk-3\0\0\0\0\0\0\0\0\0");
}

#[test]
fn what_is_not_on_the_disk_or_no_request_fails_and_the_guest_lives() {
    let mut rig = Rig::working(with(image()), FLUSH);
    for (kind, sector, length, status) in [
        (IN, 2048, 512, 1),
        (OUT, 2047, 1024, 1),
        (IN, u64::MAX, 512, 1),
        (OUT, u64::MAX / 512, 512, 1),
        (IN, 0, 511, 1),
        (11, 0, 512, 2),
        (u32::MAX, 0, 512, 2),
        (IN, 2047, 512, 0),
    ] {
        let (got, _) = rig.request(kind, sector, length);
        assert_eq!(got, status, "type {kind}, sector {sector}, {length} bytes");
    }
    assert_eq!(rig.lifecycle.phase(), Phase::Running);
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let mut disk = Disk::new(0, DISK_BYTES, true);
    disk.put(Box::new(image()));
    let mut rig = Rig::working(Box::new(disk), 1 << 5);
    assert_eq!(rig.request(OUT, 0, 512).0, 1);
    assert_eq!(rig.request(IN, 0, 512).0, 0);
    assert_eq!(rig.request(SYNC, 0, 0).0, 0);
}

#[test]
fn a_request_may_come_in_an_indirect_table() {
    let file = image();
    file.write_all_at(&[7; 512], 512).unwrap();
    let mut rig = Rig::working(with(file), INDIRECT_DESC);
    rig.header(IN, 1);
    let table = DATA + 0x200;
    rig.descriptor(table, 0, (HEADER, 16), NEXT);
    rig.descriptor(table, 1, (BUFFER, 512), NEXT | WRITE);
    rig.descriptor(table, 2, (STATUS, 1), WRITE);
    rig.descriptor(Rig::rings(0), 5, (table, 48), INDIRECT);
    rig.make_available(0, 5);
    assert_eq!(rig.answered(0), (5, 513));
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(BUFFER)).unwrap(), 7);
}

#[test]
fn an_image_that_is_too_short_is_not_attached() {
    let mut disk = Disk::new(0, DISK_BYTES, false);
    let short = image();
    short.set_len(DISK_BYTES - 1).unwrap();
    let refused = disk.attach(short).unwrap_err();
    assert!(refused.to_string().contains("1048575 bytes"), "{refused}");
    assert!(!disk.attached());
    disk.attach(image()).unwrap();
    assert!(disk.attached());
    disk.detach().unwrap();
    assert!(!disk.attached());
}

/// A file that fails and hangs as told.
#[derive(Debug, Default)]
struct Odd {
    full: AtomicBool,
    sync_fails: AtomicBool,
    syncs: AtomicUsize,
    writes: AtomicUsize,
    /// Held by a test while writes shall hang.
    hangs: Mutex<()>,
    waiting: AtomicBool,
}

impl Volume for Arc<Odd> {
    fn read_at(&self, _: u64, into: &[Slice<'_>]) -> io::Result<usize> {
        Ok(into.iter().map(Slice::len).sum())
    }

    fn write_at(&self, _: u64, from: &[Slice<'_>]) -> io::Result<usize> {
        self.waiting.store(true, Ordering::SeqCst);
        drop(self.hangs.lock().unwrap());
        self.writes.fetch_add(1, Ordering::SeqCst);
        if self.full.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(from.iter().map(Slice::len).sum())
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        // As the system: it says it once.
        if self.sync_fails.swap(false, Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

#[test]
fn a_full_file_system_is_an_io_error_to_the_guest_and_passes() {
    let odd = Arc::new(Odd::default());
    let mut rig = Rig::working(with(Arc::clone(&odd)), FLUSH);
    odd.full.store(true, Ordering::SeqCst);
    assert_eq!(rig.request(OUT, 0, 512).0, 1);
    odd.full.store(false, Ordering::SeqCst);
    assert_eq!(rig.request(OUT, 0, 512).0, 0);
    assert_eq!(odd.syncs.load(Ordering::SeqCst), 0, "the guest flushes when it wants");
}

#[test]
fn without_flushes_every_write_lasts_when_it_is_done() {
    let odd = Arc::new(Odd::default());
    let mut rig = Rig::working(with(Arc::clone(&odd)), 0);
    assert_eq!(rig.request(OUT, 0, 512).0, 0);
    assert_eq!(odd.syncs.load(Ordering::SeqCst), 1);
}

#[test]
fn a_sync_that_fails_while_the_device_stands_fails_the_next_flush() {
    let odd = Arc::new(Odd::default());
    let mut rig = Rig::working(with(Arc::clone(&odd)), FLUSH);
    odd.sync_fails.store(true, Ordering::SeqCst);
    rig.drain();
    rig.gate.open();
    assert_eq!(rig.request(SYNC, 0, 0).0, 1, "the system would say it only once");
    assert_eq!(rig.request(SYNC, 0, 0).0, 0);
}

#[test]
fn a_disk_that_does_not_take_everything_stays_attached_and_the_guest_hears_of_it() {
    let odd = Arc::new(Odd::default());
    let mut rig = Rig::working(with(Arc::clone(&odd)), FLUSH);
    odd.sync_fails.store(true, Ordering::SeqCst);
    rig.drain();
    let detach = || rig.device.with_device(|disk| (disk.detach().is_ok(), disk.attached()));
    assert_eq!(detach(), (false, true), "the sync before it stood has failed");
    odd.sync_fails.store(true, Ordering::SeqCst);
    assert_eq!(detach(), (false, true));
    let told = proto::BlockState { sync_failed: true };
    let state = rig.device.save();
    assert_eq!(state.kind, Some(proto::virtio_state::Kind::Block(told)));
    assert_eq!(detach(), (true, false));
    // At another host, too.
    let mut other = with(Arc::clone(&odd));
    other.restore(&state.kind.unwrap()).unwrap();
    rig.device.with_device(|disk| disk.restore(&state.kind.unwrap())).unwrap();
    rig.device.with_device(|disk| disk.attach(image())).unwrap();
    rig.gate.open();
    assert_eq!(rig.request(SYNC, 0, 0).0, 1);
    assert_eq!(rig.request(SYNC, 0, 0).0, 0);
    assert_eq!(other.save(), state.kind.unwrap());
}

#[test]
fn a_disk_that_hangs_does_not_stand_in_time_and_goes_on_when_it_can() {
    let odd = Arc::new(Odd::default());
    let mut rig = Rig::working(with(Arc::clone(&odd)), FLUSH);
    let hanging = odd.hangs.lock().unwrap();
    rig.header(OUT, 0);
    let parts = [(HEADER, 16, false), (BUFFER, 512, false), (STATUS, 1, true)];
    rig.ask(0, &parts);
    wait(|| odd.waiting.load(Ordering::SeqCst));
    // What vCPUs touch waits for nobody.
    rig.write(0x64, u32::MAX);
    assert_eq!((rig.read(0x60), rig.read(0x100), rig.read(0x44)), (0, 2048, 1));
    rig.gate.close();
    rig.device.wake();
    assert_eq!(rig.gate.wait_all(Duration::from_millis(20)), Err(0));
    rig.ask(0, &parts);
    drop(hanging);
    rig.gate.wait_all(PATIENCE).unwrap();
    assert_eq!(rig.used(0), 1, "what it had begun is done, and nothing else");
    rig.gate.open();
    rig.answered(0);
    assert_eq!(odd.writes.load(Ordering::SeqCst), 2);
}

fn pages(set: &PageBitmap) -> Vec<u64> {
    (0..set.pages()).filter(|page| set.contains(PageIndex(*page))).collect()
}

#[test]
fn written_pages_of_the_disk_are_taken_down_once() {
    let disk = with(image());
    let log = disk.log();
    let mut rig = Rig::working(disk, FLUSH);
    assert_eq!(rig.request(OUT, 0, 512).0, 0);
    assert!(log.take().is_empty(), "nobody wants to know yet");
    log.start();
    assert_eq!(rig.request(OUT, 7, 1024).0, 0, "bytes 3584 to 4607");
    assert_eq!(rig.request(OUT, 2047, 512).0, 0);
    assert_eq!(rig.request(IN, 80, 512).0, 0);
    assert_eq!(rig.request(OUT, 2048, 512).0, 1, "beyond the end");
    assert_eq!(pages(&log.take()), [0, 1, 255]);
    assert!(log.take().is_empty());
    log.stop();
}

#[test]
fn what_a_disk_writes_into_memory_is_dirty() {
    use vm_memory::GuestMemoryBackend;
    use vm_memory::bitmap::Bitmap;
    let mut rig = Rig::working(with(image()), 0);
    let memory = Arc::clone(&rig.memory);
    let region = memory.iter().next().unwrap();
    let bitmap = |at: u64| region.bitmap().dirty_at(usize::try_from(at).unwrap());
    let mapping: &vm_memory::MmapRegion<vm_memory::bitmap::AtomicBitmap> = region;
    mapping.bitmap().reset();
    assert_eq!(rig.request(IN, 0, 8192).0, 0);
    for written in [BUFFER, BUFFER + 4096, STATUS, Rig::rings(0) + USED] {
        assert!(bitmap(written), "{written:#x}");
    }
    assert!(!bitmap(BUFFER + 8192));
}
