//! Sets of pages: what is dirty, populated, hot or still to be sent.

use std::collections::BTreeMap;

use crate::units::{PageIndex, PageRun};
use crate::workload::StreamKey;

/// One bit a page, in the layout of KVM's dirty bitmaps: page `i` is bit
/// `i % 64` of word `i / 64` (KVM API, 4.8).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

fn words_for(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).expect("a bitmap that fits in memory")
}

impl PageBitmap {
    /// The empty set over `pages` pages.
    #[must_use]
    pub fn none(pages: u64) -> Self {
        Self { words: vec![0; words_for(pages)], pages }
    }

    /// Every page of `pages` pages.
    #[must_use]
    pub fn all(pages: u64) -> Self {
        let mut set = Self { words: vec![u64::MAX; words_for(pages)], pages };
        set.trim();
        set
    }

    /// A bitmap as KVM gives it. Missing words are empty; bits past `pages` are dropped.
    #[must_use]
    pub fn from_words(mut words: Vec<u64>, pages: u64) -> Self {
        words.resize(words_for(pages), 0);
        let mut set = Self { words, pages };
        set.trim();
        set
    }

    fn trim(&mut self) {
        if let (Some(last), used @ 1..) = (self.words.last_mut(), self.pages % 64) {
            *last &= (1 << used) - 1;
        }
    }

    /// Its words, as KVM takes them.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages it speaks of.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Whether `page` is in it; a page past the end is not.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        usize::try_from(page.0 / 64)
            .ok()
            .and_then(|i| self.words.get(i))
            .is_some_and(|w| w >> (page.0 % 64) & 1 == 1)
    }

    /// Adds the run; the part of it past the end is left out.
    pub fn insert(&mut self, run: PageRun) {
        let end = run.first.0.saturating_add(run.count).min(self.pages);
        let mut page = run.first.0;
        while page < end {
            let bit = page % 64;
            let here = (64 - bit).min(end - page);
            let mask = if here == 64 { u64::MAX } else { ((1 << here) - 1) << bit };
            if let Some(word) = usize::try_from(page / 64).ok().and_then(|i| self.words.get_mut(i))
            {
                *word |= mask;
            }
            page += here;
        }
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a |= b);
        self.trim();
    }

    /// Keeps the pages that are in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter_mut().zip(others).for_each(|(a, b)| *a &= b);
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a &= !b);
    }

    /// The first run of pages at or after `from`.
    fn run_from(&self, from: u64) -> Option<PageRun> {
        let first = self.next(from, 0)?;
        let end = self.next(first, u64::MAX).unwrap_or(self.pages);
        Some(PageRun { first: PageIndex(first), count: end - first })
    }

    /// The first page at or after `from` whose bit differs from `flip`'s bits.
    fn next(&self, from: u64, flip: u64) -> Option<u64> {
        let mut index = usize::try_from(from / 64).ok()?;
        let mut keep = u64::MAX << (from % 64);
        while let Some(word) = self.words.get(index) {
            let found = (word ^ flip) & keep;
            if found != 0 {
                let page = (index as u64) * 64 + u64::from(found.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            keep = u64::MAX;
            index += 1;
        }
        None
    }

    /// Its pages as the longest runs, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.run_from(from)?;
            from = run.first.0 + run.count;
            Some(run)
        })
    }
}

/// Pages of several streams.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PageSet {
    streams: BTreeMap<StreamKey, PageBitmap>,
}

impl PageSet {
    /// The pages of `key`, if the set speaks of that stream.
    #[must_use]
    pub fn get(&self, key: StreamKey) -> Option<&PageBitmap> {
        self.streams.get(&key)
    }

    /// Replaces what the set says of `key`.
    pub fn set(&mut self, key: StreamKey, pages: PageBitmap) {
        self.streams.insert(key, pages);
    }

    /// Each stream with its pages.
    pub fn iter(&self) -> impl Iterator<Item = (StreamKey, &PageBitmap)> {
        self.streams.iter().map(|(key, pages)| (*key, pages))
    }

    /// How many pages are in it, over all streams.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.streams.values().map(PageBitmap::count).sum()
    }

    /// Whether no page is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.streams.values().all(PageBitmap::is_empty)
    }

    /// Adds every page of `other`, of streams this set does not know too.
    pub fn union(&mut self, other: &Self) {
        for (key, pages) in &other.streams {
            self.streams.entry(*key).or_insert_with(|| PageBitmap::none(pages.pages)).union(pages);
        }
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for (key, pages) in &mut self.streams {
            if let Some(out) = other.streams.get(key) {
                pages.subtract(out);
            }
        }
    }

    /// Keeps the pages that are in `other` too; of a stream `other` does not know, none.
    pub fn intersect(&mut self, other: &Self) {
        for (key, pages) in &mut self.streams {
            match other.streams.get(key) {
                Some(keep) => pages.intersect(keep),
                None => *pages = PageBitmap::none(pages.pages),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn of(pages: &BTreeSet<u64>, len: u64) -> PageBitmap {
        let mut set = PageBitmap::none(len);
        for page in pages {
            set.insert(PageRun { first: PageIndex(*page), count: 1 });
        }
        set
    }

    fn members(set: &PageBitmap) -> BTreeSet<u64> {
        set.runs().flat_map(|r| r.first.0..r.first.0 + r.count).collect()
    }

    #[test]
    fn bits_past_the_end_are_dropped() {
        assert_eq!(PageBitmap::from_words(vec![u64::MAX, u64::MAX], 70).count(), 70);
        assert_eq!(PageBitmap::all(70), PageBitmap::from_words(vec![u64::MAX; 9], 70));
    }

    proptest! {
        #[test]
        fn a_bitmap_is_a_set(len in 1..400u64, a in prop::collection::btree_set(0..500u64, 0..80),
                             b in prop::collection::btree_set(0..500u64, 0..80)) {
            let within = |s: &BTreeSet<u64>| s.iter().copied().filter(|p| *p < len).collect::<BTreeSet<_>>();
            let (sa, sb) = (within(&a), within(&b));
            let (a, b) = (of(&a, len), of(&b, len));
            prop_assert_eq!(members(&a), sa.clone());
            prop_assert_eq!(a.count(), sa.len() as u64);
            let mut u = a.clone();
            u.union(&b);
            prop_assert_eq!(members(&u), sa.union(&sb).copied().collect::<BTreeSet<_>>());
            let mut i = a.clone();
            i.intersect(&b);
            prop_assert_eq!(members(&i), sa.intersection(&sb).copied().collect::<BTreeSet<_>>());
            let mut d = a.clone();
            d.subtract(&b);
            prop_assert_eq!(members(&d), sa.difference(&sb).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(u.contains(PageIndex(len)), false);
        }

        #[test]
        fn runs_are_the_longest(len in 1..400u64, from in 0..400u64, count in 1..400u64) {
            let mut set = PageBitmap::none(len);
            set.insert(PageRun { first: PageIndex(from), count });
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.len() <= 1);
            prop_assert_eq!(runs.first().map_or(0, |r| r.count), len.saturating_sub(from).min(count));
        }
    }
}
