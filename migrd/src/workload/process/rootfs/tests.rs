//! A root file system from one directory into another, without a network.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use super::*;
use crate::pages::PageBitmap;
use crate::workload::ChunkSink;

mod hostile;

#[test]
fn what_has_not_changed_at_all_arrives() {
    let directory = tempfile::tempdir().unwrap();
    let (root, place) = (directory.path().join("rootfs"), directory.path().join("place"));
    fs::create_dir(&root).unwrap();
    sample(&root);
    std::thread::sleep(OLD);
    let leaving = Leaving::begin(&root, Devices::default()).unwrap();
    let landing = land(&leaving, &place);
    let ahead = send_ahead(&leaving, &landing);
    let rest = send_rest(&leaving, &landing, &[]);
    assert!(rest == 0 || (ahead == 0 && !leaving.early), "{rest} pages came twice");
    same(&root, &root_in(&place));
}

/// A file that was last changed long ago cannot be made: that time is the kernel's. So
/// what a test makes is doubtful, until it is old.
const OLD: Duration = Duration::from_millis(3200);

fn send(leaving: &Leaving, landing: &Landing, pages: &PageBitmap) {
    for run in pages.runs() {
        let mut bytes = vec![0; usize::try_from(run.len_bytes()).unwrap()];
        leaving.read(run.offset(), &mut bytes).unwrap();
        landing.write(ROOTFS_STREAM, run.offset(), &bytes).unwrap();
    }
}

/// Sends all that goes ahead; how many pages that were.
fn send_ahead(leaving: &Leaving, landing: &Landing) -> u64 {
    let (mut next, mut pages) = (0, 0);
    while let Some(part) = leaving.ahead(&mut next).unwrap() {
        send(leaving, landing, &part);
        pages += part.count();
    }
    pages
}

/// Sends the rest; how many pages of content that were.
fn send_rest(leaving: &Leaving, landing: &Landing, written: &[PathBuf]) -> u64 {
    let rest = leaving.rest(written).unwrap();
    send(leaving, landing, &rest);
    assert_eq!(landing.hash().unwrap(), leaving.hash().unwrap());
    landing.complete().unwrap();
    let list = rest.runs().filter(|run| run.first.0 < LIST_PAGES).map(|run| run.count);
    rest.count() - list.sum::<u64>()
}

fn land(leaving: &Leaving, place: &Path) -> Landing {
    Landing::make(place, &leaving.spec(), leaving.list(), Devices::default()).unwrap()
}

/// What is there, in words.
fn picture(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        let (mut content, kind) = (String::new(), found.file_type());
        if kind.is_symlink() {
            content = fs::read_link(&path).unwrap().display().to_string();
        } else if kind.is_file() {
            content = format!("{} {}", found.len(), blake3::hash(&fs::read(&path).unwrap()));
        } else if kind.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let links = if kind.is_file() { found.nlink() } else { 0 };
        let attributes = attributes::read(&path).unwrap();
        all.push(format!(
            "{:?} {:o} {}:{} {}.{:09} {links} {:x} {content} {attributes:?}",
            path.strip_prefix(root).unwrap(),
            found.mode(),
            found.uid(),
            found.gid(),
            found.mtime(),
            found.mtime_nsec(),
            found.rdev(),
        ));
    }
    all.sort();
    all
}

fn same(from: &Path, to: &Path) {
    let (from, to) = (picture(from), picture(to));
    for (here, there) in from.iter().zip(&to) {
        assert_eq!(here, there);
    }
    assert_eq!(from.len(), to.len());
}

/// A root file system with one of everything that needs no privilege.
fn sample(root: &Path) {
    let make = |name: &str, content: &str| fs::write(root.join(name), content).unwrap();
    for directory in ["bin", "etc", "var", "var/log", "empty"] {
        fs::create_dir(root.join(directory)).unwrap();
    }
    make("bin/sh", "a program");
    fs::set_permissions(root.join("bin/sh"), fs::Permissions::from_mode(0o4755)).unwrap();
    make("etc/a", "names");
    fs::hard_link(root.join("etc/a"), root.join("etc/b")).unwrap();
    symlink("/nowhere/at/all", root.join("etc/link")).unwrap();
    make("etc/nothing", "");
    let sparse = fs::File::create(root.join("var/sparse")).unwrap();
    sparse.write_all_at(b"middle", 5 << 20).unwrap();
    sparse.set_len((9 << 20) + 3).unwrap();
    sparse.set_modified(SystemTime::UNIX_EPOCH + Duration::new(981_000_000, 123)).unwrap();
    nix::unistd::mkfifo(&root.join("var/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(root.join("empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    make("var/log/odd \n\u{e4}", "odd");
}

#[test]
fn everything_arrives_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let (root, place) = (directory.path().join("rootfs"), directory.path().join("place"));
    fs::create_dir(&root).unwrap();
    sample(&root);
    let leaving = Leaving::begin(&root, Devices::default()).unwrap();
    let landing = land(&leaving, &place);
    send_ahead(&leaving, &landing);
    send_rest(&leaving, &landing, &[]);
    same(&root, &root_in(&place));
    let sparse = fs::metadata(root_in(&place).join("var/sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    // Nothing comes after the end.
    assert!(landing.write(ROOTFS_STREAM, 0, &[1; 4096]).is_err());
    remove(&place).unwrap();
    assert!(!place.exists());
    remove(&place).unwrap();
}

#[test]
fn what_changes_meanwhile_arrives_as_it_is_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let (root, place) = (directory.path().join("rootfs"), directory.path().join("place"));
    fs::create_dir(&root).unwrap();
    sample(&root);
    for (name, content) in [("kept", "kept"), ("log", "one\n"), ("gone", "x"), ("name", "moves")] {
        fs::write(root.join(name), content).unwrap();
    }
    fs::create_dir_all(root.join("tree/deeper")).unwrap();
    fs::write(root.join("tree/deeper/leaf"), "leaf").unwrap();
    for name in ["x", "y"] {
        fs::hard_link(root.join("kept"), root.join(name)).unwrap();
    }
    std::thread::sleep(OLD);
    let leaving = Leaving::begin(&root, Devices::default()).unwrap();
    let landing = land(&leaving, &place);
    let ahead = send_ahead(&leaving, &landing);
    let at = |name: &str| root.join(name);
    fs::write(at("log"), "one\ntwo\n").unwrap();
    fs::write(at("etc/a"), "other names").unwrap();
    fs::remove_file(at("gone")).unwrap();
    fs::rename(at("name"), at("etc/name")).unwrap();
    fs::remove_dir_all(at("tree")).unwrap();
    fs::write(at("tree"), "a file now").unwrap();
    fs::remove_file(at("bin/sh")).unwrap();
    fs::create_dir_all(at("bin/sh/new")).unwrap();
    fs::write(at("bin/sh/new/file"), vec![7; 10_000]).unwrap();
    fs::set_permissions(at("empty"), fs::Permissions::from_mode(0o700)).unwrap();
    // One name of three becomes a file of its own.
    fs::remove_file(at("kept")).unwrap();
    fs::write(at("kept"), "another").unwrap();
    fs::hard_link(at("x"), at("a-new-name")).unwrap();
    fs::File::options().write(true).open(at("var/sparse")).unwrap().set_len(4097).unwrap();
    fs::remove_file(at("etc/link")).unwrap();
    symlink("elsewhere", at("etc/link")).unwrap();
    let rest = send_rest(&leaving, &landing, &[]);
    same(&root, &root_in(&place));
    if leaving.early {
        assert!(ahead > 0);
        // What is as it was did not come twice.
        assert!(rest <= 12, "{rest} pages at the end");
    }
}

#[test]
fn what_could_hide_a_change_is_sent_again() {
    let directory = tempfile::tempdir().unwrap();
    let (root, place) = (directory.path().join("rootfs"), directory.path().join("place"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("old"), "old").unwrap();
    fs::write(root.join("open"), "open").unwrap();
    std::thread::sleep(OLD);
    fs::write(root.join("fresh"), "fresh").unwrap();
    let leaving = Leaving::begin(&root, Devices::default()).unwrap();
    let landing = land(&leaving, &place);
    let ahead = send_ahead(&leaving, &landing);
    let rest = send_rest(&leaving, &landing, &["open".into()]);
    same(&root, &root_in(&place));
    let expected = if leaving.early { (3, 2) } else { (0, 3) };
    assert_eq!((ahead, rest), expected);
}

#[test]
fn a_device_travels_only_if_the_container_may_have_it() {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    let make = |name: &str, device| {
        mknod(&root.join(name), SFlag::S_IFCHR, Mode::S_IRWXU, device).unwrap();
    };
    make("null", makedev(1, 3));
    let leaving = Leaving::begin(&root, Devices::default()).unwrap_err();
    assert!(leaving.to_string().contains("/null is the device 1:3"), "{leaving}");
    let leaving = Leaving::begin(&root, Devices::and([])).unwrap();
    let place = directory.path().join("place");
    let landing = Landing::make(&place, &leaving.spec(), leaving.list(), Devices::and([])).unwrap();
    send_rest(&leaving, &landing, &[]);
    same(&root, &root_in(&place));
    make("kvm", makedev(10, 232));
    let refused = Leaving::begin(&root, Devices::and([])).unwrap_err();
    assert!(refused.to_string().contains("/kvm is the device 10:232"), "{refused}");
    assert!(Leaving::begin(&root, Devices::and([(true, 10, 232)])).is_err());
    assert!(Leaving::begin(&root, Devices::and([(false, 10, 232)])).is_ok());
}

#[test]
fn deep_directories_are_deleted_and_links_are_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("place");
    let beside = directory.path().join("beside");
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("mine"), "mine").unwrap();
    let mut deep = place.clone();
    for _ in 0..300 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("file"), "x").unwrap();
    symlink(&beside, place.join("link")).unwrap();
    symlink(&beside, deep.join("link")).unwrap();
    remove(&place).unwrap();
    assert!(!place.exists());
    assert!(beside.join("mine").exists());
}

/// Of the tests of what has no room: a file system of `size` bytes, and a place on it.
fn small_disk(size: u64) -> (std::os::fd::OwnedFd, PathBuf) {
    use std::os::fd::AsRawFd;
    let disk = crate::sys::tmpfs::create(size).unwrap();
    let place = PathBuf::from(format!("/proc/self/fd/{}/place", disk.as_raw_fd()));
    (disk, place)
}

#[test]
fn a_disk_without_room_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("large"), vec![1; 3 << 20]).unwrap();
    let leaving = Leaving::begin(&root, Devices::default()).unwrap();
    let (disk, place) = small_disk(66 << 20);
    let places = place.parent().unwrap();
    let found = problems(places, &leaving.spec(), Some(&leaving.list()), Devices::default());
    assert_eq!(found[0].code, "destination-rootfs-space", "{found:?}");
    assert!(found[0].message.contains("68 MiB"), "{found:?}");
    drop(disk);
    // A plan that found room is no promise.
    let (_disk, place) = small_disk(2 << 20);
    let landing = land(&leaving, &place);
    let bytes = vec![1; 3 << 20];
    assert!(landing.write(ROOTFS_STREAM, LIST_PAGES * PAGE_SIZE, &bytes).is_err());
    let trouble = landing.trouble().unwrap();
    assert!(trouble.contains("no room left"), "{trouble}");
}
