use std::collections::HashSet;

use crate::ELF;
use crate::pattern::{LINES, Pattern, WORDS};
use crate::plan::{DoesNotFit, IMAGE_END, Piece, Plan, Region};
use crate::settings::{BadValue, PAGE, Settings};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
const PT_NOTE: u64 = 4;

struct Segment {
    kind: u64,
    offset: u64,
    addr: u64,
    file_len: u64,
    memory_len: u64,
}

fn number(at: u64, len: u64) -> u64 {
    let start = usize::try_from(at).unwrap();
    let end = usize::try_from(at + len).unwrap();
    ELF[start..end].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn segments() -> Vec<Segment> {
    let table = number(32, 8);
    (0..number(56, 2))
        .map(|i| table + i * number(54, 2))
        .map(|at| Segment {
            kind: number(at, 4),
            offset: number(at + 8, 8),
            addr: number(at + 24, 8),
            file_len: number(at + 32, 8),
            memory_len: number(at + 40, 8),
        })
        .collect()
}

#[test]
fn image_is_a_static_x86_64_elf() {
    assert_eq!(&ELF[..6], b"\x7fELF\x02\x01");
    assert_eq!((number(16, 2), number(18, 2)), (2, 62), "ET_EXEC for x86-64");
    assert!(segments().iter().all(|s| s.kind != PT_DYNAMIC && s.kind != PT_INTERP));
}

#[test]
fn image_loads_between_one_and_two_mib() {
    let loads: Vec<_> = segments().into_iter().filter(|s| s.kind == PT_LOAD).collect();
    assert!(!loads.is_empty());
    for load in loads {
        assert!(load.addr >= MIB && load.addr + load.memory_len <= IMAGE_END);
        assert!(load.file_len <= load.memory_len);
    }
}

#[test]
fn pvh_note_points_into_loaded_code() {
    let segments = segments();
    let note = segments.iter().find(|s| s.kind == PT_NOTE).expect("a note segment");
    let at = note.offset;
    assert_eq!((number(at, 4), number(at + 4, 4), number(at + 8, 4)), (4, 8, 18));
    let name = usize::try_from(at + 12).unwrap();
    assert_eq!(&ELF[name..name + 4], b"Xen\0");
    let entry = number(at + 16, 8);
    let load = segments
        .iter()
        .find(|s| s.kind == PT_LOAD && (s.addr..s.addr + s.file_len).contains(&entry))
        .expect("a segment that holds the entry");
    assert_eq!(number(load.offset + entry - load.addr, 1), 0xfa, "the entry begins with cli");
}

#[test]
fn written_image_is_the_built_one() {
    let path = std::env::temp_dir().join(format!("pulse-image-{}", std::process::id()));
    crate::write_image(&path).unwrap();
    let written = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(written == ELF);
}

#[test]
fn command_line_tokens_come_in_any_order_among_strangers() {
    let line =
        b"console=ttyS0 cpus=2 seed=9  static=512M quiet hot=16M rate=50 skip=8K check=2M x=";
    let expected = Settings {
        hot: 16 * MIB,
        fixed: 512 * MIB,
        check: 2 * MIB,
        rate: 50,
        seed: 9,
        cpus: 2,
        skip: 8192,
    };
    assert_eq!(Settings::parse(line), Ok(expected));
}

#[test]
fn empty_command_line_gives_the_defaults() {
    let expected = Settings { hot: MIB, fixed: 0, check: MIB, rate: 0, seed: 1, cpus: 1, skip: 0 };
    assert_eq!(Settings::parse(b""), Ok(expected));
}

#[test]
fn values_without_sense_are_refused_by_name() {
    for (line, key) in [
        ("hot=", "hot"),
        ("hot=1X", "hot"),
        ("hot=1000", "hot"),
        ("static=99999999999G", "static"),
        ("check=-4K", "check"),
        ("rate=fast", "rate"),
        ("seed=18446744073709551616", "seed"),
        ("cpus=0", "cpus"),
        ("cpus=17", "cpus"),
        ("skip=1", "skip"),
    ] {
        assert_eq!(Settings::parse(line.as_bytes()), Err(BadValue(key)), "{line}");
    }
}

fn ram(pieces: &[(u64, u64)]) -> Region {
    let mut region = Region::default();
    for &(start, len) in pieces {
        region.add_ram(start, len);
    }
    region
}

#[test]
fn regions_pass_over_the_hole_without_sharing_a_page() {
    let settings = Settings::parse(b"static=3068M hot=4M cpus=2").unwrap();
    let plan = Plan::new(&settings, ram(&[(0, 3 * GIB), (4 * GIB, GIB)])).unwrap();
    assert_eq!(plan.fixed.pieces(), [Piece { start: IMAGE_END, len: 3068 * MIB }]);
    let low = Piece { start: 3070 * MIB, len: 2 * MIB };
    let high = Piece { start: 4 * GIB, len: 2 * MIB };
    assert_eq!(plan.hot[0].pieces(), [low, high]);
    let next = Piece { start: 4 * GIB + 2 * MIB, len: 4 * MIB };
    assert_eq!(plan.hot[1].pieces(), [next]);
}

#[test]
fn pages_and_offsets_of_a_split_region_agree() {
    let region = ram(&[(3 * GIB - 8192, 8192), (4 * GIB, 4096)]);
    let pages: Vec<_> = region.pages().collect();
    assert_eq!(pages, [3 * GIB - 8192, 3 * GIB - 4096, 4 * GIB]);
    let found: Vec<_> = (0..4).map_while(|i| region.page_at(i * 4096)).collect();
    assert_eq!(found, pages);
}

#[test]
fn more_than_the_map_holds_is_refused_with_both_numbers() {
    let settings = Settings::parse(b"static=120M hot=4M cpus=2").unwrap();
    let refusal = Plan::new(&settings, ram(&[(0, 640 << 10), (MIB, 127 * MIB)])).unwrap_err();
    assert_eq!(refusal, DoesNotFit { wanted: 128 * MIB, usable: 126 * MIB });
    let settings = Settings::parse(b"skip=126M hot=4K").unwrap();
    let refusal = Plan::new(&settings, ram(&[(MIB, 127 * MIB)])).unwrap_err();
    assert_eq!(refusal, DoesNotFit { wanted: 126 * MIB + PAGE, usable: 126 * MIB });
}

#[test]
fn regions_begin_above_what_is_skipped() {
    let settings = Settings::parse(b"skip=3069M static=2M hot=1M").unwrap();
    let plan = Plan::new(&settings, ram(&[(0, 3 * GIB), (4 * GIB, GIB)])).unwrap();
    let low = Piece { start: 3071 * MIB, len: MIB };
    assert_eq!(plan.fixed.pieces(), [low, Piece { start: 4 * GIB, len: MIB }]);
    assert_eq!(plan.hot[0].pieces(), [Piece { start: 4 * GIB + MIB, len: MIB }]);
}

#[test]
fn unaligned_ram_is_trimmed_to_whole_pages() {
    let region = ram(&[(3 * MIB + 1, 3 * 4096)]);
    assert_eq!(region.pieces(), [Piece { start: 3 * MIB + 4096, len: 2 * 4096 }]);
}

/// Replays many passes on a model of a page: the stamp of each word must be the pass that
/// really wrote it, and no word may stay unwritten for longer than LINES passes.
#[test]
fn every_word_of_a_hot_page_is_rewritten_within_a_cycle() {
    let words = usize::try_from(WORDS).unwrap();
    for addr in [0x20_0000, 0x20_1000, 0x1_2345_6000] {
        let pattern = Pattern::new(1, addr);
        let mut written = vec![0; words];
        for pass in 1..=3 * LINES {
            written[0] = pass;
            written[words - 1] = pass;
            let start = usize::try_from(pattern.line(pass) * 8).unwrap();
            written[start..start + 8].fill(pass);
            for (index, &stamp) in (0..WORDS).zip(&written) {
                assert_eq!(pattern.stamp(index, pass), stamp, "word {index}, pass {pass}");
            }
            assert!(pass < LINES || written.iter().all(|&stamp| pass - stamp < LINES));
        }
    }
}

#[test]
fn words_differ_by_seed_page_index_and_stamp() {
    let mut seen = HashSet::new();
    for seed in 0..2 {
        for addr in [0x20_0000, 0x20_1000] {
            for stamp in 0..4 {
                let pattern = Pattern::new(seed, addr);
                assert!((0..WORDS).all(|index| seen.insert(pattern.word(index, stamp))));
            }
        }
    }
}
