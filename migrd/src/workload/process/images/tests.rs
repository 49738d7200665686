use super::*;

fn file(images: &Images, name: &str, bytes: &[u8]) {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND;
    images.open_file(name, flags).unwrap().write_all(bytes).unwrap();
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
    let wire = from.to_wire(&from.list().unwrap(), &growing.numbers()).unwrap();
    to.arrange(&wire).unwrap();
    assert_eq!(to.list().unwrap(), from.list().unwrap());
    assert_eq!(to.read_whole("pages-1.img").unwrap(), memory);
    assert_eq!(to.read_whole("inventory.img").unwrap(), b"small");
}

#[test]
fn what_was_not_announced_is_refused() {
    let images = source();
    let file_of = |name: &str, length| Image { name: name.into(), length };
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
    };
    let stream = |key, length| proto::ProcessImage {
        name: "pages-1.img".into(),
        length,
        content: Some(process_image::Content::Stream(key)),
    };
    let none = proto::ProcessImage { name: "a.img".into(), length: 0, content: None };
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
