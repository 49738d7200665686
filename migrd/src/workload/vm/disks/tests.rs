use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::sys::stat::Mode;
use tempfile::TempDir;

use super::copies::{prepare, problems as copy_problems};
use super::*;
use crate::units::{HostId, PAGE_SIZE, PageIndex, PageRun, WorkloadId};
use crate::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey};

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self, name: &str, bytes: u64) -> DiskConfig {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        self.disk(name, bytes)
    }

    fn disk(&self, name: &str, bytes: u64) -> DiskConfig {
        DiskConfig { path: self.path(name).display().to_string(), read_only: false, bytes }
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }
}

fn read_only(disk: &DiskConfig) -> DiskConfig {
    DiskConfig { read_only: true, ..disk.clone() }
}

fn holder(name: &str) -> Holder {
    Holder {
        workload: WorkloadId::random(),
        name: name.into(),
        host: HostId::random(),
        address: "10.0.0.1:7070".into(),
    }
}

/// The same workload on another host.
fn elsewhere(by: &Holder) -> Holder {
    Holder { host: HostId::random(), address: "10.0.0.2:7070".into(), ..by.clone() }
}

fn path(disk: &DiskConfig) -> &Path {
    Path::new(&disk.path)
}

fn code<T>(result: Result<T, DiskError>) -> &'static str {
    result.err().map_or("none", |error| error.code())
}

fn codes(found: &[DiskError]) -> Vec<&'static str> {
    found.iter().map(DiskError::code).collect()
}

fn noted_state(disk: &DiskConfig) -> Option<State> {
    holder::read_note(path(disk)).unwrap().map(|note| note.state)
}

#[test]
fn what_is_not_an_image_is_refused_by_name() {
    let place = Place::new();
    let open = |name: &str, read_only| Image::open(&place.path(name), read_only);
    assert_eq!(code(open("nothing", false)), "destination-disk-missing");
    fs::create_dir(place.path("directory")).unwrap();
    nix::unistd::mkfifo(&place.path("pipe"), Mode::S_IRWXU).unwrap();
    for name in ["directory", "pipe"] {
        let error = open(name, true).unwrap_err();
        assert!(matches!(error, DiskError::NotAnImage { .. }), "{name}: {error}");
    }
    for bytes in [0, 100, 513] {
        place.image("odd", bytes);
        let error = open("odd", false).unwrap_err();
        assert!(matches!(error, DiskError::OddSize { .. }), "{bytes}: {error}");
    }
    assert!(matches!(Image::open(Path::new("/dev/null"), true), Err(DiskError::NotAnImage { .. })));
}

#[test]
fn an_image_of_another_size_than_the_vm_knows_is_refused() {
    let place = Place::new();
    let disk = place.image("a", 8192);
    assert!(Image::open_as(&disk).is_ok());
    let other = DiskConfig { bytes: 4096, ..disk };
    let error = Image::open_as(&other).unwrap_err();
    assert_eq!(error.code(), "destination-disk-size");
    assert!(error.to_string().contains("8192") && error.to_string().contains("4096"), "{error}");
}

#[test]
fn a_second_writer_is_refused_and_told_who_has_the_image() {
    let place = Place::new();
    let disk = place.image("a", 4096);
    let web = holder("web");
    let held = Image::take(&disk, &web, Purpose::New).unwrap();
    let second = Image::take(&disk, &holder("db"), Purpose::New).unwrap_err();
    assert_eq!(second.code(), "destination-disk-locked");
    assert!(second.to_string().contains("web on the host at 10.0.0.1:7070"), "{second}");
    // A reader would see a file system change under it.
    let reader = Image::take(&read_only(&disk), &holder("db"), Purpose::New);
    assert_eq!(code(reader), "destination-disk-locked");
    drop(held);
    // A host that is there can't be wrong about its own dead.
    let mut db = holder("db");
    db.host = web.host;
    assert!(Image::take(&disk, &db, Purpose::New).is_ok());
}

#[test]
fn readers_share_an_image_and_leave_nothing_beside_it() {
    let place = Place::new();
    let disk = place.image("a", 4096);
    let shared = read_only(&disk);
    let first = Image::take(&shared, &holder("web"), Purpose::New).unwrap();
    let second = Image::take(&shared, &holder("db"), Purpose::New).unwrap();
    assert_eq!(code(Image::take(&disk, &holder("new"), Purpose::New)), "destination-disk-locked");
    assert_eq!(place.names(), ["a"]);
    drop((first, second));
}

#[test]
fn a_lock_lasts_as_long_as_the_last_descriptor_of_the_open_file() {
    let place = Place::new();
    let disk = place.image("a", 4096);
    let image = Image::take(&disk, &holder("web"), Purpose::New).unwrap();
    let given = image.share().unwrap();
    drop(image);
    let probe = File::open(path(&disk)).unwrap();
    assert!(!holder::try_lock(&probe, path(&disk), true).unwrap());
    drop(given);
    assert!(holder::try_lock(&probe, path(&disk), true).unwrap());
}

#[test]
fn what_another_host_holds_is_not_taken_even_where_its_lock_does_not_show() {
    let place = Place::new();
    let disk = place.image("a", 4096);
    let web = holder("web");
    drop(Image::take(&disk, &web, Purpose::New).unwrap());
    let error = Image::take(&disk, &elsewhere(&holder("db")), Purpose::New).unwrap_err();
    assert_eq!(error.code(), "destination-disk-locked");
    let note = holder::note_path(path(&disk));
    assert!(error.remedy().contains(note.to_str().unwrap()), "{}", error.remedy());
    // The workload itself goes on with it where the journals say.
    assert!(Image::take(&disk, &elsewhere(&web), Purpose::Arrived).is_ok());
    fs::remove_file(note).unwrap();
    assert!(Image::take(&disk, &holder("db"), Purpose::New).is_ok());
}

#[test]
fn who_may_take_an_image_follows_from_its_note() {
    let image = Path::new("/images/a");
    let web = holder("web");
    let (there, other) = (elsewhere(&web), holder("db"));
    let neighbour = Holder { host: web.host, ..holder("db") };
    let may = |state, by: &Holder, purpose| {
        code(holder::may_take(image, Some(&Note::new(state, &web)), by, purpose))
    };
    use Purpose::{Arrived, New, TakenBack};
    let table = [
        (State::Held, &web, TakenBack, "none"),
        (State::Held, &there, Arrived, "none"),
        (State::Held, &neighbour, New, "none"),
        (State::Held, &other, New, "destination-disk-locked"),
        (State::Released, &web, TakenBack, "none"),
        (State::Released, &there, Arrived, "none"),
        (State::Released, &neighbour, New, "destination-disk-locked"),
        (State::Released, &other, New, "destination-disk-locked"),
        (State::Moved, &web, TakenBack, "none"),
        (State::Moved, &web, Arrived, "destination-disk-stale"),
        (State::Moved, &there, Arrived, "destination-disk-stale"),
        (State::Moved, &neighbour, New, "destination-disk-stale"),
        (State::Moved, &other, New, "destination-disk-stale"),
        (State::Arriving, &web, Arrived, "none"),
        (State::Arriving, &web, TakenBack, "none"),
        (State::Arriving, &web, New, "destination-disk-stale"),
        (State::Arriving, &there, Arrived, "destination-disk-stale"),
        (State::Arriving, &neighbour, New, "destination-disk-stale"),
    ];
    for (state, by, purpose, expected) in table {
        assert_eq!(may(state, by, purpose), expected, "{state:?} {purpose:?} {}", by.name);
    }
    assert_eq!(code(holder::may_take(image, None, &web, New)), "none");
}

#[test]
fn a_damaged_note_keeps_everybody_off_and_is_named() {
    let place = Place::new();
    let disk = place.image("a", 4096);
    let note = place.path("a.migr");
    let good = serde_json::to_string(&Note::new(State::Held, &holder("web"))).unwrap();
    let newer = good.replace("\"version\":1", "\"version\":2");
    let hostile = good.replace("\"web\"", "\"web\\u001b[2J\"");
    let huge = " ".repeat(1 << 20);
    assert!(newer != good && hostile != good);
    for text in ["", "{", "{}", "[1]", &newer, &hostile, &huge] {
        fs::write(&note, text).unwrap();
        let error = Image::take(&disk, &holder("db"), Purpose::New).unwrap_err();
        assert!(matches!(error, DiskError::DamagedNote { .. }), "{error}");
        assert!(error.remedy().contains("a.migr"));
    }
    fs::remove_file(&note).unwrap();
    fs::create_dir(&note).unwrap();
    assert!(Image::take(&disk, &holder("db"), Purpose::New).is_err());
    fs::remove_dir(&note).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &note).unwrap();
    assert!(Image::take(&disk, &holder("db"), Purpose::New).is_err());
}

#[test]
fn an_image_has_one_note_whatever_links_lead_to_it() {
    let place = Place::new();
    let disk = place.image("a", 4096);
    std::os::unix::fs::symlink(place.path("a"), place.path("link")).unwrap();
    drop(Image::take(&place.disk("link", 4096), &holder("web"), Purpose::New).unwrap());
    assert_eq!(place.names(), ["a", "a.migr", "link"]);
    assert_eq!(code(Image::take(&disk, &holder("db"), Purpose::New)), "destination-disk-locked");
}

#[test]
fn where_one_disk_cannot_be_had_the_others_are_as_before() {
    let place = Place::new();
    let (a, b) = (place.image("a", 4096), place.image("b", 4096));
    let (web, db) = (holder("web"), holder("db"));
    // `a` comes from another host; `b` is in use here.
    holder::write_note(path(&a), &Note::new(State::Released, &elsewhere(&web)), false).unwrap();
    let held = Image::take(&b, &db, Purpose::New).unwrap();
    assert_eq!(
        code(take_all(&[a.clone(), b.clone()], &web, Purpose::Arrived)),
        "destination-disk-locked"
    );
    assert_eq!(noted_state(&a), Some(State::Released));
    drop(held);
    let new = take_all(&[b.clone(), place.disk("c", 4096)], &db, Purpose::New);
    assert_eq!(code(new), "destination-disk-missing");
    assert_eq!(noted_state(&b), Some(State::Held), "of before, and its lock is free");
    let taken =
        take_all(&[a.clone(), b], &Holder { host: db.host, ..web.clone() }, Purpose::Arrived);
    assert_eq!(taken.unwrap().len(), 2);
    assert_eq!(noted_state(&a), Some(State::Held));
}

#[test]
fn a_destination_says_what_keeps_it_from_using_the_same_images() {
    let place = Place::new();
    let (web, db) = (holder("web"), holder("db"));
    let here = elsewhere(&web);
    let (a, b, c) = (place.image("a", 4096), place.image("b", 4096), place.image("c", 4096));
    let _source = Image::take(&a, &web, Purpose::New).unwrap();
    let _other = Image::take(&b, &db, Purpose::New).unwrap();
    let wrong = DiskConfig { bytes: 8192, ..c.clone() };
    let disks = [a, b.clone(), wrong, c, place.disk("d", 4096), read_only(&b)];
    let found = codes(&shared_problems(&disks, &here));
    let locked = "destination-disk-locked";
    assert_eq!(found, [locked, "destination-disk-size", "destination-disk-missing", locked]);
    // Nothing was touched.
    assert_eq!(place.names(), ["a", "a.migr", "b", "b.migr", "c"]);
}

fn copies(place: &Place, disks: &[DiskConfig], by: &Holder) -> Result<DiskStreams, DiskError> {
    prepare(disks, by, place.0.path())
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; 4096]
}

#[test]
fn a_copy_is_a_new_sparse_file_that_goes_with_an_arrival_that_fails() {
    let place = Place::new();
    let vm = Place::new();
    let web = holder("web");
    let disk = place.disk("a", 1 << 20);
    assert_eq!(codes(&copy_problems(std::slice::from_ref(&disk), &[4096], &web)), [""; 0]);
    let streams = copies(&vm, std::slice::from_ref(&disk), &web).unwrap();
    streams.write(stream(0), 4096, &page(7)).unwrap();
    streams.close().unwrap();
    let meta = fs::metadata(path(&disk)).unwrap();
    assert_eq!(meta.len(), 1 << 20);
    assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 < 1 << 16, "{meta:?}");
    assert_eq!(noted_state(&disk), Some(State::Arriving));
    undo(vm.0.path(), web.workload, HostId::random());
    assert_eq!(place.names(), ["a", "a.migr"], "not this host's");
    undo(vm.0.path(), web.workload, web.host);
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn a_copy_that_has_become_the_vms_stays() {
    let (place, vm) = (Place::new(), Place::new());
    let web = holder("web");
    let (disk, tools) = (place.disk("a", 4096), read_only(&place.disk("b", 4096)));
    let streams = copies(&vm, &[disk.clone(), tools.clone()], &web).unwrap();
    streams.close().unwrap();
    streams.unlock();
    let taken = take_all(&[disk.clone(), tools], &web, Purpose::Arrived).unwrap();
    undo(vm.0.path(), web.workload, web.host);
    assert_eq!(place.names(), ["a", "a.migr", "b"]);
    assert_eq!(noted_state(&disk), Some(State::Held));
    // A start that failed after all leaves what was there before it.
    put_back(&taken);
    assert_eq!(noted_state(&disk), Some(State::Arriving));
    undo(vm.0.path(), web.workload, web.host);
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn only_what_the_same_workload_left_behind_is_overwritten() {
    let (place, vm) = (Place::new(), Place::new());
    let web = holder("web");
    let disk = place.image("a", 8192);
    let refused = |by: &Holder| codes(&copy_problems(std::slice::from_ref(&disk), &[8192], by));
    assert_eq!(refused(&web), ["destination-disk-exists"], "no note");
    for (state, by) in
        [(State::Held, &web), (State::Moved, &holder("db")), (State::Moved, &elsewhere(&web))]
    {
        holder::write_note(path(&disk), &Note::new(state, by), false).unwrap();
        assert_eq!(refused(&web), ["destination-disk-exists"], "{state:?}");
        assert_eq!(code(copies(&vm, std::slice::from_ref(&disk), &web)), "destination-disk-exists");
    }
    fs::write(path(&disk), [[1; 4096], [2; 4096]].concat()).unwrap();
    holder::write_note(path(&disk), &Note::new(State::Moved, &web), false).unwrap();
    assert_eq!(refused(&web), [""; 0]);
    let streams = copies(&vm, std::slice::from_ref(&disk), &web).unwrap();
    streams.write(stream(0), 0, &page(3)).unwrap();
    streams.close().unwrap();
    // What was not sent is a hole at the source: the old bytes are gone.
    assert_eq!(fs::read(path(&disk)).unwrap(), [[3; 4096], [0; 4096]].concat());
    drop(streams);
    undo(vm.0.path(), web.workload, web.host);
    assert_eq!(noted_state(&disk), Some(State::Moved));
    assert_eq!(code(Image::take(&disk, &web, Purpose::New)), "destination-disk-stale");
}

#[test]
fn a_read_only_image_that_is_there_is_compared_and_never_written() {
    let (place, vm) = (Place::new(), Place::new());
    let by = holder("web");
    fs::write(place.path("iso"), [[1; 4096], [0; 4096], [2; 4096]].concat()).unwrap();
    let iso = read_only(&place.disk("iso", 3 * 4096));
    assert_eq!(codes(&copy_problems(std::slice::from_ref(&iso), &[0], &by)), [""; 0]);
    let run = |pages: &[(u64, u8)]| {
        let streams = copies(&vm, std::slice::from_ref(&iso), &by).unwrap();
        for (index, byte) in pages {
            streams.write(stream(0), index * PAGE_SIZE, &page(*byte)).unwrap();
        }
        code(streams.close())
    };
    assert_eq!(run(&[(0, 1), (2, 2)]), "none");
    assert_eq!(run(&[(0, 1), (1, 0), (2, 2)]), "none");
    assert_eq!(run(&[(0, 1), (2, 9)]), "destination-disk-differs");
    assert_eq!(run(&[(0, 1)]), "destination-disk-differs", "the source has a hole there");
    let streams = copies(&vm, std::slice::from_ref(&iso), &by).unwrap();
    streams.zero(stream(0), 0, 4096).unwrap();
    assert_eq!(code(streams.close()), "destination-disk-differs");
    assert_eq!(fs::read(path(&iso)).unwrap()[0], 1);
    let longer = DiskConfig { bytes: 4 * 4096, ..iso };
    assert_eq!(codes(&copy_problems(&[longer], &[0], &by)), ["destination-disk-size"]);
    assert_eq!(place.names(), ["iso"]);
}

#[test]
fn copies_need_a_directory_and_room_and_are_not_made_among_devices() {
    let place = Place::new();
    let by = holder("web");
    let found = |disk: DiskConfig, used| codes(&copy_problems(&[disk], &[used], &by));
    assert_eq!(found(place.disk("no/such", 4096), 4096), ["destination-disk-unusable"]);
    assert_eq!(found(place.disk("a", 1 << 45), 1 << 45), ["destination-disk-space"]);
    assert_eq!(found(place.disk("a", 1 << 45), 4096), [""; 0], "the rest is sparse");
    let device = DiskConfig { path: "/dev/nothing".into(), read_only: false, bytes: 512 };
    assert_eq!(found(device, 512), ["destination-disk-unusable"]);
    fs::write(place.path("file"), "").unwrap();
    assert_eq!(found(place.disk("file/a", 4096), 0), ["destination-disk-unusable"]);
    assert_eq!(place.names(), ["file"]);
}

fn reading(path: &Path, bytes: u64) -> DiskStreams {
    let mut streams = DiskStreams::default();
    streams.push(File::open(path).unwrap(), path.to_owned(), bytes, Use::Read);
    streams
}

#[test]
fn a_sparse_disk_is_read_as_its_blocks_and_a_partial_page_ends_in_zeros() {
    let place = Place::new();
    let bytes = (1 << 20) + 512;
    let disk = place.image("a", bytes);
    let file = File::options().write(true).open(path(&disk)).unwrap();
    file.write_all_at(&page(5), 64 << 10).unwrap();
    file.write_all_at(&[6; 512], 1 << 20).unwrap();
    let streams = reading(path(&disk), bytes);
    let allocated = streams.allocated(stream(0)).unwrap();
    assert_eq!(allocated.pages(), 257);
    assert!(allocated.contains(PageIndex(16)) && allocated.contains(PageIndex(256)));
    assert!(allocated.count() <= 40, "holes were found: {}", allocated.count());
    let mut last = page(9);
    streams.read(stream(0), 1 << 20, &mut last).unwrap();
    assert_eq!((&last[..512], &last[512..]), (&[6; 512][..], &[0; 3584][..]));
    assert!(streams.is_zero(stream(0), 0, 64 << 10).unwrap());
    assert!(!streams.is_zero(stream(0), 0, 1 << 20).unwrap());
    assert!(!streams.is_zero(stream(0), 1 << 20, 4096).unwrap());
    // Blocks that appear later are found too.
    file.write_all_at(&page(1), 512 << 10).unwrap();
    assert!(streams.allocated(stream(0)).unwrap().contains(PageIndex(128)));
}

#[test]
fn a_copy_equals_its_source_and_so_do_their_hashes() {
    let (place, there, vm) = (Place::new(), Place::new(), Place::new());
    let bytes = 10 * 4096 + 1024;
    let source = place.image("a", bytes);
    let file = File::options().write(true).open(path(&source)).unwrap();
    file.write_all_at(&page(1), 0).unwrap();
    file.write_all_at(&[2; 1024], 10 * 4096).unwrap();
    let from = reading(path(&source), bytes);
    let copy = there.disk("a", bytes);
    let to = copies(&vm, std::slice::from_ref(&copy), &holder("web")).unwrap();
    for run in from.allocated(stream(0)).unwrap().runs() {
        let mut buffer = vec![0; usize::try_from(run.len_bytes()).unwrap()];
        from.read(stream(0), run.offset(), &mut buffer).unwrap();
        to.write(stream(0), run.offset(), &buffer).unwrap();
    }
    assert_eq!(from.hash(stream(0)).unwrap(), to.hash(stream(0)).unwrap());
    // What became zero is sent as a run of zeros.
    file.write_all_at(&page(0), 0).unwrap();
    to.zero(stream(0), 0, 4096).unwrap();
    to.close().unwrap();
    assert_eq!(from.hash(stream(0)).unwrap(), to.hash(stream(0)).unwrap());
    assert_eq!(fs::read(path(&source)).unwrap(), fs::read(path(&copy)).unwrap());
}

#[test]
fn offsets_outside_a_disk_and_writes_after_the_end_are_refused() {
    let (place, vm) = (Place::new(), Place::new());
    let disk = place.disk("a", 4096 + 512);
    let streams = copies(&vm, std::slice::from_ref(&disk), &holder("web")).unwrap();
    let mut buffer = page(1);
    let far: [(u32, u64); 5] =
        [(127, 0), (129, 0), (128, 8192), (128, u64::MAX - 100), (u32::MAX, 0)];
    for (key, offset) in far {
        let key = StreamKey(key);
        let out = Err(OutOfStream { key, offset, length: 4096 });
        assert_eq!(streams.write(key, offset, &page(1)), out);
        assert_eq!(streams.zero(key, offset, 4096), out);
        assert_eq!(streams.read(key, offset, &mut buffer), out);
        assert!(streams.is_zero(key, offset, 4096).is_err());
    }
    // The last page reaches past the end of the file, which does not grow.
    streams.write(stream(0), 4096, &page(3)).unwrap();
    assert_eq!(fs::metadata(path(&disk)).unwrap().len(), 4608);
    streams.zero(stream(0), 4096, 4096).unwrap();
    assert_eq!(fs::metadata(path(&disk)).unwrap().len(), 4608);
    streams.close().unwrap();
    assert!(streams.write(stream(0), 0, &page(1)).is_err(), "it is closed");
    assert!(streams.zero(stream(0), 0, 4096).is_err());
    let source = reading(path(&disk), 4608);
    assert!(source.write(stream(0), 0, &page(1)).is_err(), "it is only read");
    assert!(source.zero(stream(0), 0, 4096).is_err());
    assert_eq!(source.allocated(StreamKey(129)).unwrap().count(), 0);
}

#[test]
fn a_run_of_pages_that_was_never_sent_is_part_of_the_comparison() {
    let mut streams = DiskStreams::default();
    let place = Place::new();
    let disk = place.image("a", 3 * 4096);
    streams.push(File::open(path(&disk)).unwrap(), place.path("a"), 3 * 4096, Use::Compare);
    assert!(streams.close().is_ok());
    let hole = PageRun { first: PageIndex(0), count: 3 };
    assert!(streams.is_zero(stream(0), hole.offset(), hole.len_bytes()).unwrap());
}
