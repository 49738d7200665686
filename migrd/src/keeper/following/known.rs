//! What is known of the pages of a tree whose memory follows. Pure.
//!
//! A page that has come is given to the process once, and its place in the image is free
//! then. A process that forks may want it once more: it is asked of the source again, which
//! still has it.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use crate::units::PAGE_SIZE;

/// The most pages that are asked for at once: 512 KiB.
const PIECE: u64 = 128;
/// The most around one that somebody waits for.
const URGENT: u64 = 16;

/// Pages that follow each other in a process and in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the process.
    pub process: u32,
    /// Of the first page.
    pub address: u64,
    /// How many.
    pub pages: u64,
    /// Which image.
    pub image: usize,
    /// Where in that.
    pub offset: u64,
    /// They are at the source, and not in the image.
    pub stays: bool,
}

/// Where pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which image.
    pub image: usize,
    /// Where in that, in bytes.
    pub offset: u64,
    /// How many.
    pub pages: u64,
    /// The image does not need them any more once they are given.
    pub once: bool,
}

/// Pages of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pages {
    /// Its number.
    pub process: u32,
    /// Of the first.
    pub address: u64,
    /// How many.
    pub count: u64,
}

/// What was asked for is not so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its images know of no such pages")]
pub struct Unknown;

/// How a page that stays at the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Lacking,
    Asked,
    Here,
    Given,
}

/// The pages.
#[derive(Debug, Default)]
pub struct Known {
    /// In ascending order, with the number of the first page of each among those that stay.
    runs: Vec<(Run, usize)>,
    states: Vec<State>,
    /// How many are lacking or asked for.
    left: u64,
    /// Those before it were asked for, in order.
    next: usize,
    /// What somebody waits for.
    waits: BTreeSet<(u32, u64)>,
    /// Of that, what was not asked for yet.
    wanted: VecDeque<(u32, u64)>,
}

impl Known {
    /// Of these runs.
    ///
    /// # Errors
    /// When some overlap.
    pub fn new(mut all: Vec<Run>) -> Result<Self, Unknown> {
        all.sort_by_key(|run| (run.process, run.address));
        let overlap = |pair: &[Run]| {
            let (one, next) = (pair[0], pair[1]);
            one.process == next.process && one.address + one.pages * PAGE_SIZE > next.address
        };
        if all.windows(2).any(overlap) {
            return Err(Unknown);
        }
        let (mut runs, mut count) = (Vec::with_capacity(all.len()), 0);
        for run in all {
            runs.push((run, count));
            count += if run.stays { usize::try_from(run.pages).map_err(|_| Unknown)? } else { 0 };
        }
        let states = vec![State::Lacking; count];
        Ok(Self { runs, states, left: count as u64, ..Self::default() })
    }

    /// How many pages have to come before all were here once.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The run that has a page, and the number of that page in it.
    fn at(&self, process: u32, address: u64) -> Result<(usize, u64), Unknown> {
        let after =
            self.runs.partition_point(|(run, _)| (run.process, run.address) <= (process, address));
        let index = after.checked_sub(1).ok_or(Unknown)?;
        let (run, _) = self.runs.get(index).ok_or(Unknown)?;
        let page = address.wrapping_sub(run.address) / PAGE_SIZE;
        let inside =
            run.process == process && address.is_multiple_of(PAGE_SIZE) && page < run.pages;
        if inside { Ok((index, page)) } else { Err(Unknown) }
    }

    /// The places in `states` of `count` pages of a run from `page` on, or of fewer.
    fn states_of(&self, index: usize, page: u64, count: u64) -> Range<usize> {
        let Some((run, first)) = self.runs.get(index) else { return 0..0 };
        let place = |page: u64| first + usize::try_from(page).unwrap_or(usize::MAX);
        place(page)..place(page.saturating_add(count).min(run.pages))
    }

    /// How many of those from the first on are in that state.
    fn alike(&self, range: Range<usize>, is: impl Fn(State) -> bool) -> u64 {
        let states = self.states.get(range).unwrap_or_default();
        states.iter().take_while(|state| is(**state)).count() as u64
    }

    /// Where a page is, and as many of the `most` after it as are there too; `None` when it
    /// has to come first.
    ///
    /// # Errors
    /// When there is no such page.
    pub fn find(&self, process: u32, address: u64, most: u64) -> Result<Option<Place>, Unknown> {
        let (index, page) = self.at(process, address)?;
        let (run, _) = self.runs.get(index).ok_or(Unknown)?;
        let pages = match run.stays {
            false => most.min(run.pages - page),
            true => self.alike(self.states_of(index, page, most), |state| state == State::Here),
        };
        let offset = run.offset + page * PAGE_SIZE;
        Ok((pages > 0).then_some(Place { image: run.image, offset, pages, once: run.stays }))
    }

    /// They were given to the process.
    pub fn given(&mut self, pages: Pages) {
        let Ok((index, page)) = self.at(pages.process, pages.address) else { return };
        if self.runs.get(index).is_some_and(|(run, _)| run.stays) {
            let range = self.states_of(index, page, pages.count);
            self.states.get_mut(range).unwrap_or_default().fill(State::Given);
        }
    }

    /// Somebody waits for a page. True when that is news.
    pub fn want(&mut self, process: u32, address: u64) -> bool {
        let news = self.waits.insert((process, address));
        if news {
            self.wanted.push_back((process, address));
        }
        news
    }

    /// The page is there.
    pub fn has_come(&mut self, process: u32, address: u64) {
        self.waits.remove(&(process, address));
    }

    /// The next pages to ask for that somebody waits for.
    pub fn urgent(&mut self) -> Option<Pages> {
        while let Some((process, address)) = self.wanted.pop_front() {
            let Ok((index, page)) = self.at(process, address) else { continue };
            let range = self.states_of(index, page, URGENT);
            // What was given is wanted by a process that has forked.
            if self.alike(range.clone(), |state| state == State::Given) > 0 {
                return Some(self.ask(index, page, 1));
            }
            let count = self.alike(range, |state| state == State::Lacking);
            if count > 0 {
                return Some(self.ask(index, page, count));
            }
        }
        None
    }

    /// The next pages to ask for, in order.
    pub fn in_order(&mut self) -> Option<Pages> {
        let states = self.states.get(self.next..)?;
        self.next += states.iter().position(|state| *state == State::Lacking)?;
        let after = self.runs.partition_point(|(_, first)| *first <= self.next);
        let index = after.checked_sub(1)?;
        let (_, first) = self.runs.get(index)?;
        let page = (self.next - first) as u64;
        let range = self.states_of(index, page, PIECE);
        let count = self.alike(range, |state| state == State::Lacking);
        Some(self.ask(index, page, count))
    }

    fn ask(&mut self, index: usize, page: u64, count: u64) -> Pages {
        let range = self.states_of(index, page, count);
        for state in self.states.get_mut(range).unwrap_or_default() {
            self.left += u64::from(matches!(state, State::Given | State::Here));
            *state = State::Asked;
        }
        let (process, start) =
            self.runs.get(index).map_or((0, 0), |(run, _)| (run.process, run.address));
        Pages { process, address: start + page * PAGE_SIZE, count }
    }

    /// Where pages that have come belong. They were asked for.
    ///
    /// # Errors
    /// When they were not.
    pub fn arriving(&self, pages: Pages) -> Result<Place, Unknown> {
        let (index, page) = self.at(pages.process, pages.address)?;
        let (run, _) = self.runs.get(index).ok_or(Unknown)?;
        let range = self.states_of(index, page, pages.count);
        let asked = self.alike(range, |state| state == State::Asked);
        if !run.stays || pages.count == 0 || asked != pages.count {
            return Err(Unknown);
        }
        let offset = run.offset + page * PAGE_SIZE;
        Ok(Place { image: run.image, offset, pages: pages.count, once: true })
    }

    /// They are there.
    pub fn arrived(&mut self, pages: Pages) {
        let Ok((index, page)) = self.at(pages.process, pages.address) else { return };
        let range = self.states_of(index, page, pages.count);
        for state in self.states.get_mut(range).unwrap_or_default() {
            self.left -= u64::from(*state == State::Asked);
            *state = State::Here;
        }
    }

    /// Whoever was asked is gone: everything that has not come is to be asked for again.
    pub fn forget_asked(&mut self) {
        for state in &mut self.states {
            if *state == State::Asked {
                *state = State::Lacking;
            }
        }
        self.next = 0;
        self.wanted = self.waits.iter().copied().collect();
    }
}

#[cfg(test)]
mod tests;
