use super::*;

const PAGES: u64 = 16;
const KEY: StreamKey = StreamKey(0);
/// A second stream, right behind the first in the file.
const NEXT: StreamKey = StreamKey(1);

fn mapping() -> GuestMapping {
    let length = PAGES * PAGE_SIZE;
    let file = memfd::create(c"mapping-test", 2 * length).unwrap();
    let extents = vec![Extent { offset: 0, length }, Extent { offset: length, length }];
    GuestMapping::new(file, extents).unwrap()
}

fn fill(mapping: &GuestMapping, first: u64, count: u64) {
    for page in first..first + count {
        mapping.write(KEY, page * PAGE_SIZE, &[0xa5; PAGE_BYTES]).unwrap();
    }
}

fn bytes(mapping: &GuestMapping, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; length];
    mapping.read(KEY, offset, &mut bytes).unwrap();
    bytes
}

fn populated(mapping: &GuestMapping) -> Vec<u64> {
    let found = mapping.populated(KEY).unwrap();
    (0..PAGES).filter(|page| found.contains(PageIndex(*page))).collect()
}

#[test]
fn zeroing_whole_pages_gives_their_memory_back_and_keeps_their_neighbours() {
    let mapping = mapping();
    fill(&mapping, 0, 8);
    let before = mapping.populated_bytes();
    mapping.zero(KEY, 2 * PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
    assert_eq!(before - mapping.populated_bytes(), 3 * PAGE_SIZE);
    assert_eq!(populated(&mapping), [0, 1, 5, 6, 7]);
    for page in 0..8 {
        let expected = if (2..5).contains(&page) { 0 } else { 0xa5 };
        let read = bytes(&mapping, page * PAGE_SIZE, PAGE_BYTES);
        assert!(read.iter().all(|byte| *byte == expected), "page {page}");
    }
}

#[test]
fn zeroing_parts_of_pages_keeps_every_byte_beside_them() {
    let whole = 5 * PAGE_SIZE;
    let ranges = [(1, 1), (1, PAGE_SIZE), (100, 3 * PAGE_SIZE + 7), (PAGE_SIZE - 1, 2), (7, 30)];
    for (offset, length) in ranges {
        let mapping = mapping();
        fill(&mapping, 0, 5);
        mapping.zero(KEY, offset, length).unwrap();
        let read = bytes(&mapping, 0, usize::try_from(whole).unwrap());
        for (at, byte) in (0..whole).zip(read) {
            let expected = if (offset..offset + length).contains(&at) { 0 } else { 0xa5 };
            assert_eq!(byte, expected, "byte {at} after zeroing {length} bytes at {offset}");
        }
    }
}

#[test]
fn zeroing_a_hole_takes_no_memory() {
    let mapping = mapping();
    mapping.zero(KEY, 10, 3 * PAGE_SIZE).unwrap();
    assert_eq!(mapping.populated_bytes(), 0);
}

#[test]
fn a_range_that_is_not_in_the_stream_is_refused_and_nothing_is_touched() {
    let mapping = mapping();
    mapping.write(NEXT, 0, &[7; 64]).unwrap();
    let end = PAGES * PAGE_SIZE;
    for (key, offset) in [
        (KEY, end),
        (KEY, end - 1),
        (KEY, u64::MAX),
        (KEY, u64::MAX - 1),
        (KEY, u64::MAX - end),
        (StreamKey(2), 0),
        (StreamKey(u32::MAX), 0),
    ] {
        let expected = OutOfStream { key, offset, length: 2 };
        assert_eq!(mapping.write(key, offset, &[1; 2]), Err(expected));
        assert_eq!(mapping.read(key, offset, &mut [0; 2]), Err(expected));
        assert_eq!(mapping.zero(key, offset, 2), Err(expected));
        assert_eq!(mapping.is_zero(key, offset, 2), Err(expected));
    }
    for length in [end + 1, u64::MAX, u64::MAX - PAGE_SIZE + 1] {
        let expected = OutOfStream { key: KEY, offset: PAGE_SIZE, length };
        assert_eq!(mapping.zero(KEY, PAGE_SIZE, length), Err(expected));
        assert_eq!(mapping.is_zero(KEY, PAGE_SIZE, length), Err(expected));
    }
    let mut behind = [0; 64];
    mapping.read(NEXT, 0, &mut behind).unwrap();
    assert_eq!(behind, [7; 64], "the stream behind was written");
    assert!(mapping.is_zero(KEY, 0, end).unwrap());
}

#[test]
fn extents_that_are_not_in_the_file_are_refused() {
    for (offset, length) in
        [(0, 3 * PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE), (u64::MAX - 4095, PAGE_SIZE), (1, 4095)]
    {
        let file = memfd::create(c"mapping-test", 2 * PAGE_SIZE).unwrap();
        let made = GuestMapping::new(file, vec![Extent { offset, length }]);
        assert!(made.is_err(), "{length} bytes at {offset}");
    }
}

#[test]
fn one_byte_is_found_wherever_a_range_begins_and_ends() {
    let mapping = mapping();
    for offset in [0, 1, 15, 16, 17, PAGE_SIZE - 1] {
        for length in [0, 1, 2, 15, 16, 31, 33, 255, 256, 300, 513] {
            assert!(mapping.is_zero(KEY, offset, length).unwrap());
            // Bytes beside the range do not count.
            mapping.write(KEY, offset + length, &[1]).unwrap();
            if offset > 0 {
                mapping.write(KEY, offset - 1, &[1]).unwrap();
            }
            assert!(mapping.is_zero(KEY, offset, length).unwrap(), "{length} at {offset}");
            for at in offset..offset + length {
                mapping.write(KEY, at, &[0x80]).unwrap();
                assert!(!mapping.is_zero(KEY, offset, length).unwrap(), "{at} of {length}");
                mapping.write(KEY, at, &[0]).unwrap();
            }
            mapping.zero(KEY, 0, 3 * PAGE_SIZE).unwrap();
        }
    }
}

#[test]
fn memory_that_appears_in_a_gap_is_found_the_next_time() {
    let mapping = mapping();
    assert_eq!(populated(&mapping), [0; 0]);
    fill(&mapping, 2, 2);
    fill(&mapping, 9, 1);
    assert_eq!(populated(&mapping), [2, 3, 9]);
    fill(&mapping, 0, 1);
    fill(&mapping, 5, 1);
    fill(&mapping, PAGES - 1, 1);
    assert_eq!(populated(&mapping), [0, 2, 3, 5, 9, PAGES - 1]);
}

#[test]
fn a_hole_and_a_page_of_zeros_have_the_same_hash() {
    let (holes, zeros) = (mapping(), mapping());
    for mapping in [&holes, &zeros] {
        fill(mapping, 3, 2);
    }
    for page in [0, 5, PAGES - 1] {
        zeros.write(KEY, page * PAGE_SIZE, &[0; PAGE_BYTES]).unwrap();
    }
    assert_ne!(populated(&holes), populated(&zeros));
    assert_eq!(holes.hash(KEY).unwrap(), zeros.hash(KEY).unwrap());
    zeros.write(KEY, 0, &[1]).unwrap();
    assert_ne!(holes.hash(KEY).unwrap(), zeros.hash(KEY).unwrap());
}

#[test]
fn the_same_bytes_on_another_page_have_another_hash() {
    let (one, other) = (mapping(), mapping());
    fill(&one, 3, 1);
    fill(&other, 4, 1);
    assert_ne!(one.hash(KEY).unwrap(), other.hash(KEY).unwrap());
}
