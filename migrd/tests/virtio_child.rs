//! Virtio devices of VMM children, on real KVM: guests of a few instructions
//! drive a disk, and its file is looked at.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migr_proto::v1 as proto;
use migr_proto::v1::{child_message, child_reply, child_request};
use migrd::child::frame;
use migrd::sys::fds;
use migrd::units::{PAGE_SIZE, PageIndex, WorkloadId};
use migrd::workload::vm::child::{Child, ChildSpec};
use migrd::workload::{ChunkSink, ChunkSource, StreamKey};
use proto::GuestStopKind;

const MEMORY_BYTES: u64 = 64 << 20;
const DISK_BYTES: u64 = 1 << 20;
/// Long enough for a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// The first disk: slot 2, after the devices that every VM has.
const DISK: u32 = 0xd000_2000;
/// Where the guest's parts lie.
const CODE: u32 = 0x10_0000;
const TABLE: u32 = CODE + 0x1000;
const AVAILABLE: u32 = CODE + 0x2000;
const USED: u32 = CODE + 0x3000;
const HEADER: u32 = CODE + 0x4000;
const BUFFER: u32 = CODE + 0x5000;

/// 32-bit code, entered as PVH says.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    /// `mov dword [address], value`.
    fn put(mut self, address: u32, value: u32) -> Self {
        self.0.extend([0xc7, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Waits until the half word at `address` is `value`.
    fn until(mut self, address: u32, value: u16) -> Self {
        self.0.extend([0x66, 0x81, 0x3d]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x75, 0xf5]); // jne to the comparison
        self
    }

    /// Waits for a byte from the console.
    fn until_input(mut self) -> Self {
        self.0.extend([0xba, 0xfd, 0x03, 0, 0]); // mov edx, 0x3fd: line status
        self.0.extend([0xec, 0xa8, 0x01, 0x74, 0xfb]); // in al, dx; test al, 1; jz
        self
    }

    /// Switches the machine off.
    fn off(mut self) -> Self {
        self.0.extend([0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4]);
        self
    }

    /// Sets up the disk's one queue, of 4 entries, and says that it is ready.
    fn set_up(self) -> Self {
        self.put(DISK + 0x70, 3)
            .put(DISK + 0x24, 0)
            .put(DISK + 0x20, 1 << 9)
            .put(DISK + 0x24, 1)
            .put(DISK + 0x20, 1)
            .put(DISK + 0x70, 3 | 8)
            .put(DISK + 0x30, 0)
            .put(DISK + 0x38, 4)
            .put(DISK + 0x80, TABLE)
            .put(DISK + 0x90, AVAILABLE)
            .put(DISK + 0xa0, USED)
            .put(DISK + 0x44, 1)
            .put(DISK + 0x70, 3 | 8 | 4)
    }

    /// Asks for write number `number`, of the buffer to that sector, and rings.
    fn write(self, number: u16) -> Self {
        let ring = AVAILABLE + 4 + u32::from(number % 4) * 2;
        assert!(ring.is_multiple_of(4), "one entry is written with its neighbour");
        self.put(HEADER, 1)
            .put(HEADER + 8, number.into())
            .put(BUFFER, 0x6d69_6772 + u32::from(number))
            .put(ring, 0)
            .put(AVAILABLE, u32::from(number + 1) << 16)
            .put(DISK + 0x50, 0)
    }

    /// As a kernel, with three descriptors in place: header, 512 bytes, status.
    fn kernel(mut self) -> Vec<u8> {
        self.0.resize(0x1000, 0xf4);
        for (address, length, flags, next) in
            [(HEADER, 16, 1_u16, 1_u16), (BUFFER, 512, 1, 2), (HEADER + 32, 1, 2, 0)]
        {
            self.0.extend(u64::from(address).to_le_bytes());
            self.0.extend(u32::to_le_bytes(length));
            self.0.extend(flags.to_le_bytes());
            self.0.extend(next.to_le_bytes());
        }
        elf(&self.0)
    }
}

fn elf(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let segment = |kind: u32, offset: u64, size: u64| {
        let mut bytes: Vec<u8> = [kind, 7].into_iter().flat_map(u32::to_le_bytes).collect();
        for field in [offset, CODE.into(), CODE.into(), size, size, 4] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    };
    let note_at = 64 + 2 * 56;
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [u64::from(CODE), 64, 0] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend(segment(4, note_at, 20));
    elf.extend(segment(1, note_at + 20, code.len() as u64));
    for field in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), CODE] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

fn config() -> proto::VmConfig {
    let disk = proto::DiskConfig { path: "/disk".into(), read_only: false, bytes: DISK_BYTES };
    proto::VmConfig {
        version: 2,
        memory_bytes: MEMORY_BYTES,
        cpus: 1,
        disks: vec![disk],
        ..Default::default()
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

/// A child, and a connection of its own to it, which can send descriptors.
struct Vm {
    child: Child,
    wire: Wire,
    _directory: tempfile::TempDir,
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let pid = nix::unistd::Pid::from_raw(self.child.pid().try_into().unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL);
        }
    }
}

async fn spawn(kernel: Option<Vec<u8>>) -> Vm {
    let directory = tempfile::tempdir().unwrap();
    let spec = ChildSpec {
        id: WorkloadId::random(),
        directory: directory.path().to_owned(),
        config: config(),
        kernel: kernel.map(|kernel| file_of(&kernel)),
        initrd: None,
        program: PathBuf::from(env!("CARGO_BIN_EXE_migrd")),
    };
    let child = Child::spawn(spec).await.unwrap();
    let wire = Wire::connect(directory.path());
    Vm { child, wire, _directory: directory }
}

struct Wire {
    socket: UnixStream,
    received: Vec<u8>,
    next: u64,
    told: Vec<proto::ChildStatus>,
}

impl Wire {
    fn connect(directory: &Path) -> Self {
        let socket = UnixStream::connect(directory.join("control.sock")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; 1];
        let (_, shared) = fds::receive(&socket, &mut greeting).unwrap();
        assert_eq!((greeting, shared.len()), ([b'M'], 3));
        Self { socket, received: Vec::new(), next: 1, told: Vec::new() }
    }

    fn message(&mut self) -> child_message::Message {
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(message) = frame::decode::<proto::ChildMessage>(&mut self.received).unwrap()
            {
                return message.message.unwrap();
            }
            let (length, _) = fds::receive(&self.socket, &mut buffer).unwrap();
            assert!(length > 0, "the child is gone");
            self.received.extend(&buffer[..length]);
        }
    }

    fn ask(
        &mut self,
        request: child_request::Request,
        beside: &[BorrowedFd<'_>],
    ) -> Result<child_reply::Reply, String> {
        let id = self.next;
        self.next += 1;
        let mut bytes = Vec::new();
        frame::encode(&proto::ChildRequest { id, request: Some(request) }, &mut bytes).unwrap();
        fds::send(&self.socket, &bytes, beside).unwrap();
        loop {
            match self.message() {
                child_message::Message::Reply(reply) => {
                    assert_eq!(reply.id, id);
                    return match reply.reply.unwrap() {
                        child_reply::Reply::Error(why) => Err(why),
                        reply => Ok(reply),
                    };
                }
                child_message::Message::StateChanged(status) => self.told.push(status),
                child_message::Message::CannotStart(why) => panic!("{why}"),
            }
        }
    }

    fn done(&mut self, request: child_request::Request) -> Result<(), String> {
        self.ask(request, &[]).map(|reply| {
            assert_eq!(reply, child_reply::Reply::Done(proto::ChildDone {}));
        })
    }

    fn attach(&mut self, file: &File) -> Result<(), String> {
        let disk = proto::child_backing::Device::Disk(0);
        let backings = vec![proto::ChildBacking { device: Some(disk) }];
        let request = child_request::Request::Attach(proto::ChildAttach { backings });
        self.ask(request, &[file.as_fd()]).map(drop)
    }

    fn run(&mut self) -> Result<(), String> {
        self.done(child_request::Request::Run(proto::ChildRun {}))
    }

    fn start(&mut self, file: &File) {
        self.attach(file).unwrap();
        self.done(child_request::Request::Boot(proto::ChildBoot {})).unwrap();
        self.run().unwrap();
    }

    /// Waits until the guest has ended.
    fn stopped(&mut self) -> proto::GuestStop {
        loop {
            if let Some(stop) = self.told.drain(..).find_map(|status| status.stop) {
                return stop;
            }
            if let child_message::Message::StateChanged(status) = self.message() {
                self.told.push(status);
            }
        }
    }
}

fn sector(file: &File, number: u64) -> u32 {
    let mut word = [0; 4];
    file.read_exact_at(&mut word, number * 512).unwrap();
    u32::from_le_bytes(word)
}

/// Copies what `from` holds in memory to `to`, as a migration would.
fn copy_memory(from: &Child, to: &Child) {
    let (source, sink) = (from.mapping(), to.mapping());
    let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap()];
    let key = StreamKey(0);
    for run in source.populated(key).unwrap().runs() {
        for index in run.first.0..run.first.0 + run.count {
            let offset = PageIndex(index).offset();
            source.read(key, offset, &mut page).unwrap();
            sink.write(key, offset, &page).unwrap();
        }
    }
}

#[tokio::test]
async fn a_guest_writes_to_its_disk() {
    let code = Code::default().set_up().write(0).until(USED + 2, 1).off();
    let mut vm = spawn(Some(code.kernel())).await;
    let file = image();
    vm.wire.start(&file);
    assert_eq!(vm.wire.stopped().kind(), GuestStopKind::Shutdown);
    assert_eq!(sector(&file, 0), 0x6d69_6772);
    vm.child.kill().await;
}

#[tokio::test]
async fn a_guest_goes_on_writing_in_another_child() {
    let first = Code::default().set_up().write(0).until(USED + 2, 1);
    let code = first.until_input().write(2).until(USED + 2, 3).off();
    let mut old = spawn(Some(code.kernel())).await;
    let file = image();
    old.wire.start(&file);
    while sector(&file, 0) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    old.wire.done(child_request::Request::Drain(proto::ChildDrain { limit_ms: 60_000 })).unwrap();
    old.wire.done(child_request::Request::Pause(proto::ChildPause {})).unwrap();
    let saved = old.wire.ask(child_request::Request::Save(proto::ChildSave {}), &[]).unwrap();
    let child_reply::Reply::Saved(state) = saved else { panic!("{saved:?}") };
    old.wire.done(child_request::Request::Detach(proto::ChildDetach {})).unwrap();
    let mut new = spawn(None).await;
    copy_memory(&old.child, &new.child);
    old.child.kill().await;
    new.wire.done(child_request::Request::Restore(state)).unwrap();
    let refused = new.wire.run().unwrap_err();
    assert!(refused.contains("disk 0 has nothing behind it"), "{refused}");
    new.wire.attach(&file).unwrap();
    let input = child_request::Request::ConsoleInput("x".into());
    new.wire.done(input).unwrap();
    new.wire.run().unwrap();
    assert_eq!(new.wire.stopped().kind(), GuestStopKind::Shutdown);
    assert_eq!((sector(&file, 0), sector(&file, 2)), (0x6d69_6772, 0x6d69_6774));
    new.child.kill().await;
}

#[tokio::test]
async fn a_guest_that_abuses_its_disk_is_stopped_with_the_reason() {
    let code = Code::default().set_up().put(AVAILABLE, 5 << 16).put(DISK + 0x50, 0).until(USED, 7);
    let mut vm = spawn(Some(code.kernel())).await;
    vm.wire.start(&image());
    let stop = vm.wire.stopped();
    assert_eq!(stop.kind(), GuestStopKind::DeviceAbused);
    assert!(stop.details.contains("virtio device 2 (disk), queue 0"), "{}", stop.details);
    assert_eq!(
        vm.wire.run().unwrap_err(),
        "cannot run: the guest is Stopped(Stop { kind: \
         DeviceAbused, details: \"virtio device 2 (disk), queue 0: its available ring jumped \
         further than it is long\" })"
    );
    vm.child.kill().await;
}

#[tokio::test]
async fn what_a_disk_writes_shows_in_the_dirty_log_and_so_do_writes_to_it() {
    let first = Code::default().set_up().until_input();
    let code = first.write(2).until(USED + 2, 3).until_input();
    let mut vm = spawn(Some(code.kernel())).await;
    let file = image();
    vm.wire.start(&file);
    let ask = |vm: &mut Vm, request| match vm.wire.ask(request, &[]).unwrap() {
        child_reply::Reply::Dirty(pages) => migrd::vmm::pages::from_wire(&pages),
        other => panic!("{other:?}"),
    };
    vm.wire
        .done(child_request::Request::DirtyStart(proto::ChildDirtyStart { disks: true }))
        .unwrap();
    let read = || child_request::Request::DirtyRead(proto::ChildDirtyRead {});
    let all = ask(&mut vm, read());
    assert!(all.get(StreamKey(128)).unwrap().count() >= DISK_BYTES / PAGE_SIZE);
    let clear = child_request::Request::DirtyClear(migrd::vmm::pages::to_wire(&all));
    vm.wire.done(clear).unwrap();
    assert!(ask(&mut vm, read()).get(StreamKey(128)).unwrap().is_empty());
    vm.wire.done(child_request::Request::ConsoleInput("x".into())).unwrap();
    while sector(&file, 2) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // The bit is set after the write.
    let start = std::time::Instant::now();
    let dirty = loop {
        let dirty = ask(&mut vm, read());
        if !dirty.get(StreamKey(128)).unwrap().is_empty() {
            break dirty;
        }
        assert!(start.elapsed() < PATIENCE, "the disk's write is not in the log");
    };
    assert!(dirty.get(StreamKey(128)).unwrap().contains(PageIndex(0)));
    vm.wire.done(child_request::Request::Drain(proto::ChildDrain { limit_ms: 60_000 })).unwrap();
    let dirty = ask(&mut vm, read());
    let used = PageIndex(u64::from(USED) / PAGE_SIZE);
    assert!(dirty.get(StreamKey(0)).unwrap().contains(used), "the used ring");
    vm.child.kill().await;
}

#[tokio::test]
async fn descriptors_that_do_not_belong_are_refused_and_the_next_request_has_its_own() {
    let mut vm = spawn(None).await;
    let short = tempfile::tempfile().unwrap();
    let refused = vm.wire.attach(&short).unwrap_err();
    assert!(refused.contains("the image has 0 bytes"), "{refused}");
    let attach = child_request::Request::Attach(proto::ChildAttach {
        backings: vec![proto::ChildBacking { device: None }],
    });
    let refused = vm.wire.ask(attach.clone(), &[short.as_fd()]).unwrap_err();
    assert!(refused.contains("no such device"), "{refused}");
    let refused = vm.wire.ask(attach, &[]).unwrap_err();
    assert!(refused.contains("1 devices shall be attached, and 0 descriptors"), "{refused}");
    vm.wire.attach(&image()).unwrap();
    vm.child.kill().await;
}
