use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};

use migr_proto::v1::process_image::Content;
use nix::fcntl::{OFlag, openat};

use super::*;
use crate::workload::{ChunkSink, ChunkSource};

const PAGES: u64 = 256;

fn images() -> Images {
    Images::new(32, 4 << 20).unwrap()
}

fn write(images: &Images, round: u32, name: &str, bytes: &[u8]) {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND;
    images.open_file(round, name, flags).unwrap().write_all(bytes).unwrap();
}

/// So many pages, no two alike.
fn memory(seed: u64, pages: u64) -> Vec<u8> {
    (0..pages).flat_map(|page| (seed * 1000 + page + 1).to_le_bytes().repeat(512)).collect()
}

/// What a lane does with `parts`.
fn send(from: &Images, to: &Images, parts: &[(StreamKey, PageBitmap)]) -> (u64, u64) {
    let (mut data, mut zero) = (0, 0);
    for (key, pages) in parts {
        for run in pages.runs() {
            if from.is_zero(*key, run.offset(), run.len_bytes()).unwrap() {
                to.zero(*key, run.offset(), run.len_bytes()).unwrap();
                zero += run.count;
            } else {
                let mut bytes = vec![0; usize::try_from(run.len_bytes()).unwrap()];
                from.read(*key, run.offset(), &mut bytes).unwrap();
                to.write(*key, run.offset(), &bytes).unwrap();
                data += run.count;
            }
        }
    }
    (data, zero)
}

/// The file that a path below the images leads to, links and all.
fn content(images: &Images, path: &str) -> Vec<u8> {
    let directory = images.directory().unwrap();
    let fd = openat(&directory, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    let mut bytes = Vec::new();
    File::from(fd.unwrap()).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn rounds_build_on_each_other_and_the_stop_on_the_last() {
    assert_eq!(parent_of(0, 0), "");
    assert_eq!(parent_of(1, 1), "");
    assert_eq!(parent_of(3, 3), "../round-2");
    assert_eq!(parent_of(0, 3), "round-3");
}

#[test]
fn what_went_ahead_arrives_in_a_chain_that_leads_back_to_the_first_round() {
    let (from, to) = (images(), images());
    let mut growing = Growing::default();
    for round in [1, 2, 0] {
        if round > 0 {
            drop(from.begin_round(round).unwrap());
        }
        growing.enter(round);
        write(&from, round, "pagemap-7.img", format!("map {round}").as_bytes());
        write(&from, round, "pages-1.img", &memory(round.into(), PAGES));
        write(&from, round, "dump.log", b"not an image");
        send(&from, &to, &growing.take(&from, false).unwrap());
        send(&from, &to, &growing.take(&from, true).unwrap());
        assert!(growing.take(&from, false).unwrap().is_empty(), "nothing is handed out twice");
    }
    let all = from.list_all().unwrap();
    let names: BTreeSet<_> = all.iter().map(|image| (image.round, image.name.as_str())).collect();
    assert_eq!(names.len(), 6, "{all:?}");
    to.arrange(&from.to_wire(&all, &growing.numbers()).unwrap()).unwrap();
    assert_eq!(to.list_all().unwrap(), all);
    for (path, round) in [("", 0_u32), ("parent/", 2), ("parent/parent/", 1)] {
        let map = content(&to, &format!("{path}pagemap-7.img"));
        assert_eq!(map, format!("map {round}").as_bytes());
        assert_eq!(content(&to, &format!("{path}pages-1.img")), memory(round.into(), PAGES));
    }
    let directory = to.directory().unwrap();
    assert!(fstatat(&directory, "round-1/parent", AtFlags::AT_SYMLINK_NOFOLLOW).is_err());
}

#[test]
fn what_a_later_round_replaces_takes_no_memory_at_either_end() {
    let (from, to) = (images(), images());
    let mut growing = Growing::default();
    drop(from.begin_round(1).unwrap());
    growing.enter(1);
    write(&from, 1, "pages-1.img", &memory(1, PAGES));
    send(&from, &to, &growing.take(&from, true).unwrap());
    assert!(growing.emptied(&from).unwrap().is_empty());
    drop(from.begin_round(2).unwrap());
    growing.enter(2);
    write(&from, 2, "pages-1.img", &memory(2, 40));
    // As CRIU does when it writes pages that replace those.
    let first = from.open_file(1, "pages-1.img", OFlag::O_RDWR).unwrap();
    memfd::punch(&first, 10 * PAGE_SIZE, 40 * PAGE_SIZE).unwrap();
    send(&from, &to, &growing.take(&from, true).unwrap());
    let emptied = growing.emptied(&from).unwrap();
    assert_eq!(send(&from, &to, &emptied), (0, 40));
    assert!(growing.emptied(&from).unwrap().is_empty(), "told once");
    let key = StreamKey(FIRST_STREAM);
    assert_eq!(from.hash(key).unwrap(), to.hash(key).unwrap());
    let holes = to.holes(key, PAGES).unwrap();
    assert_eq!(holes.runs().collect::<Vec<_>>(), [PageRun { first: PageIndex(10), count: 40 }]);
    // The beginning of a file, and its end.
    memfd::punch(&first, 0, PAGE_SIZE).unwrap();
    memfd::punch(&first, (PAGES - 1) * PAGE_SIZE, PAGE_SIZE).unwrap();
    let more: Vec<_> = growing.emptied(&from).unwrap();
    let runs: Vec<_> = more.iter().flat_map(|(_, pages)| pages.runs()).collect();
    let single = |page| PageRun { first: PageIndex(page), count: 1 };
    assert_eq!(runs, [single(0), single(PAGES - 1)]);
}

#[test]
fn small_files_of_rounds_are_streams_once_they_have_come_to_much() {
    let from = images();
    let mut growing = Growing::default();
    drop(from.begin_round(1).unwrap());
    growing.enter(1);
    let file = memory(1, WHOLE_BYTES / PAGE_SIZE);
    let fit = ROUNDS_WHOLE_BYTES / WHOLE_BYTES;
    for number in 0..fit + 3 {
        write(&from, 1, &format!("pages-{number}.img"), &file);
    }
    assert!(growing.take(&from, false).unwrap().is_empty());
    assert_eq!(growing.take(&from, true).unwrap().len(), 3);
    // The stop has all the room that it has without rounds.
    growing.enter(0);
    write(&from, 0, "pages-1.img", &file);
    assert!(growing.take(&from, true).unwrap().is_empty());
    assert_eq!(growing.streams(), 3);
}

#[test]
fn a_chain_that_can_not_be_right_is_refused() {
    let image = |round, name: &str| proto::ProcessImage {
        name: name.into(),
        length: 4,
        content: Some(Content::Whole(b"four"[..].into())),
        round,
    };
    for bad in [
        vec![image(ROUNDS + 1, "a.img")],
        vec![image(u32::MAX, "a.img")],
        vec![image(1, "parent")],
        vec![image(1, "../a.img")],
        vec![image(2, "a.img"), image(2, "a.img")],
    ] {
        let refused = images().arrange(&bad);
        assert!(matches!(refused, Err(ImagesError::Odd(_))), "{bad:?}: {refused:?}");
    }
    let good = images();
    good.arrange(&[image(2, "a.img"), image(1, "a.img"), image(0, "a.img")]).unwrap();
    assert_eq!(good.list_all().unwrap().len(), 3);
}
