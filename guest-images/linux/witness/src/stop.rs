//! SIGTERM and SIGINT as a flag that threads look at.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

/// The longest that a sleeper takes to notice the flag.
const NOTICE: Duration = Duration::from_millis(50);

/// Whether it is time to end. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// A flag that only [`Stop::now`] sets.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A flag that the first SIGTERM or SIGINT sets. To be called before any thread is started:
    /// threads inherit that the signals are blocked.
    ///
    /// # Errors
    /// When the signals cannot be blocked.
    pub fn on_signal() -> nix::Result<Self> {
        let stop = Self::new();
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGTERM);
        signals.add(Signal::SIGINT);
        signals.thread_block()?;
        let flag = stop.clone();
        thread::spawn(move || {
            // Whatever comes instead of a signal, waiting on would be waiting for ever.
            let _ = signals.wait();
            flag.now();
        });
        Ok(stop)
    }

    /// It is time to end.
    pub fn now(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it is time to end.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Sleeps until `when`, or a little after the flag was set; whether to go on.
    #[must_use]
    pub fn sleep_until(&self, when: Instant) -> bool {
        loop {
            if self.is_set() {
                return false;
            }
            match when.checked_duration_since(Instant::now()) {
                None | Some(Duration::ZERO) => return true,
                Some(left) => thread::sleep(left.min(NOTICE)),
            }
        }
    }
}

/// The beats of a fixed rate. After a stall it goes on from now and does not make up for what
/// was missed: a burst would hide the stall's cost.
#[derive(Debug)]
pub struct Pace {
    every: Duration,
    next: Instant,
}

impl Pace {
    /// A pace whose first beat is now.
    #[must_use]
    pub fn every(every: Duration) -> Self {
        Self { every, next: Instant::now() }
    }

    /// Waits for the next beat; whether to go on.
    #[must_use]
    pub fn wait(&mut self, stop: &Stop) -> bool {
        let go_on = stop.sleep_until(self.next);
        self.next = (self.next + self.every).max(Instant::now());
        go_on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_flag_ends_the_pace() {
        let stop = Stop::new();
        let mut pace = Pace::every(Duration::ZERO);
        assert!(pace.wait(&stop));
        stop.now();
        assert!(!pace.wait(&stop));
    }

    #[test]
    fn a_sleeper_that_is_stopped_does_not_sleep_on() {
        let stop = Stop::new();
        stop.now();
        assert!(!stop.sleep_until(Instant::now() + Duration::from_secs(3600)));
    }
}
