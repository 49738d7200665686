use super::rounds::Growing;
use super::*;
use crate::workload::ChunkSource;

fn file(images: &Images, name: &str, bytes: &[u8]) {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND;
    images.open_file(0, name, flags).unwrap().write_all(bytes).unwrap();
}

fn source() -> Images {
    Images::new(4, 1 << 20).unwrap()
}

#[test]
fn what_a_source_gives_is_what_a_destination_has() {
    let (from, to) = (source(), source());
    let memory: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[1] | 1).collect();
    file(&from, "inventory.img", b"small");
    file(&from, "pages-1.img", &memory[..200_000]);
    file(&from, "dump.log", b"not an image");
    let mut growing = Growing::default();
    let first = growing.take(&from, false).unwrap();
    assert_eq!(first[0].1.count(), 48, "whole pages only");
    file(&from, "pages-1.img", &memory[200_000..]);
    let last = growing.take(&from, true).unwrap();
    assert_eq!(last[0].1.count(), 74 - 48);
    for (key, pages) in first.iter().chain(&last) {
        for run in pages.runs() {
            let mut bytes = vec![0; usize::try_from(run.len_bytes()).unwrap()];
            from.read(*key, run.offset(), &mut bytes).unwrap();
            to.write(*key, run.offset(), &bytes).unwrap();
        }
    }
    let key = StreamKey(FIRST_STREAM);
    assert_eq!(from.hash(key).unwrap(), to.hash(key).unwrap());
    let wire = from.to_wire(&from.list(0).unwrap(), &growing.numbers()).unwrap();
    to.arrange(&wire).unwrap();
    assert_eq!(to.list(0).unwrap(), from.list(0).unwrap());
    assert_eq!(to.read_whole(0, "pages-1.img").unwrap(), memory);
    assert_eq!(to.read_whole(0, "inventory.img").unwrap(), b"small");
}

#[test]
fn what_was_not_announced_is_refused() {
    let images = source();
    let file_of = |name: &str, length| Image { round: 0, name: name.into(), length };
    assert!(matches!(images.announce(4, &file_of("x.img", 1)), Err(ImagesError::Grown { .. })));
    let long = file_of("x.img", (1 << 20) + 1);
    assert!(matches!(images.announce(0, &long), Err(ImagesError::Grown { .. })));
    for (key, offset) in [(0, 0), (FIRST_STREAM + 4, 0), (FIRST_STREAM, 1 << 20), (128, u64::MAX)] {
        assert!(images.write(StreamKey(key), offset, &[1]).is_err(), "{key} {offset}");
        assert!(images.zero(StreamKey(key), offset, 1).is_err(), "{key} {offset}");
    }
}

#[test]
fn a_state_that_can_not_be_right_is_refused() {
    let whole = |name: &str, length| proto::ProcessImage {
        name: name.into(),
        length,
        content: Some(process_image::Content::Whole(b"four"[..].into())),
        round: 0,
    };
    let stream = |key, length| proto::ProcessImage {
        name: "pages-1.img".into(),
        length,
        content: Some(process_image::Content::Stream(key)),
        round: 0,
    };
    let none = proto::ProcessImage { name: "a.img".into(), length: 0, content: None, round: 0 };
    for bad in [
        vec![whole("../a.img", 4)],
        vec![whole("/a.img", 4)],
        vec![whole(".a.img", 4)],
        vec![whole("a.txt", 4)],
        vec![whole("stream-128", 4)],
        vec![whole("a.img", 5)],
        vec![whole("a.img", 4), whole("a.img", 4)],
        vec![stream(FIRST_STREAM - 1, 1)],
        vec![stream(FIRST_STREAM + 4, 1)],
        vec![stream(FIRST_STREAM, (1 << 20) + 1)],
        vec![none],
    ] {
        assert!(matches!(source().arrange(&bad), Err(ImagesError::Odd(_))), "{bad:?}");
    }
    assert!(source().arrange(&[whole("a.img", 4), stream(FIRST_STREAM, 9)]).is_ok());
}

#[test]
fn images_that_are_stopped_grow_no_further_and_keep_what_they_have() {
    let images = Images::new(4, 1 << 30).unwrap();
    let memory = vec![7; 4 << 20];
    file(&images, "pages-1.img", &memory);
    images.stop_growing().unwrap();
    let flags = OFlag::O_WRONLY | OFlag::O_APPEND;
    let mut more = images.open_file(0, "pages-1.img", flags).unwrap();
    let error = more.write_all(&vec![8; 2 << 20]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(images.list(0).unwrap()[0].length >= 4 << 20);
    assert_eq!(images.read_whole(0, "pages-1.img").unwrap()[..4 << 20], memory);
}

#[test]
fn what_finds_no_memory_at_a_destination_is_named_with_what_to_do() {
    let images = source();
    images.write(StreamKey(FIRST_STREAM), 0, &[1; 4096]).unwrap();
    assert_eq!(images.trouble(), None);
    images.stop_growing().unwrap();
    let mut filled = (0_u32..1024).map(|n| {
        let key = StreamKey(FIRST_STREAM + n % 4);
        images.write(key, u64::from(n / 4) * 4096, &[1; 4096])
    });
    assert!(filled.any(|written| written.is_err()), "there is room for 1 MiB");
    let trouble = images.trouble().unwrap();
    assert!(trouble.contains("no memory left") && trouble.contains("free memory"), "{trouble}");
}
