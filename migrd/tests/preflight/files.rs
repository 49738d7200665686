//! The files of a real tree.

use std::path::Path;

use migrd::workload::process::preflight::Options;
use migrd::workload::process::preflight::files::{
    Access, Kind, UsedFile, compare, from_wire, hash, to_wire,
};

use crate::harness::Tree;

#[test]
fn the_files_of_a_tree_are_found_and_compared() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("read"), "what the program reads").unwrap();
    let tree = Tree::start(&format!(
        "os.chdir({:?}); a = open('read'); b = open('log', 'a'); c = open('data', 'w+')
p = open('/proc/self/status'); g = tempfile.TemporaryFile()",
        directory.path()
    ));
    let mut files = tree.scan(&tree.options()).files;
    hash(tree.init, &mut files);

    let find = |path: &Path| -> Option<&UsedFile> { files.iter().find(|file| file.path == path) };
    let of = |path: &Path| {
        let file = find(path).unwrap_or_else(|| panic!("{} is not in {files:#?}", path.display()));
        (file.kind, file.access, file.is_compared_by_content())
    };
    assert_eq!(of(&path("read")), (Kind::Open, Access::Read, true));
    assert_eq!(of(&path("log")), (Kind::Open, Access::Append, false));
    assert_eq!(of(&path("data")), (Kind::Open, Access::Write, false));
    assert_eq!(of(directory.path()), (Kind::Directory, Access::Read, false));
    let program = std::fs::read_link(format!("/proc/{}/exe", tree.init)).unwrap();
    assert_eq!(of(&program), (Kind::Executable, Access::Read, true));
    let libraries = files.iter().filter(|f| f.kind == Kind::Mapped && f.is_compared_by_content());
    assert!(libraries.clone().any(|f| f.path.to_string_lossy().contains("libc.so")), "{files:#?}");
    assert!(!files.iter().any(|file| {
        let path = file.path.to_string_lossy();
        path.starts_with("/proc") || path.contains("deleted") || path.contains("memfd")
    }));

    // This host is a good destination, until something is changed.
    let arrived = from_wire(to_wire(&files)).unwrap();
    assert_eq!(arrived, files);
    let problems = compare(&arrived);
    assert!(problems.is_empty(), "{problems:#?}");
    std::fs::write(path("read"), "what the program READS").unwrap();
    std::fs::remove_file(path("log")).unwrap();
    let codes: Vec<_> = compare(&arrived).into_iter().map(|problem| problem.code).collect();
    assert_eq!(codes, ["destination-file-missing", "destination-file-differs"]);
}

#[test]
fn what_moves_with_the_tree_need_not_be_at_the_destination() {
    let tree = Tree::start(
        "check(libc.mount(b'none', b'/dev/shm', b'tmpfs', 0, None))
a = open('/dev/shm/segment', 'w+b'); a.truncate(4096); m = mmap.mmap(a.fileno(), 4096)
b = open('/dev/shm/segment')",
    );
    let segment = Path::new("/dev/shm/segment");
    let needs = |carried: &[&str]| {
        let carried = carried.iter().map(ToString::to_string).collect();
        let found = tree.scan(&Options { carried, ..tree.options() });
        assert!(found.problems.is_empty(), "{:#?}", found.problems);
        found.files.iter().any(|file| file.path == segment)
    };
    assert!(needs(&[]) && needs(&["/dev"]));
    assert!(!needs(&["/dev/shm"]));
}
