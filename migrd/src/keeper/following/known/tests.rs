use proptest::prelude::*;

use super::*;

const START: u64 = 0x10_0000;

fn run(process: u32, page: u64, pages: u64, offset: u64, stays: bool) -> Run {
    let address = START + page * PAGE_SIZE;
    Run { process, address, pages, image: 0, offset: offset * PAGE_SIZE, stays }
}

fn address(page: u64) -> u64 {
    START + page * PAGE_SIZE
}

fn pages(process: u32, page: u64, count: u64) -> Pages {
    Pages { process, address: address(page), count }
}

/// Two runs of process 1, of which the second is here, and one of process 2.
fn known() -> Known {
    let runs = vec![run(2, 0, 300, 20, true), run(1, 0, 10, 0, true), run(1, 20, 10, 10, false)];
    Known::new(runs).unwrap()
}

#[test]
fn what_is_waited_for_comes_first_and_the_rest_in_order() {
    let mut known = known();
    assert_eq!(known.left(), 310);
    assert_eq!(known.urgent(), None);
    assert!(known.want(2, address(290)));
    assert!(!known.want(2, address(290)), "it is wanted already");
    assert_eq!(known.urgent(), Some(pages(2, 290, 10)));
    assert_eq!(known.urgent(), None);
    assert_eq!(known.in_order(), Some(pages(1, 0, 10)));
    assert_eq!(known.in_order(), Some(pages(2, 0, 128)));
    assert_eq!(known.in_order(), Some(pages(2, 128, 128)));
    assert_eq!(known.in_order(), Some(pages(2, 256, 34)));
    assert_eq!(known.in_order(), None);
    assert!(known.want(1, address(3)), "it is asked for, and was not waited for");
    assert_eq!(known.urgent(), None, "it comes anyway");
}

#[test]
fn pages_that_have_come_are_found_and_those_that_have_not_are_not() {
    let mut known = known();
    assert_eq!(known.find(1, address(2), 8), Ok(None));
    let here = known.find(1, address(22), 100).unwrap().unwrap();
    assert_eq!((here.offset, here.pages, here.once), (12 * PAGE_SIZE, 8, false));
    assert_eq!(known.in_order(), Some(pages(1, 0, 10)));
    let place = known.arriving(pages(1, 4, 3)).unwrap();
    assert_eq!((place.offset, place.pages), (4 * PAGE_SIZE, 3));
    known.arrived(pages(1, 4, 3));
    assert_eq!(known.left(), 307);
    let found = known.find(1, address(5), 100).unwrap().unwrap();
    assert_eq!((found.offset, found.pages, found.once), (5 * PAGE_SIZE, 2, true));
    for odd in [pages(1, 4, 1), pages(1, 7, 4), pages(1, 20, 1), pages(3, 0, 1), pages(1, 7, 0)] {
        assert_eq!(known.arriving(odd), Err(Unknown), "{odd:?}");
    }
    for odd in [(1, address(2) + 1), (1, address(10)), (3, address(0)), (0, 0)] {
        assert_eq!(known.find(odd.0, odd.1, 1), Err(Unknown), "{odd:?}");
    }
}

#[test]
fn a_page_that_was_given_is_asked_for_once_more_when_a_child_wants_it() {
    let mut known = known();
    assert_eq!(known.in_order(), Some(pages(1, 0, 10)));
    known.arrived(pages(1, 0, 10));
    known.given(pages(1, 0, 10));
    assert_eq!(known.find(1, address(2), 1), Ok(None));
    assert!(known.want(1, address(2)));
    assert_eq!(known.urgent(), Some(pages(1, 2, 1)));
    assert_eq!(known.left(), 301);
    known.arrived(pages(1, 2, 1));
    known.has_come(1, address(2));
    assert_eq!(known.find(1, address(2), 9).unwrap().unwrap().pages, 1);
}

#[test]
fn another_daemon_asks_for_everything_that_has_not_come() {
    let mut known = known();
    known.want(1, address(7));
    assert_eq!(known.urgent(), Some(pages(1, 7, 3)));
    assert_eq!(known.in_order(), Some(pages(1, 0, 7)));
    known.arrived(pages(1, 0, 7));
    known.forget_asked();
    assert_eq!(known.arriving(pages(1, 7, 3)), Err(Unknown), "nobody was asked for it now");
    assert_eq!(known.urgent(), Some(pages(1, 7, 3)));
    assert_eq!(known.in_order(), Some(pages(2, 0, 128)));
}

#[test]
fn images_in_which_pages_overlap_are_refused() {
    let overlap = vec![run(1, 0, 10, 0, true), run(1, 9, 2, 10, true)];
    assert!(Known::new(overlap).is_err());
}

proptest! {
    /// Whatever is wanted, asked for, brought or forgotten, every page comes in the end.
    #[test]
    fn everything_comes_in_the_end(steps in prop::collection::vec((0u8..5, 0u64..310), 0..200)) {
        let mut known = known();
        let mut asked = VecDeque::new();
        let mut there = vec![false; 310];
        let place = |p: Pages| {
            let page = (p.address - START) / PAGE_SIZE;
            usize::try_from(if p.process == 1 { page } else { page + 10 }).unwrap()
        };
        let bring = |known: &mut Known, there: &mut Vec<bool>, p: Pages| {
            prop_assert!(known.arriving(p).is_ok(), "{p:?}");
            known.arrived(p);
            let at = place(p);
            there[at..at + usize::try_from(p.count).unwrap()].fill(true);
            Ok(())
        };
        for (what, page) in steps {
            let (process, page) = if page < 10 { (1, page) } else { (2, page - 10) };
            match what {
                0 => drop(known.want(process, address(page))),
                1 => asked.extend(known.urgent()),
                2 => asked.extend(known.in_order()),
                3 => if let Some(p) = asked.pop_front() {
                    bring(&mut known, &mut there, p)?;
                },
                _ => {
                    known.forget_asked();
                    asked.clear();
                }
            }
        }
        known.forget_asked();
        while let Some(p) = known.urgent().or_else(|| known.in_order()) {
            bring(&mut known, &mut there, p)?;
        }
        prop_assert_eq!(known.left(), 0);
        prop_assert!(there.iter().all(|there| *there));
    }
}
