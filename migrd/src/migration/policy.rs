//! When to send another round, when to stop, when to give up. Pure.
//!
//! The rule: stop as soon as the predicted downtime fits the budget, because
//! every further round costs the guest; and rather end with the numbers than
//! run for ever.

pub mod copies;

use std::time::Duration;

use crate::pages::{PageBitmap, PageSet};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};

/// The longest stop of a workload whose memory moves page by page, unless the user says
/// otherwise.
pub const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_millis(50);
/// Pages that one sampled page speaks for.
const NEIGHBOURHOOD: u64 = 64;
/// Rounds without progress before the hot pages are given a chance to cool.
const PATIENCE: u32 = 2;
/// Rounds without progress before giving up.
const LIMIT: u32 = 5;

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The longest the workload may stand still.
    pub max_downtime: Duration,
}

/// How precopy stands after a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundStats {
    /// The round, from 1.
    pub round: u32,
    /// Pages sent in it.
    pub sent_pages: u64,
    /// How long it took.
    pub took: Duration,
    /// Pages that differ at its end.
    pub pending_pages: u64,
    /// Those of them that are known to be hot and were left alone.
    pub hot_pages: u64,
    /// The fewest pages that differed at the end of any earlier round.
    pub best_pending: Option<u64>,
    /// Rounds since `pending_pages` last fell by a tenth.
    pub idle_rounds: u32,
    /// Bytes a second that reach the destination.
    pub rate: f64,
    /// What a stop costs besides memory.
    pub fixed_cost: Duration,
}

impl RoundStats {
    /// How long the workload would stand still if it stopped now.
    #[must_use]
    pub fn predicted_downtime(&self) -> Duration {
        predict(self.pending_pages, self.rate, self.fixed_cost)
    }
}

/// How long it takes to move `pages` at `rate` bytes a second, plus `fixed`.
#[must_use]
pub fn predict(pages: u64, rate: f64, fixed: Duration) -> Duration {
    let seconds = approximate(pages * PAGE_SIZE) / rate.max(1.0);
    fixed + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
}

/// A count as a float, for rates: exact up to 2^53.
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn approximate(count: u64) -> f64 {
    count as f64
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Another round over what differs, leaving the hot pages for the stop.
    SendCold,
    /// Another round over everything that differs.
    SendAll,
    /// Stop the workload and send the rest.
    Stop,
    /// It dirties memory faster than the budget allows.
    GiveUp {
        /// What a stop now would cost.
        predicted: Duration,
    },
}

/// Decides after a round.
#[must_use]
pub fn next_step(stats: &RoundStats, budget: &Budget) -> Step {
    let predicted = stats.predicted_downtime();
    if predicted <= budget.max_downtime {
        return Step::Stop;
    }
    // With nothing left to send no further round can help.
    if stats.idle_rounds >= LIMIT || stats.pending_pages == 0 {
        return Step::GiveUp { predicted };
    }
    let cold = stats.pending_pages.saturating_sub(stats.hot_pages);
    if stats.idle_rounds < PATIENCE && cold * 4 >= stats.pending_pages {
        Step::SendCold
    } else {
        Step::SendAll
    }
}

/// Whether `pending` is at least a tenth better than the best so far.
#[must_use]
pub fn progressed(pending: u64, best: Option<u64>) -> bool {
    best.is_none_or(|best| pending < best && pending * 10 <= best * 9)
}

/// One page of every neighbourhood that holds pages of `pending`.
///
/// The page's place in its neighbourhood varies, so that a structure that
/// repeats every so many pages is not missed each time.
#[must_use]
pub fn sample(pending: &PageSet) -> PageSet {
    let mut samples = PageSet::default();
    for (key, pages) in pending.iter() {
        let mut chosen = PageBitmap::none(pages.pages());
        for (word_index, word) in (0u64..).zip(pages.words()) {
            if *word == 0 {
                continue;
            }
            let turn = u32::try_from(word_index * 37 % NEIGHBOURHOOD).unwrap_or(0);
            let bit = u64::from(word.rotate_right(turn).trailing_zeros() + turn) % NEIGHBOURHOOD;
            chosen.insert(PageRun { first: PageIndex(word_index * NEIGHBOURHOOD + bit), count: 1 });
        }
        samples.set(key, chosen);
    }
    samples
}

/// The neighbourhoods whose sampled page was written again: every page of
/// `pending` in them.
#[must_use]
pub fn hot(pending: &PageSet, samples: &PageSet, dirty_again: &PageSet) -> PageSet {
    let mut hot = PageSet::default();
    for (key, sampled) in samples.iter() {
        let mut found = PageBitmap::none(sampled.pages());
        if let Some(dirty) = dirty_again.get(key) {
            for (index, (sample, now)) in (0u64..).zip(sampled.words().iter().zip(dirty.words())) {
                if sample & now != 0 {
                    let first = PageIndex(index * NEIGHBOURHOOD);
                    found.insert(PageRun { first, count: NEIGHBOURHOOD });
                }
            }
        }
        hot.set(key, found);
    }
    hot.intersect(pending);
    hot
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::StreamKey;

    fn stats(pending: u64, hot: u64, idle: u32) -> RoundStats {
        RoundStats {
            round: 1,
            sent_pages: 1000,
            took: Duration::from_millis(100),
            pending_pages: pending,
            hot_pages: hot,
            best_pending: None,
            idle_rounds: idle,
            rate: approximate(1000 * PAGE_SIZE) * 10.0,
            fixed_cost: Duration::from_millis(5),
        }
    }

    /// A stop that takes too long whatever is sent.
    fn slow(pending: u64) -> RoundStats {
        RoundStats { fixed_cost: Duration::from_millis(21), ..stats(pending, 0, 0) }
    }

    #[test]
    fn steps_follow_the_budget() {
        // 10,000 pages a second and 5 ms fixed: 100 pages cost 15 ms.
        let budget = Budget { max_downtime: Duration::from_millis(20) };
        let table = [
            (stats(0, 0, 0), Step::Stop),
            (stats(149, 149, 0), Step::Stop),
            (stats(1000, 0, 0), Step::SendCold),
            (stats(1000, 900, 0), Step::SendAll),
            (stats(1000, 0, PATIENCE), Step::SendAll),
            (stats(1000, 0, LIMIT), Step::GiveUp { predicted: Duration::from_millis(105) }),
            (stats(149, 0, LIMIT), Step::Stop),
            (slow(0), Step::GiveUp { predicted: Duration::from_millis(21) }),
        ];
        for (stats, step) in table {
            assert_eq!(next_step(&stats, &budget), step, "{stats:?}");
        }
    }

    #[test]
    fn a_link_that_carries_nothing_predicts_a_very_long_stop() {
        assert!(predict(1, 0.0, Duration::ZERO) > Duration::from_secs(1000));
        assert!(predict(u64::MAX / PAGE_SIZE, f64::MIN_POSITIVE, Duration::ZERO) > Duration::ZERO);
    }

    #[test]
    fn progress_is_a_tenth() {
        assert!(progressed(100, None));
        assert!(progressed(90, Some(100)));
        assert!(!progressed(91, Some(100)));
        assert!(!progressed(0, Some(0)));
    }

    #[test]
    fn a_sample_is_one_page_of_each_neighbourhood_and_hot_is_its_neighbours() {
        let key = StreamKey(0);
        let mut pages = PageBitmap::none(64 * 100);
        pages.insert(PageRun { first: PageIndex(64 * 3 + 5), count: 64 * 40 });
        let mut pending = PageSet::default();
        pending.set(key, pages.clone());
        let samples = sample(&pending);
        assert_eq!(samples.count(), 41);
        let mut outside = samples.clone();
        outside.subtract(&pending);
        assert!(outside.is_empty());

        let mut written = PageBitmap::none(64 * 100);
        written.insert(PageRun { first: PageIndex(64 * 10), count: 64 * 2 });
        let mut again = PageSet::default();
        again.set(key, written.clone());
        let found = hot(&pending, &samples, &again);
        written.intersect(&pages);
        assert_eq!(found.get(key), Some(&written));
    }
}
