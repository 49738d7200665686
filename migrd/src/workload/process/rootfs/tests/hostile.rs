//! Lists that no migrd sends.

use std::fs;

use migr_proto::v1 as proto;
use proptest::prelude::*;
use prost::Message;

use super::super::list::{List, Rules};
use super::super::*;
use crate::workload::ChunkSink;

const PAGES: u64 = LIST_PAGES + 64;

fn rules() -> Rules {
    Rules { pages: PAGES, devices: Devices::and([]) }
}

fn directory(parent: u32, name: &str) -> proto::RootfsNode {
    let name = name.as_bytes().to_vec().into();
    proto::RootfsNode { parent, name, mode: 0o040_755, ..Default::default() }
}

fn file(parent: u32, name: &str, size: u64, page: u64) -> proto::RootfsNode {
    let first_page = if size == 0 { 0 } else { LIST_PAGES + page };
    proto::RootfsNode { mode: 0o100_644, size, first_page, ..directory(parent, name) }
}

fn said(nodes: Vec<proto::RootfsNode>) -> String {
    let list = List::from_wire(proto::RootfsList { nodes }, &rules());
    list.map_or_else(|error| error.to_string(), |_| "fine".to_owned())
}

fn with(more: Vec<proto::RootfsNode>) -> String {
    said([vec![directory(0, ""), directory(0, "etc")], more].concat())
}

#[test]
fn a_plain_list_is_taken() {
    let link = proto::RootfsNode { same_as: 2, ..file(1, "b", 0, 0) };
    assert_eq!(with(vec![file(1, "a", 4097, 0), link, file(1, "c", 1, 2)]), "fine");
    assert_eq!(said(vec![directory(0, "")]), "fine");
}

#[test]
fn names_that_leave_the_root_are_refused() {
    for name in ["", ".", "..", "a/b", "/", "../../etc/passwd", "a\0b", &"n".repeat(256)] {
        assert!(with(vec![file(1, name, 0, 0)]).contains("a name that it can't have"), "{name:?}");
    }
    assert!(with(vec![directory(0, "etc")]).contains("a name"), "twice");
    let deep = (1..40).map(|depth| directory(depth, &"n".repeat(200))).collect();
    assert!(with(deep).contains("too long"));
}

#[test]
fn what_is_below_anything_but_a_directory_is_refused() {
    let link = proto::RootfsNode {
        mode: 0o120_777,
        target: b"/etc".to_vec().into(),
        ..directory(0, "link")
    };
    assert!(with(vec![link, file(2, "passwd", 0, 0)]).contains("in what is no directory"));
    for parent in [2, 3, 7, u32::MAX] {
        assert!(with(vec![file(parent, "a", 0, 0)]).contains("no directory"), "{parent}");
    }
    assert!(said(vec![]).contains("no root"));
    assert!(said(vec![file(0, "", 0, 0)]).contains("no root"));
    assert!(said(vec![directory(0, "name")]).contains("no root"));
}

#[test]
fn content_outside_of_the_stream_or_of_two_files_is_refused() {
    assert!(with(vec![file(1, "a", 65 * 4096, 0)]).contains("outside"));
    assert!(with(vec![file(1, "a", u64::MAX, 0)]).contains("outside"));
    let early = proto::RootfsNode { first_page: LIST_PAGES - 1, ..file(1, "a", 1, 0) };
    assert!(with(vec![early]).contains("outside"));
    assert!(with(vec![file(1, "a", 4097, 0), file(1, "b", 1, 1)]).contains("same content"));
    assert!(with(vec![file(1, "a", 1, 3), file(1, "b", 1, 3)]).contains("same content"));
    let empty = proto::RootfsNode { first_page: LIST_PAGES, ..file(1, "a", 0, 0) };
    assert!(with(vec![empty]).contains("empty file"));
}

#[test]
fn devices_owners_links_and_attributes_are_checked() {
    let device =
        |mode, major, minor| proto::RootfsNode { mode, major, minor, ..directory(1, "device") };
    assert_eq!(with(vec![device(0o020_666, 1, 3)]), "fine");
    assert!(with(vec![device(0o060_666, 1, 3)]).contains("the device 1:3"));
    assert!(with(vec![device(0o020_666, 10, 232)]).contains("the device 10:232"));
    let nobody = proto::RootfsNode { uid: u32::MAX, ..file(1, "a", 0, 0) };
    assert!(with(vec![nobody]).contains("owns"));
    for target in [&b""[..], b"a\0b", &[b'a'; 4096]] {
        let target = target.to_vec().into();
        let link = proto::RootfsNode { mode: 0o120_777, target, ..directory(1, "link") };
        assert!(with(vec![link]).contains("symbolic link"));
    }
    for same_as in [1, 2, 3] {
        let same = proto::RootfsNode { same_as, ..file(1, "b", 0, 0) };
        assert!(with(vec![same]).contains("another name of"), "{same_as}");
    }
    let attribute = |name: &str, length| proto::RootfsAttribute {
        name: name.as_bytes().to_vec().into(),
        value: vec![0; length].into(),
    };
    for all in [
        vec![attribute("security.selinux", 1)],
        vec![attribute("user.a", 65_537)],
        vec![attribute("user.a", 1), attribute("user.a", 2)],
        (0..65).map(|n| attribute(&format!("user.{n}"), 1)).collect(),
    ] {
        let node = proto::RootfsNode { attributes: all, ..file(1, "a", 0, 0) };
        assert!(with(vec![node]).contains("attributes"));
    }
    for mode in [0, 0o170_000, 0o1_100_644] {
        let node = proto::RootfsNode { mode, ..file(1, "a", 0, 0) };
        assert_ne!(with(vec![node]), "fine", "{mode:o}");
    }
}

#[test]
fn changes_can_only_be_of_what_is_there_or_is_next() {
    let nodes = vec![directory(0, ""), directory(0, "etc"), file(1, "a", 1, 0)];
    let list = List::from_wire(proto::RootfsList { nodes }, &rules()).unwrap();
    let after = |removed: Vec<u32>, changed: Vec<(u32, proto::RootfsNode)>| {
        let changed = changed
            .into_iter()
            .map(|(number, node)| proto::RootfsChange { number, node: Some(node) })
            .collect();
        let changes = proto::RootfsChanges { removed, changed, version: 1 };
        list.after(changes, &rules()).map_or_else(|e| e.to_string(), |_| "fine".to_owned())
    };
    assert_eq!(after(vec![2], vec![(3, file(1, "a", 1, 1))]), "fine");
    assert_eq!(after(vec![1, 2], vec![]), "fine");
    assert_ne!(after(vec![1], vec![]), "fine", "a file without its directory");
    assert_ne!(after(vec![0], vec![]), "fine", "no root");
    assert_ne!(after(vec![9], vec![]), "fine");
    assert_ne!(after(vec![2, 2], vec![]), "fine");
    assert_ne!(after(vec![], vec![(4, file(1, "b", 1, 1))]), "fine", "a gap");
    assert_ne!(after(vec![], vec![(2, file(0, "a", 1, 1))]), "fine", "moved elsewhere");
    assert_ne!(after(vec![], vec![(2, file(1, "b", 1, 1))]), "fine", "renamed");
    assert_ne!(after(vec![2], vec![(2, file(1, "a", 1, 1))]), "fine", "gone and changed");
    assert_ne!(after(vec![], vec![(3, file(1, "a", 1, 1))]), "fine", "twice there");
    let none = proto::RootfsChanges {
        changed: vec![proto::RootfsChange { number: 2, node: None }],
        ..Default::default()
    };
    assert!(list.after(none, &rules()).is_err());
}

/// Makes a landing of one file in a directory that has something beside it.
fn landing(directory: &Path) -> Landing {
    let spec = stream_spec(PAGES, 4096);
    let nodes = vec![directory_node(), file(0, "a", 10, 0)];
    Landing::make(&directory.join("place"), &spec, proto::RootfsList { nodes }, Devices::and([]))
        .unwrap()
}

fn directory_node() -> proto::RootfsNode {
    directory(0, "")
}

#[test]
fn a_landing_without_a_list_of_changes_or_with_a_wrong_one_comes_to_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let early = landing(directory.path());
    assert!(early.complete().unwrap_err().to_string().contains("has not arrived"));
    for (length, bytes) in [(u64::MAX, &[][..]), (1 << 40, &[]), (3, &[255, 255, 255])] {
        remove(&directory.path().join("place")).unwrap();
        let landing = landing(directory.path());
        let mut page = vec![0; 4096];
        page[..8].copy_from_slice(&length.to_le_bytes());
        page[8..8 + bytes.len()].copy_from_slice(bytes);
        landing.write(ROOTFS_STREAM, 0, &page).unwrap();
        assert!(landing.hash().is_err());
        assert!(landing.complete().is_err());
        assert!(landing.write(ROOTFS_STREAM, 0, &page).is_err(), "it is over");
    }
}

#[test]
fn a_landing_takes_nothing_beyond_its_stream() {
    let directory = tempfile::tempdir().unwrap();
    let landing = landing(directory.path());
    for offset in [PAGES * PAGE_SIZE, PAGES * PAGE_SIZE - 4096, u64::MAX - 100] {
        assert!(landing.write(ROOTFS_STREAM, offset, &[1; 8192]).is_err(), "{offset}");
        assert!(landing.zero(ROOTFS_STREAM, offset, 8192).is_err(), "{offset}");
    }
    // Behind the end of its file there is nothing.
    landing.write(ROOTFS_STREAM, LIST_PAGES * PAGE_SIZE, &[1; 4096]).unwrap();
    let made = fs::read(root_in(&directory.path().join("place")).join("a")).unwrap();
    assert_eq!(made, [1; 10]);
}

proptest! {
    /// Whatever a peer lists and sends, nothing outside of the place changes, and what
    /// was made can be deleted.
    #[test]
    fn nothing_outside_of_its_place_is_touched(
        nodes in proptest::collection::vec(
            (0_u32..6, "(a|b|\\.\\.|etc|/|\\./x|link)", 0_usize..5, 0_u64..9000, 0_u64..70, 0_u32..6),
            0..12,
        ),
        changes in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("mine"), "mine").unwrap();
        let modes = [0o040_755, 0o100_644, 0o120_777, 0o010_600, 0o020_600];
        let node = |(parent, name, mode, size, page, same_as): (u32, String, usize, u64, u64, u32)| {
            proto::RootfsNode {
                mode: modes[mode],
                target: b"../../mine".to_vec().into(),
                same_as,
                ..file(parent, &name, size, page)
            }
        };
        let nodes = [directory_node()].into_iter().chain(nodes.into_iter().map(node)).collect();
        let place = parent.path().join("place");
        let list = proto::RootfsList { nodes };
        let spec = stream_spec(PAGES, 1 << 20);
        if let Ok(landing) = Landing::make(&place, &spec, list, Devices::and([])) {
            let mut page = vec![0; 4096];
            page[..8].copy_from_slice(&(changes.len() as u64).to_le_bytes());
            page[8..8 + changes.len()].copy_from_slice(&changes);
            landing.write(ROOTFS_STREAM, 0, &page).unwrap();
            landing.write(ROOTFS_STREAM, LIST_PAGES * PAGE_SIZE, &[9; 16 * 4096]).unwrap();
            let _ = landing.complete();
        }
        remove(&place).unwrap();
        let left: Vec<_> =
            fs::read_dir(parent.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        prop_assert_eq!(left, ["mine"]);
        prop_assert_eq!(fs::read(parent.path().join("mine")).unwrap(), b"mine");
    }

    /// Any bytes are a list, or are refused.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(list) = proto::RootfsList::decode(bytes.as_slice()) {
            let _ = List::from_wire(list, &rules());
        }
    }
}
