//! VMM children on real KVM, with the pulse guest in them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migr_proto::v1::{GuestStopKind, VmConfig};
use migrd::pages::{PageBitmap, PageSet};
use migrd::serial_log::Reader;
use migrd::units::{PAGE_SIZE, PageIndex, PageRun, WorkloadId};
use migrd::workload::vm::child::{Child, ChildError, ChildSpec, ChildState};
use migrd::workload::{ChunkSink, ChunkSource, StreamKey};

const MIB: u64 = 1 << 20;
/// Long enough for a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);

struct Vm {
    child: Child,
    directory: tempfile::TempDir,
    _end: EndOnPanic,
}

/// Children outlive their handles: a test that fails must not leave any.
struct EndOnPanic(u32);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let pid = nix::unistd::Pid::from_raw(self.0.try_into().unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL);
        }
    }
}

fn config(memory_bytes: u64, cpus: u32, cmdline: &str) -> VmConfig {
    VmConfig { version: 2, memory_bytes, cpus, cmdline: cmdline.into(), ..Default::default() }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn spec(directory: &Path, config: VmConfig, kernel: Option<File>) -> ChildSpec {
    ChildSpec {
        id: WorkloadId::random(),
        directory: directory.to_owned(),
        config,
        kernel,
        initrd: None,
        program: PathBuf::from(env!("CARGO_BIN_EXE_migrd")),
    }
}

async fn spawn(config: VmConfig, kernel: Option<&[u8]>) -> Vm {
    let directory = tempfile::tempdir().unwrap();
    let child = Child::spawn(spec(directory.path(), config, kernel.map(file_of))).await.unwrap();
    let _end = EndOnPanic(child.pid());
    Vm { child, directory, _end }
}

async fn pulse(memory_bytes: u64, cpus: u32, cmdline: &str) -> Vm {
    let vm = spawn(config(memory_bytes, cpus, cmdline), Some(pulse::ELF)).await;
    vm.child.boot().await.unwrap();
    vm.child.run().await.unwrap();
    vm
}

impl Vm {
    fn serial(&self) -> String {
        serial(self.directory.path())
    }

    /// Waits until the serial output is as wanted, and gives it back.
    async fn until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let mut written = self.child.log().written;
        let waited = tokio::time::timeout(PATIENCE, async {
            let mut states = self.child.states();
            while !wanted(&self.serial()) {
                tokio::select! {
                    rung = written.changed() => rung.unwrap(),
                    _ = states.wait_for(|s| matches!(s, ChildState::Dead(_))) => break,
                }
            }
        });
        if waited.await.is_err() || !wanted(&self.serial()) {
            panic!("{:?}; serial output:\n{}", self.child.states().borrow(), self.serial());
        }
        self.serial()
    }
}

fn serial(directory: &Path) -> String {
    let mut reader = Reader::open(File::open(directory.join("serial.log")).unwrap()).unwrap();
    let start = reader.oldest().unwrap();
    let (entries, _) = reader.read_from(start, usize::MAX).unwrap();
    String::from_utf8(entries.into_iter().flat_map(|entry| entry.data).collect()).unwrap()
}

/// The number after the last `key` in a heartbeat line that is whole.
fn last(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().rev().find(|line| line.contains(key) && line.contains(" back="))?;
    let value = line.split(key).nth(1)?;
    value.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Every heartbeat counts one further than the one before, with no error.
fn assert_healthy(text: &str) {
    // The guest may be in the middle of a line.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let beats: Vec<&str> = whole.lines().filter(|line| line.contains(" back=")).collect();
    assert!(!beats.is_empty(), "no heartbeats in:\n{text}");
    for beat in &beats {
        assert!(beat.ends_with("errors=0 back=0"), "{beat}");
    }
    let passes: Vec<u64> = beats.iter().filter_map(|line| last(line, "pulse pass=")).collect();
    assert!(passes.windows(2).all(|pair| pair[1] == pair[0] + 1), "{passes:?}");
}

/// A kernel of these 32-bit instructions, entered as PVH says.
fn kernel_of(code: &[u8]) -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let segment = |kind: u32, offset: u64, size: u64| {
        let (flags, address) = (7_u32, u64::from(LOAD));
        let mut bytes = Vec::new();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        for field in [offset, address, address, size, size, 4] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    };
    let note_at = 64 + 2 * 56;
    let code_at = note_at + 20;
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [u64::from(LOAD), 64, 0] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend(segment(4, note_at, 20));
    elf.extend(segment(1, code_at, code.len() as u64));
    for field in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Copies what `from` holds in memory to `to`, as a migration would.
fn copy_memory(from: &Child, to: &Child) {
    let (source, sink) = (from.mapping(), to.mapping());
    let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap()];
    for key in [StreamKey(0), StreamKey(1)] {
        for run in source.populated(key).unwrap().runs() {
            for index in run.first.0..run.first.0 + run.count {
                let offset = PageIndex(index).offset();
                source.read(key, offset, &mut page).unwrap();
                sink.write(key, offset, &page).unwrap();
            }
        }
        assert_eq!(source.hash(key).unwrap(), sink.hash(key).unwrap());
    }
}

async fn stopped(child: &Child) -> GuestStopKind {
    let mut states = child.states();
    let wanted = |s: &ChildState| matches!(s, ChildState::Stopped(_) | ChildState::Dead(_));
    let state = tokio::time::timeout(PATIENCE, states.wait_for(wanted)).await.unwrap().unwrap();
    match &*state {
        ChildState::Stopped(stop) => stop.kind,
        other => panic!("{other:?}"),
    }
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn the_logs_of_a_child_are_for_its_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let vm = spawn(config(64 * MIB, 1, ""), None).await;
    for name in ["serial.log", "vmm.log"] {
        let file = std::fs::metadata(vm.directory.path().join(name)).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600, "{name}");
    }
    vm.child.kill().await;
}

#[tokio::test]
async fn pulse_boots_and_its_heart_beats() {
    let vm = pulse(64 * MIB, 1, "hot=1M static=4M").await;
    let text = vm.until(|t| last(t, "static_rounds=") > Some(0)).await;
    assert_healthy(&text);
    vm.child.kill().await;
}

#[tokio::test]
async fn a_paused_guest_is_silent_and_goes_on_when_run() {
    let vm = pulse(64 * MIB, 2, "hot=1M cpus=2").await;
    vm.until(|t| last(t, "pulse pass=") >= Some(3)).await;
    for _ in 0..20 {
        vm.child.pause().await.unwrap();
        assert_eq!(*vm.child.states().borrow(), ChildState::Paused);
        let before = (vm.serial(), vm.child.mapping().hash(StreamKey(0)).unwrap());
        let after = (vm.serial(), vm.child.mapping().hash(StreamKey(0)).unwrap());
        assert_eq!(before, after, "a paused guest wrote something");
        vm.child.run().await.unwrap();
        let seen = last(&before.0, "pulse pass=");
        vm.until(|t| last(t, "pulse pass=") > seen).await;
    }
    assert_healthy(&vm.serial());
    vm.child.kill().await;
}

async fn moves_to_another_child(cpus: u32) {
    let command = format!("hot=2M static=8M cpus={cpus}");
    let old = pulse(64 * MIB, cpus, &command).await;
    old.until(|t| last(t, "pulse pass=") >= Some(5)).await;
    let new = spawn(config(64 * MIB, cpus, &command), None).await;
    old.child.pause().await.unwrap();
    let state = old.child.save().await.unwrap();
    copy_memory(&old.child, &new.child);
    let log = |vm: &Vm| vm.directory.path().join("serial.log");
    std::fs::copy(log(&old), log(&new)).unwrap();
    old.child.kill().await;
    new.child.restore(state).await.unwrap();
    assert_eq!(*new.child.states().borrow(), ChildState::Paused);
    new.child.run().await.unwrap();
    let seen = last(&old.serial(), "pulse pass=").unwrap();
    new.until(|t| last(t, "pulse pass=") >= Some(seen + 5)).await;
    assert_healthy(&new.serial());
    new.child.kill().await;
}

#[tokio::test]
async fn a_guest_with_one_vcpu_goes_on_in_another_child() {
    moves_to_another_child(1).await;
}

#[tokio::test]
async fn a_guest_with_two_vcpus_goes_on_in_another_child() {
    moves_to_another_child(2).await;
}

#[tokio::test]
async fn a_state_is_refused_by_a_child_of_another_shape() {
    let old = pulse(64 * MIB, 1, "").await;
    old.child.pause().await.unwrap();
    let state = old.child.save().await.unwrap();
    for (memory, cpus) in [(32 * MIB, 1), (64 * MIB, 2)] {
        let new = spawn(config(memory, cpus, ""), None).await;
        let refused = new.child.restore(state.clone()).await;
        assert!(matches!(refused, Err(ChildError::Refused(_))), "{refused:?}");
        new.child.kill().await;
    }
    let new = spawn(config(64 * MIB, 1, ""), None).await;
    assert!(new.child.restore(state.slice(..state.len() / 2)).await.is_err());
    assert_eq!(*new.child.states().borrow(), ChildState::Ready);
    new.child.kill().await;
    old.child.kill().await;
}

#[tokio::test]
async fn the_dirty_log_shows_what_was_written_since_it_was_cleared() {
    let vm = pulse(256 * MIB, 1, "hot=1M static=4M").await;
    assert!(vm.child.dirty_read().await.is_err(), "tracking is off");
    vm.child.dirty_start(false).await.unwrap();
    let all = vm.child.dirty_read().await.unwrap();
    assert_eq!(all.count(), 256 * MIB / PAGE_SIZE, "at first every page is dirty");
    vm.until(|t| last(t, "pulse pass=") >= Some(2)).await;
    vm.child.dirty_clear(&all).await.unwrap();
    let seen = last(&vm.serial(), "pulse pass=").unwrap();
    vm.until(|t| last(t, "pulse pass=") >= Some(seen + 3)).await;
    let dirty = vm.child.dirty_read().await.unwrap();
    let hot = hot_pages(&vm.serial());
    let pages = dirty.get(StreamKey(0)).unwrap();
    for page in hot.first.0..hot.first.0 + hot.count {
        assert!(pages.contains(PageIndex(page)), "hot page {page} is not dirty");
    }
    assert!(dirty.count() < 2 * hot.count, "{} dirty pages", dirty.count());
    vm.child.dirty_stop().await.unwrap();
    assert!(vm.child.dirty_read().await.is_err(), "tracking is off again");
    vm.child.kill().await;
}

/// Where pulse says its hot pages are.
fn hot_pages(text: &str) -> PageRun {
    let range = text.split("pulse plan hot 0x").nth(1).unwrap().lines().next().unwrap();
    let (start, end) = range.split_once("..0x").unwrap();
    let page = |hex: &str| u64::from_str_radix(hex, 16).unwrap() / PAGE_SIZE;
    PageRun { first: PageIndex(page(start)), count: page(end) - page(start) }
}

#[tokio::test]
async fn what_the_vmm_writes_itself_is_dirty_until_it_is_cleared() {
    let vm = spawn(config(64 * MIB, 1, ""), Some(pulse::ELF)).await;
    vm.child.dirty_start(false).await.unwrap();
    let all = vm.child.dirty_read().await.unwrap();
    vm.child.dirty_clear(&all).await.unwrap();
    assert!(vm.child.dirty_read().await.unwrap().is_empty());
    // The guest has not run: only the loader writes.
    vm.child.boot().await.unwrap();
    let loaded = vm.child.dirty_read().await.unwrap();
    assert_eq!(vm.child.dirty_read().await.unwrap(), loaded, "a read clears nothing");
    let populated = vm.child.mapping().populated(StreamKey(0)).unwrap();
    let kernel = PageIndex(0x10_0000 / PAGE_SIZE);
    assert!(loaded.get(StreamKey(0)).unwrap().contains(kernel));
    let mut missed = populated;
    missed.subtract(loaded.get(StreamKey(0)).unwrap());
    assert!(missed.is_empty(), "written by the loader, not dirty: {missed:?}");
    let mut one = PageBitmap::none(64 * MIB / PAGE_SIZE);
    one.insert(PageRun { first: kernel, count: 1 });
    let mut cleared = PageSet::default();
    cleared.set(StreamKey(0), one);
    vm.child.dirty_clear(&cleared).await.unwrap();
    let mut expected = loaded;
    expected.subtract(&cleared);
    assert_eq!(vm.child.dirty_read().await.unwrap(), expected);
    vm.child.kill().await;
}

#[tokio::test]
async fn a_guest_that_ends_is_stopped_and_its_memory_can_still_be_read() {
    let vm = pulse(64 * MIB, 1, "hot=nonsense").await;
    assert_eq!(stopped(&vm.child).await, GuestStopKind::Shutdown);
    assert!(vm.serial().contains("pulse error"), "{}", vm.serial());
    assert!(vm.child.run().await.is_err());
    assert!(vm.child.pause().await.is_err());
    vm.child.save().await.unwrap();
    vm.child.kill().await;
}

/// Waits until the guest that was started `resets` resets ago has counted some passes.
async fn counts_again(vm: &Vm, resets: usize) {
    let since = |text: &str| text.split("pulse again").nth(resets).map(str::to_owned);
    let counted = |text: &str| since(text).and_then(|t| last(&t, "pulse pass=")).unwrap_or(0) > 3;
    let text = vm.until(counted).await;
    assert_healthy(&since(&text).unwrap());
}

#[tokio::test]
async fn a_guest_that_resets_itself_is_started_anew() {
    let vm = pulse(128 * MIB, 2, "hot=4M static=8M").await;
    counts_again(&vm, 0).await;
    let kernel = || file_of(pulse::ELF);
    let refused = vm.child.reboot(kernel(), None).await.unwrap_err();
    assert!(refused.to_string().contains("cannot reboot"), "{refused}");
    for resets in 1..3 {
        vm.child.console_input(&b"reset\n"[..]).await.unwrap();
        assert_eq!(stopped(&vm.child).await, GuestStopKind::Reset);
        assert!(vm.child.run().await.is_err());
        vm.child.reboot(kernel(), None).await.unwrap();
        assert_eq!(*vm.child.states().borrow(), ChildState::Paused);
        vm.child.run().await.unwrap();
        counts_again(&vm, resets).await;
    }
    vm.child.kill().await;
}

#[tokio::test]
async fn what_a_reset_took_from_memory_counts_as_written() {
    let vm = pulse(128 * MIB, 1, "hot=4M static=8M").await;
    counts_again(&vm, 0).await;
    vm.child.dirty_start(false).await.unwrap();
    let all = vm.child.dirty_read().await.unwrap();
    vm.child.dirty_clear(&all).await.unwrap();
    vm.child.console_input(&b"reset\n"[..]).await.unwrap();
    assert_eq!(stopped(&vm.child).await, GuestStopKind::Reset);
    vm.child.reboot(file_of(pulse::ELF), None).await.unwrap();
    let written = vm.child.dirty_read().await.unwrap();
    let region = StreamKey(0);
    assert_eq!(written.get(region).unwrap().count(), 128 * MIB / PAGE_SIZE);
    let populated = vm.child.mapping().populated(region).unwrap().count();
    assert!(populated < 4 * MIB / PAGE_SIZE, "{populated} pages hold memory");
    vm.child.kill().await;
}

#[rustfmt::skip]
const LISTENS_TO_THE_BUTTON: [u8; 46] = [
    0xbf, 0x00, 0x00, 0xc0, 0xfe,             // mov edi, 0xfec00000: the IOAPIC
    0xc7, 0x07, 0x2c, 0x00, 0x00, 0x00,       // select the low half of pin 14
    0xc7, 0x47, 0x10, 0x3e, 0x00, 0x00, 0x00, // vector 0x3e, edge, not masked
    0x66, 0xba, 0xf8, 0x03,                   // mov dx, 0x3f8: COM1
    0xb0, 0x52, 0xee, 0xb0, 0x0a, 0xee,       // mov al, 'R'; out dx, al; and a newline
    0x66, 0xba, 0x02, 0x06,                   // mov dx, 0x602: the register of events
    0xec, 0xa8, 0x01, 0x74, 0xfb,             // in al, dx; test al, 1; jz back to the in
    0x66, 0xba, 0x00, 0x06,                   // mov dx, 0x600: the sleep control register
    0xb0, 0x34, 0xee, 0xf4, 0xf4,             // mov al, 0x34; out dx, al; hlt
];

#[tokio::test]
async fn a_guest_that_listens_to_its_power_button_switches_itself_off() {
    let vm = spawn(config(64 * MIB, 1, ""), Some(&kernel_of(&LISTENS_TO_THE_BUTTON))).await;
    vm.child.boot().await.unwrap();
    let deaf = vm.child.power_button().await.unwrap_err();
    assert!(deaf.to_string().contains("--force"), "{deaf}");
    vm.child.run().await.unwrap();
    vm.until(|text| text.contains('R')).await;
    vm.child.power_button().await.unwrap();
    assert_eq!(stopped(&vm.child).await, GuestStopKind::Shutdown);
    assert!(vm.child.power_button().await.is_err());
    vm.child.kill().await;
}

#[tokio::test]
async fn a_press_that_the_guest_has_not_seen_travels_with_it() {
    let of = config(64 * MIB, 1, "");
    let vm = spawn(of.clone(), Some(&kernel_of(&LISTENS_TO_THE_BUTTON))).await;
    vm.child.boot().await.unwrap();
    vm.child.run().await.unwrap();
    vm.until(|text| text.contains('R')).await;
    vm.child.pause().await.unwrap();
    vm.child.power_button().await.unwrap();
    let state = vm.child.save().await.unwrap();
    let there = spawn(of, None).await;
    copy_memory(&vm.child, &there.child);
    there.child.restore(state).await.unwrap();
    vm.child.kill().await;
    there.child.run().await.unwrap();
    assert_eq!(stopped(&there.child).await, GuestStopKind::Shutdown);
    there.child.kill().await;
}

#[tokio::test]
async fn a_vm_of_the_first_version_has_no_power_button() {
    let old = VmConfig { version: 1, ..config(64 * MIB, 1, "") };
    let vm = spawn(old, Some(pulse::ELF)).await;
    vm.child.boot().await.unwrap();
    let none = vm.child.power_button().await.unwrap_err();
    assert!(none.to_string().contains("without a power button"), "{none}");
    vm.child.kill().await;
}

#[tokio::test]
async fn a_triple_fault_is_reported() {
    // An undefined instruction, and no interrupt table to handle it.
    let vm = spawn(config(64 * MIB, 1, ""), Some(&kernel_of(&[0x0f, 0x0b]))).await;
    vm.child.boot().await.unwrap();
    vm.child.run().await.unwrap();
    assert_eq!(stopped(&vm.child).await, GuestStopKind::TripleFault);
    vm.child.kill().await;
}

#[tokio::test]
async fn a_guest_that_switches_itself_off_is_reported() {
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0x01, 0x06, // mov dx, 0x601: the sleep status register
        0xec, 0x84, 0xc0,       // in al, dx; test al, al
        0x75, 0xfe,             // jnz to itself
        0xb0, 0x34,             // mov al, 0x34: sleep type 5, and go
        0x4a, 0xee,             // dec edx; out dx, al
        0xf4,                   // hlt
    ];
    let vm = spawn(config(64 * MIB, 1, ""), Some(&kernel_of(&code))).await;
    vm.child.boot().await.unwrap();
    vm.child.run().await.unwrap();
    assert_eq!(stopped(&vm.child).await, GuestStopKind::Shutdown);
    vm.child.kill().await;
}

#[tokio::test]
async fn memory_goes_on_above_the_hole() {
    let vm = pulse(5 << 30, 1, "hot=1M skip=3056M static=32M check=4M").await;
    let text = vm.until(|t| last(t, "pulse pass=") >= Some(2)).await;
    assert_healthy(&text);
    assert!(text.contains("pulse plan static 0x100000000"), "{text}");
    vm.child.kill().await;
}

#[tokio::test]
async fn console_input_reaches_the_guest() {
    let vm = pulse(64 * MIB, 1, "hot=64K rate=50").await;
    vm.until(|t| t.contains("pulse ready")).await;
    let line = "x".repeat(100);
    vm.child.console_input(format!("{line}\n")).await.unwrap();
    vm.until(|t| t.contains(&line)).await;
    let flood = vec![b'y'; 100_000];
    assert!(matches!(vm.child.console_input(flood).await, Err(ChildError::Refused(_))));
    vm.child.kill().await;
}

#[tokio::test]
async fn a_child_outlives_its_handle_and_is_adopted() {
    let Vm { child, directory, _end } = pulse(64 * MIB, 1, "hot=1M").await;
    let pid = child.pid();
    drop(child);
    let child = Child::adopt(directory.path()).await.unwrap().expect("the child lives");
    assert_eq!(child.pid(), pid);
    assert_eq!(*child.states().borrow(), ChildState::Running);
    assert_eq!(child.config().cmdline, "hot=1M");
    let vm = Vm { child, directory, _end };
    let seen = last(&vm.serial(), "pulse pass=").unwrap_or(0);
    assert_healthy(&vm.until(|t| last(t, "pulse pass=") > Some(seen + 2)).await);
    vm.child.kill().await;
    assert!(!exists(pid), "no process and no zombie is left");
    assert!(Child::adopt(vm.directory.path()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_newer_connection_replaces_the_older() {
    let vm = pulse(64 * MIB, 1, "hot=1M").await;
    let newer = Child::adopt(vm.directory.path()).await.unwrap().expect("the child lives");
    newer.pause().await.unwrap();
    assert!(matches!(vm.child.pause().await, Err(ChildError::Dead(_))));
    newer.run().await.unwrap();
    newer.kill().await;
}

#[tokio::test]
async fn a_killed_child_is_dead_to_every_caller_and_leaves_nothing() {
    let vm = pulse(64 * MIB, 1, "hot=1M").await;
    let pid = vm.child.pid();
    tokio::join!(vm.child.kill(), vm.child.kill());
    assert!(matches!(*vm.child.states().borrow(), ChildState::Dead(_)));
    assert!(matches!(vm.child.pause().await, Err(ChildError::Dead(_))));
    assert!(!exists(pid));
}

#[tokio::test]
async fn a_child_that_is_told_to_quit_ends() {
    let vm = spawn(config(64 * MIB, 1, ""), None).await;
    let pid = vm.child.pid();
    vm.child.quit().await.unwrap();
    assert!(!exists(pid));
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_no_process() {
    let directory = tempfile::tempdir().unwrap();
    let too_many = config(64 * MIB, 100_000, "");
    let refused = Child::spawn(spec(directory.path(), too_many, None)).await.unwrap_err();
    assert!(refused.to_string().contains("100000 vCPUs"), "{refused}");
    let odd = config(64 * MIB + 1, 1, "");
    let refused = Child::spawn(spec(directory.path(), odd, None)).await.unwrap_err();
    assert!(refused.to_string().contains("multiple of 4096"), "{refused}");
    assert!(Child::adopt(directory.path()).await.unwrap().is_none());
}

#[tokio::test]
async fn what_is_no_kernel_is_refused_and_the_child_stays() {
    let vm = spawn(config(64 * MIB, 1, ""), Some(&[7; 5000])).await;
    assert!(matches!(vm.child.boot().await, Err(ChildError::Refused(_))));
    assert!(matches!(vm.child.run().await, Err(ChildError::Refused(_))));
    assert_eq!(*vm.child.states().borrow(), ChildState::Ready);
    vm.child.kill().await;
}

/// What the child has of its own: not the guest's memory, which is shared.
fn own_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    field("VmRSS:") - field("RssShmem:")
}

#[tokio::test]
async fn a_child_takes_little_beyond_the_guests_memory() {
    let vm = pulse(256 * MIB, 2, "hot=1M static=64M cpus=2").await;
    vm.until(|t| last(t, "pulse pass=") >= Some(3)).await;
    vm.child.dirty_start(false).await.unwrap();
    vm.child.dirty_read().await.unwrap();
    let own = own_kib(vm.child.pid());
    println!("{own} KiB");
    assert!(own <= 12 * 1024, "{own} KiB");
    vm.child.kill().await;
}
