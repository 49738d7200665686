use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{ChunkSink, ChunkSource, StreamKey};

const KEY: StreamKey = StreamKey(2);

fn log() -> (File, Writer) {
    let file = tempfile::tempfile().expect("a temporary file");
    let writer = Writer::open(file.try_clone().expect("clone")).expect("an empty log");
    (file, writer)
}

fn reader(file: &File) -> Reader {
    Reader::open(file.try_clone().expect("clone")).expect("a log")
}

fn line(bytes: &[u8], line_unix_ns: u64) -> Piece<'_> {
    Piece { bytes, line_unix_ns, starts_line: true }
}

fn rest(bytes: &[u8], line_unix_ns: u64) -> Piece<'_> {
    Piece { bytes, line_unix_ns, starts_line: false }
}

fn text(entries: &[Entry]) -> Vec<u8> {
    entries.iter().flat_map(|e| e.data.iter().copied()).collect()
}

fn all(file: &File) -> Vec<Entry> {
    let (entries, _) = reader(file).read_from(Cursor(0), usize::MAX).expect("readable");
    entries
}

#[test]
fn a_partial_line_is_seen_at_once_and_continued() {
    let (file, mut writer) = log();
    let mut reader = reader(&file);
    writer.append(&[line(b"log", 7)]);
    let (first, cursor) = reader.read_from(Cursor(0), 100).expect("readable");
    assert_eq!(
        first,
        [Entry { data: b"log".into(), line_unix_ns: 7, starts_line: true, dropped: 0, offset: 0 }]
    );
    writer.append(&[rest(b"in: ", 7)]);
    let (second, cursor) = reader.read_from(cursor, 100).expect("readable");
    let continued =
        Entry { data: b"in: ".into(), line_unix_ns: 7, starts_line: false, dropped: 0, offset: 3 };
    assert_eq!(second, [continued]);
    assert_eq!(reader.read_from(cursor, 100).expect("readable"), (vec![], cursor));
}

#[test]
fn a_writer_goes_on_after_the_one_before_it() {
    let (file, mut writer) = log();
    writer.append(&[line(b"one\n", 1)]);
    let mut reader = reader(&file);
    let (_, cursor) = reader.read_from(Cursor(0), 100).expect("readable");
    drop(writer);
    Writer::open(file.try_clone().expect("clone")).expect("a log").append(&[line(b"two\n", 2)]);
    let (entries, _) = reader.read_from(cursor, 100).expect("readable");
    assert_eq!(text(&entries), b"two\n");
}

#[test]
fn a_full_log_keeps_its_newest_pages_and_its_size() {
    let (file, mut writer) = log();
    let mut early = reader(&file);
    let (_, cursor) = early.read_from(Cursor(0), 1).expect("readable");
    let bytes = vec![b'x'; PAGE_BYTES];
    for n in 0..PAGES + 500 {
        writer.append(&[line(&bytes, n)]);
    }
    writer.append(&[line(b"last", 0)]);
    assert_eq!(file.metadata().expect("metadata").len(), LENGTH);
    for mut reader in [early, reader(&file)] {
        let (entries, end) = reader.read_from(cursor, usize::MAX).expect("readable");
        assert_eq!(entries.last().map(|e| e.data.as_slice()), Some(&b"last"[..]));
        assert!(text(&entries).len() > PAGE_BYTES * 4030, "{}", text(&entries).len());
        assert_eq!(reader.end().expect("readable"), end);
    }
}

#[test]
fn lost_output_is_accounted_for_when_the_disk_takes_writes_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("log");
    let file = File::create_new(&path).expect("a file");
    // A file that is not open for writing fails every write, as a full disk does.
    let unwritable = File::open(&path).expect("the file");
    let mut writer = Writer::open(unwritable).expect("an empty log");
    writer.append(&[line(b"gone\n", 1), line(b"gone too\n", 2)]);
    writer.append(&[line(&[b'y'; 5000], 3)]);
    assert_eq!(writer.lost(), 5014);
    drop(file);
    writer.replace_file(File::options().read(true).write(true).open(&path).expect("the file"));
    writer.append(&[line(b"back\n", 4)]);
    assert_eq!(writer.lost(), 0);
    let entries = all(&File::open(&path).expect("the file"));
    assert_eq!(entries.iter().map(|e| e.dropped).sum::<u64>(), 5014);
    assert_eq!(text(&entries), b"back\n");
}

#[test]
fn a_torn_page_is_left_out_and_the_others_are_read() {
    let (file, mut writer) = log();
    for n in 0..5_u8 {
        writer.append(&[line(&[b'a' + n; 4060], u64::from(n))]);
    }
    file.write_all_at(b"torn", 2 * PAGE_SIZE + 2000).expect("a write");
    let entries = all(&file);
    let seen: Vec<u8> = entries.iter().filter(|e| e.starts_line).map(|e| e.data[0]).collect();
    assert_eq!(seen, b"abde");
    file.set_len(4 * PAGE_SIZE + 10).expect("a cut");
    assert!(text(&all(&file)).ends_with(b"d"), "the fifth page is cut");
}

#[test]
fn a_moved_log_begins_with_what_came_before_and_goes_on() {
    let (source, mut writer) = log();
    let (target, _) = log();
    let from = LogStream::new(source.try_clone().expect("clone"), KEY);
    let to = LogStream::new(target.try_clone().expect("clone"), KEY);
    let (mut reader, mut cleared) = (reader(&source), Cleared::default());
    assert!(reader.pages_changed_since(&cleared).expect("readable").is_empty());
    for round in 0..3_u64 {
        writer.append(&[line(&[b'r'; 3000], round), line(b"in place", round)]);
        let dirty = reader.pages_changed_since(&cleared).expect("readable");
        assert!(dirty.count() > 0 && dirty.count() < 3, "{dirty:?}");
        reader.clear(&mut cleared, &dirty).expect("readable");
        assert!(reader.pages_changed_since(&cleared).expect("readable").is_empty());
        for run in dirty.runs() {
            let mut bytes = vec![0; usize::try_from(run.len_bytes()).expect("small")];
            from.read(KEY, run.offset(), &mut bytes).expect("in the stream");
            to.write(KEY, run.offset(), &bytes).expect("in the stream");
        }
    }
    assert_eq!(all(&target), all(&source));
    let mut moved = Writer::open(target.try_clone().expect("clone")).expect("a log");
    moved.append(&[line(b"hello from the other side\n", 9)]);
    let entries = all(&target);
    assert_eq!(entries[..entries.len() - 1], all(&source));
}

#[test]
fn a_write_between_two_rounds_makes_only_its_page_dirty() {
    let (file, mut writer) = log();
    let (mut reader, mut cleared) = (reader(&file), Cleared::default());
    writer.append(&[line(&[b'x'; 10 * PAGE_BYTES], 1)]);
    let dirty = reader.pages_changed_since(&cleared).expect("readable");
    reader.clear(&mut cleared, &dirty).expect("readable");
    writer.append(&[line(b"more", 2)]);
    let dirty = reader.pages_changed_since(&cleared).expect("readable");
    assert_eq!(dirty.runs().collect::<Vec<_>>(), [PageRun { first: PageIndex(10), count: 1 }]);
}

#[test]
fn a_stream_is_zero_where_the_file_ends_and_has_no_more_than_its_length() {
    let (file, _) = log();
    let stream = LogStream::new(file.try_clone().expect("clone"), KEY);
    assert_eq!(stream.is_zero(KEY, 0, LENGTH), Ok(true));
    stream.zero(KEY, 0, LENGTH).expect("in the stream");
    assert_eq!(file.metadata().expect("metadata").len(), 0);
    stream.write(KEY, PAGE_SIZE, &[1; 2 * PAGE_BYTES]).expect("in the stream");
    assert_eq!(stream.is_zero(KEY, 0, LENGTH), Ok(false));
    stream.zero(KEY, PAGE_SIZE, LENGTH - PAGE_SIZE).expect("in the stream");
    assert_eq!(stream.is_zero(KEY, 0, LENGTH), Ok(true));
    stream.write(KEY, LENGTH - 1, &[1, 1]).expect_err("past the end");
    stream.read(KEY, u64::MAX, &mut [0; 8]).expect_err("past the end");
    stream.zero(StreamKey(0), 0, 1).expect_err("another stream");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read_in_whatever_steps(
        lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..6000), 1..20),
        cuts in prop::collection::vec(1..3000usize, 1..20), max in 1..9000usize,
    ) {
        let (file, mut writer) = log();
        let mut reader = reader(&file);
        let (mut cursor, mut got) = (Cursor(0), Vec::new());
        for (n, bytes) in lines.iter().enumerate() {
            let cut = cuts[n % cuts.len()].min(bytes.len());
            let ns = n as u64;
            writer.append(&[line(&bytes[..cut], ns)]);
            let (entries, next) = reader.read_from(cursor, max).expect("readable");
            prop_assert!(next >= cursor);
            cursor = next;
            got.extend(entries);
            writer.append(&[rest(&bytes[cut..], ns)]);
        }
        loop {
            let (entries, next) = reader.read_from(cursor, max).expect("readable");
            if entries.is_empty() { break; }
            cursor = next;
            got.extend(entries);
        }
        let mut back: Vec<Vec<u8>> = Vec::new();
        for entry in got {
            if entry.starts_line { back.push(Vec::new()); }
            prop_assert_eq!(entry.line_unix_ns + 1, back.len() as u64);
            back.last_mut().expect("begins with a line").extend(entry.data);
        }
        let output = lines.concat();
        let at = max as u64 % (output.len() as u64 + 1);
        let tail = reader.read_output(at, usize::MAX).expect("readable");
        let rest = usize::try_from(at).expect("small");
        prop_assert_eq!(text(&tail), &output[rest..]);
        prop_assert_eq!(tail.first().map(|e| e.offset), (rest < output.len()).then_some(at));
        prop_assert_eq!(reader.output().expect("readable"), output.len() as u64);
        prop_assert_eq!(back, lines);
    }

    #[test]
    fn hostile_bytes_never_panic(
        damage in prop::collection::vec((0..20_000u64, prop::collection::vec(any::<u8>(), 1..40)), 0..30),
        cursor in any::<u64>(),
    ) {
        let (file, mut writer) = log();
        writer.append(&[line(&[b'z'; 4 * PAGE_BYTES], 1)]);
        for (at, bytes) in &damage {
            file.write_all_at(bytes, *at).expect("a write");
        }
        let (entries, _) = reader(&file).read_from(Cursor(cursor), usize::MAX).expect("readable");
        prop_assert!(text(&entries).len() <= 24_000);
        let _ = reader(&file).read_output(cursor, 100).expect("readable");
        Writer::open(file.try_clone().expect("clone")).expect("a log").append(&[line(b"on", 2)]);
        prop_assert!(text(&all(&file)).ends_with(b"on"));
    }

    #[test]
    fn a_page_with_a_good_checksum_and_hostile_records_never_panics(
        number in any::<u64>(), used in 0..5000u16, body in prop::collection::vec(any::<u8>(), 0..200),
        slot in 0..PAGES,
    ) {
        let mut bytes = vec![0; PAGE_BYTES];
        bytes[..4].copy_from_slice(b"MSL1");
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        bytes[16..18].copy_from_slice(&used.to_le_bytes());
        bytes[24..24 + body.len()].copy_from_slice(&body);
        let end = (32 + usize::from(used)).min(PAGE_BYTES);
        let crc = crc32fast::hash(&bytes[8..end]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&bytes, slot * PAGE_SIZE).expect("a write");
        prop_assert!(text(&all(&file)).len() <= PAGE_BYTES);
        Writer::open(file).expect("a log").append(&[line(b"on", 2)]);
    }
}
