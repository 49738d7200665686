use std::fs;

use super::*;

fn written(directory: &Path, records: u64) -> std::path::PathBuf {
    let path = directory.join("records");
    let mut writer = Writer::open(&path).unwrap();
    for _ in 0..records {
        writer.append().unwrap();
    }
    path
}

fn at(sequence: u64, run: u64, ms: u64) -> Record {
    let clocks = Clocks { monotonic_ns: ms * 1_000_000, realtime_ns: ms * 1_000_000 };
    Record { sequence, run, clocks }
}

#[test]
fn all_records_that_were_appended_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let summary = check(&written(directory.path(), 5)).unwrap();
    assert_eq!((summary.records, summary.runs, summary.torn_bytes), (5, 1, 0));
}

#[test]
fn a_second_run_goes_on_where_the_first_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), 3);
    written(directory.path(), 2);
    let summary = check(&path).unwrap();
    assert_eq!((summary.records, summary.runs), (5, 2));
}

#[test]
fn a_changed_byte_is_reported_with_its_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), 4);
    let mut bytes = fs::read(&path).unwrap();
    bytes[2 * RECORD_BYTES + 100] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = check(&path).unwrap_err();
    assert!(matches!(error, RecordsError::Damaged { index: 2, .. }), "{error}");
    assert!(error.to_string().contains("at byte 1024"), "{error}");
}

#[test]
fn a_missing_record_is_reported_as_a_gap() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), 4);
    let mut bytes = fs::read(&path).unwrap();
    bytes.drain(RECORD_BYTES..2 * RECORD_BYTES);
    fs::write(&path, bytes).unwrap();
    let error = check(&path).unwrap_err();
    assert!(matches!(error, RecordsError::OutOfPlace { index: 1, got: 2 }), "{error}");
}

#[test]
fn a_torn_end_is_counted_and_cut_off_by_the_next_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), 2);
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend_from_slice(&[7; 100]);
    fs::write(&path, bytes).unwrap();
    assert_eq!(check(&path).unwrap().torn_bytes, 100);
    written(directory.path(), 1);
    let summary = check(&path).unwrap();
    assert_eq!((summary.records, summary.torn_bytes), (3, 0));
}

#[test]
fn nothing_is_appended_to_damaged_records() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), 2);
    let mut bytes = fs::read(&path).unwrap();
    bytes[RECORD_BYTES] = 0;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(Writer::open(&path), Err(RecordsError::Damaged { index: 1, .. })));
}

#[test]
fn a_file_of_something_else_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other");
    fs::write(&path, [0x41; 5000]).unwrap();
    assert!(matches!(check(&path), Err(RecordsError::Damaged { index: 0, .. })));
}

#[test]
fn the_largest_gap_is_that_of_neighbours_of_one_run() {
    let mut tally = Tally::default();
    for record in [at(0, 1, 1000), at(1, 1, 1020), at(2, 1, 1100), at(3, 2, 9000), at(4, 2, 9010)] {
        tally.push(record).unwrap();
    }
    assert_eq!(tally.summary.largest_gap_ns, 80_000_000);
    assert_eq!(tally.summary.largest_gap_before, 2);
    assert_eq!(tally.summary.runs, 2);
}

#[test]
fn a_clock_that_goes_back_within_a_run_is_an_error() {
    let mut tally = Tally::default();
    tally.push(at(0, 1, 1000)).unwrap();
    let mut early = at(1, 1, 1001);
    early.clocks.realtime_ns -= 2_000_000;
    let error = tally.push(early).unwrap_err();
    assert!(matches!(error, RecordsError::ClockWentBack { index: 1, clock: "realtime", .. }));
    let mut tally = Tally::default();
    tally.push(at(0, 1, 1000)).unwrap();
    let mut early = at(1, 1, 1001);
    early.clocks.monotonic_ns -= 2_000_000;
    let error = tally.push(early).unwrap_err();
    assert!(error.to_string().contains("monotonic clock went back by 1000000 ns"), "{error}");
}
