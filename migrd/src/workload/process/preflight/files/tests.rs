use migr_proto::v1 as proto;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::*;

fn used(path: &Path, kind: Kind, access: Access) -> UsedFile {
    let meta = std::fs::metadata(path).unwrap();
    let size = if meta.is_dir() { 0 } else { meta.len() };
    let mtime_ns = time_ns(meta.mtime(), meta.mtime_nsec());
    let mode = meta.mode();
    let mut file =
        [UsedFile { path: path.to_owned(), kind, access, size, mode, mtime_ns, blake3: None }];
    hash(std::process::id(), &mut file);
    let [file] = file;
    file
}

fn codes(files: &[UsedFile]) -> Vec<&'static str> {
    compare(files).into_iter().map(|problem| problem.code).collect()
}

fn told(file: &UsedFile) -> String {
    let [problem] = &compare(std::slice::from_ref(file))[..] else { panic!("{file:?}") };
    assert!(!problem.remedy.is_empty());
    format!("{}: {}", problem.code, problem.message)
}

#[test]
fn the_same_files_are_no_problem() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    std::fs::write(&path, "content").unwrap();
    let file = used(&path, Kind::Mapped, Access::Read);
    assert_eq!(file.blake3, Some(blake3::hash(b"content").into()));
    assert!(file.is_compared_by_content());
    let written = used(&path, Kind::Open, Access::Write);
    assert!(!written.is_compared_by_content());
    let files = [file, written, used(dir.path(), Kind::Directory, Access::Read)];
    assert!(codes(&files).is_empty());
    assert_eq!(from_wire(to_wire(&files)).unwrap(), files);
}

#[test]
fn what_differs_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    std::fs::write(&path, "content").unwrap();
    let file = used(&path, Kind::Executable, Access::Read);

    std::fs::write(&path, "contend").unwrap();
    assert!(told(&file).contains("has another content"), "{}", told(&file));
    std::fs::write(&path, "longer content").unwrap();
    assert!(told(&file).contains("14 bytes there and 7 at"), "{}", told(&file));
    std::fs::write(&path, "content").unwrap();
    assert!(codes(std::slice::from_ref(&file)).is_empty(), "a time alone is no difference");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
    assert!(told(&file).contains("mode 0700"), "{}", told(&file));
    std::fs::remove_file(&path).unwrap();
    assert!(told(&file).starts_with("destination-file-missing"), "{}", told(&file));
    std::fs::create_dir(&path).unwrap();
    assert!(told(&file).contains("not a regular file"), "{}", told(&file));
}

#[test]
fn a_log_may_have_grown_and_an_older_file_may_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "line\n").unwrap();
    let mut log = used(&path, Kind::Open, Access::Append);
    let mut data = used(&path, Kind::Open, Access::Write);
    log.size = 4;
    data.size = 4;
    assert!(codes(&[log]).is_empty(), "CRIU does not mind the size of what is appended to");
    assert!(told(&data).contains("5 bytes there"), "{}", told(&data));
    data.mtime_ns -= 1;
    assert!(codes(&[data]).is_empty(), "on shared storage it is written to meanwhile");
}

#[test]
fn links_in_the_path_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    std::fs::write(dir.path().join("real/lib.so.1"), "x").unwrap();
    let mut file = used(&dir.path().join("real/lib.so.1"), Kind::Mapped, Access::Read);
    symlink("real", dir.path().join("linked")).unwrap();
    symlink("lib.so.1", dir.path().join("real/lib.so")).unwrap();
    file.path = dir.path().join("linked/lib.so");
    assert!(codes(&[file]).is_empty());
}

#[test]
fn a_peer_can_have_nothing_opened_but_files() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    // Opening the pipe would block, and reading /proc/kmsg takes lines away.
    for path in [&pipe, Path::new("/dev/zero"), Path::new("/proc/kmsg"), Path::new("/proc/uptime")]
    {
        let mode = std::fs::metadata(path).unwrap().mode();
        let hash = Some([0; 32]);
        let file = UsedFile {
            path: path.to_owned(),
            kind: Kind::Mapped,
            access: Access::Read,
            size: 0,
            mode,
            mtime_ns: 0,
            blake3: hash,
        };
        assert!(told(&file).starts_with("destination-file-differs"), "{}", told(&file));
        assert!(!told(&file).contains("another content"), "{}", told(&file));
    }
}

#[test]
fn hostile_lists_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    std::fs::write(&path, "content").unwrap();
    let good = to_wire(&[used(&path, Kind::Mapped, Access::Read)]).remove(0);
    let paths = ["", "a", "../a", "/a/../b", "/..", "/a/./b", "//a", "/a//b", "/a/", "/a\0b", "."];
    for path in paths {
        let bad = proto::UsedFile { path: path.as_bytes().to_vec().into(), ..good.clone() };
        assert_eq!(from_wire(vec![bad]), Err(BadFiles::Path(path.into())), "{path:?}");
    }
    let long = proto::UsedFile {
        path: vec![b'/'; 1].into_iter().chain(vec![b'a'; 4095]).collect(),
        ..good.clone()
    };
    assert!(matches!(from_wire(vec![long]), Err(BadFiles::Path(_))));
    for bad in [
        proto::UsedFile { kind: 0, ..good.clone() },
        proto::UsedFile { kind: 99, ..good.clone() },
        proto::UsedFile { access: 0, ..good.clone() },
        proto::UsedFile { blake3: vec![1; 31].into(), ..good.clone() },
        // Nobody makes us read more than we would read ourselves.
        proto::UsedFile { size: MAX_HASHED + 1, ..good.clone() },
        proto::UsedFile { access: 3, ..good.clone() },
    ] {
        assert!(matches!(from_wire(vec![bad]), Err(BadFiles::Field { .. })));
    }
    let many = vec![good; MAX_FILES + 1];
    assert_eq!(from_wire(many), Err(BadFiles::TooMany(MAX_FILES + 1)));
}

#[test]
fn no_more_is_hashed_than_the_limit() {
    let mut budget = super::hash::Budget::new();
    let times = MAX_HASHED_TOTAL / MAX_HASHED;
    assert!((0..times).all(|_| budget.take(MAX_HASHED)));
    assert!(!budget.take(1));
    assert!(budget.take(0));
}

#[test]
fn things_that_are_no_files_have_to_be_there_too() {
    let dir = tempfile::tempdir().unwrap();
    let (pipe, below) = (dir.path().join("pipe"), dir.path().join("run/socket"));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    std::fs::create_dir(dir.path().join("run")).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode();
    let mount = |path: &Path| thing(path.to_owned(), Kind::MountPoint, mode(path));
    let things = [
        thing(pipe.clone(), Kind::NamedPipe, mode(&pipe)),
        thing("/dev/null".into(), Kind::Device, mode(Path::new("/dev/null"))),
        thing(below.clone(), Kind::Socket, 0),
        mount(&dir.path().join("run")),
        mount(Path::new("/etc/passwd")),
    ];
    assert!(codes(&things).is_empty(), "{:?}", compare(&things));
    assert_eq!(from_wire(to_wire(&things)).unwrap(), things);

    std::fs::set_permissions(&pipe, PermissionsExt::from_mode(0o640)).unwrap();
    assert!(told(&things[0]).contains("mode 0640"), "{}", told(&things[0]));
    std::fs::remove_file(&pipe).unwrap();
    std::fs::write(&pipe, "").unwrap();
    assert!(told(&things[0]).contains("not a named pipe"), "{}", told(&things[0]));
    std::fs::remove_file(&pipe).unwrap();
    std::fs::remove_dir(dir.path().join("run")).unwrap();
    let missing = ["destination-file-missing"; 2];
    assert_eq!(codes(&[things[0].clone(), things[2].clone()]), missing);
    assert_eq!(codes(&things[3..4]), ["destination-mount-missing"]);
    assert!(told(&things[2]).contains("/run/socket is not there"), "{}", told(&things[2]));
    let device = thing("/dev/no-such".into(), Kind::Device, mode(Path::new("/dev/null")));
    assert!(told(&device).contains("the open device /dev/no-such"), "{}", told(&device));
    // What is a directory here is one there.
    let odd = thing("/etc/passwd".into(), Kind::MountPoint, mode(Path::new("/etc")));
    assert!(told(&odd).contains("not a directory"), "{}", told(&odd));
}
