//! When to make another copy of what has changed, of a workload whose memory moves
//! in copies. Pure.
//!
//! What a copy will have is known only when it is made. What the last one had is
//! taken for what is left to send at a stop: copies get shorter, so in most cases it
//! is less.

use std::time::Duration;

use super::{Step, predict};

/// The most copies.
const LIMIT: u32 = 8;
/// Copies that were no smaller before a user's limit is given up.
const PATIENCE: u32 = 2;
/// When no limit was given, memory may make up this part of a stop: less would not be
/// noticed.
const PART: u32 = 4;
/// Bytes a second at which a destination makes memory anew from images.
const MAKING_RATE: f64 = 1e9;

/// How it stands after a copy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CopyStats {
    /// The copy, from 1.
    pub round: u32,
    /// Pages in it.
    pub pages: u64,
    /// Copies in a row, up to this one, that were not smaller by a tenth than the
    /// smallest before.
    pub idle: u32,
    /// Bytes a second that reach the destination.
    pub rate: f64,
    /// What a stop costs besides sending.
    pub fixed_cost: Duration,
}

impl CopyStats {
    /// How long the workload would stand still if it stopped now.
    #[must_use]
    pub fn predicted_downtime(&self) -> Duration {
        predict(self.pages, self.rate, self.fixed_cost)
    }
}

/// How long a destination takes to make memory of so many pages anew.
#[must_use]
pub fn making(pages: u64) -> Duration {
    predict(pages, MAKING_RATE, Duration::ZERO)
}

/// Decides after a copy. Without a `limit` the stop is as short as copies can make it.
#[must_use]
pub fn next_copy(stats: &CopyStats, limit: Option<Duration>) -> Step {
    let predicted = stats.predicted_downtime();
    let sending = predicted.saturating_sub(stats.fixed_cost);
    let no_more = stats.round >= LIMIT;
    match limit {
        Some(limit) if predicted <= limit => Step::Stop,
        Some(_) if no_more || stats.idle >= PATIENCE => Step::GiveUp { predicted },
        // Of the first copy nobody knows how much has changed since.
        None if stats.round > 1 && sending * PART <= stats.fixed_cost => Step::Stop,
        None if no_more || stats.idle > 0 => Step::Stop,
        Some(_) | None => Step::SendAll,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::policy::approximate;
    use crate::units::PAGE_SIZE;

    /// 10,000 pages a second, and 100 ms besides.
    fn stats(round: u32, pages: u64, idle: u32) -> CopyStats {
        let rate = approximate(10_000 * PAGE_SIZE);
        CopyStats { round, pages, idle, rate, fixed_cost: Duration::from_millis(100) }
    }

    #[test]
    fn with_a_limit_copies_are_made_until_it_is_met_or_they_bring_nothing() {
        let limit = Some(Duration::from_millis(150));
        let give_up = |ms| Step::GiveUp { predicted: Duration::from_millis(ms) };
        let table = [
            (stats(1, 500, 0), Step::Stop),
            (stats(1, 501, 0), Step::SendAll),
            (stats(2, 100_000, 0), Step::SendAll),
            (stats(3, 10_000, 1), Step::SendAll),
            (stats(4, 10_000, PATIENCE), give_up(1100)),
            (stats(4, 500, PATIENCE), Step::Stop),
            (stats(LIMIT, 1000, 0), give_up(200)),
        ];
        for (stats, step) in table {
            assert_eq!(next_copy(&stats, limit), step, "{stats:?}");
        }
    }

    #[test]
    fn without_a_limit_it_always_ends_in_a_stop() {
        let table = [
            (stats(1, 250, 0), Step::SendAll),
            (stats(2, 250, 0), Step::Stop),
            (stats(2, 251, 0), Step::SendAll),
            (stats(3, 10_000, 1), Step::Stop),
            (stats(LIMIT, 10_000, 0), Step::Stop),
        ];
        for (stats, step) in table {
            assert_eq!(next_copy(&stats, None), step, "{stats:?}");
        }
    }

    #[test]
    fn there_is_no_run_of_copies_without_an_end() {
        for limit in [None, Some(Duration::ZERO)] {
            let last = (1..).find(|round| {
                let step = next_copy(&stats(*round, 1 << 30, 0), limit);
                matches!(step, Step::Stop | Step::GiveUp { .. })
            });
            assert_eq!(last, Some(LIMIT), "{limit:?}");
        }
    }
}
