//! The clocks of this machine, and a watch that they never go back.
//!
//! Each CPU has a thread of its own. A token with the time at which it was sent goes round all of
//! them; whoever receives it reads the clocks again. A reading that is earlier than the one that
//! came with the token is a clock that went back, on one CPU or from one to another.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::Serialize;

use crate::stop::{Pace, Stop};

/// How often the token goes round without a rest. Every hop wakes another CPU.
const LAPS: u32 = 50;
/// The rest after that, so that the watch costs little.
const REST: Duration = Duration::from_millis(100);
/// A pair of readings that took longer says nothing of how the two clocks stand to each other:
/// the reader was interrupted between them.
const LONGEST_PAIR_NS: u64 = 200_000;

/// A reading of both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// CLOCK_MONOTONIC, in ns.
    pub monotonic_ns: u64,
    /// CLOCK_REALTIME, in ns since 1970.
    pub realtime_ns: u64,
}

impl Clocks {
    /// The time now.
    ///
    /// # Errors
    /// When the system has no such clock.
    pub fn now() -> nix::Result<Self> {
        let monotonic_ns = nanoseconds(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let realtime_ns = nanoseconds(clock_gettime(ClockId::CLOCK_REALTIME)?);
        Ok(Self { monotonic_ns, realtime_ns })
    }
}

/// A time before 1970 counts as 1970.
fn nanoseconds(time: TimeSpec) -> u64 {
    let part = |n| u64::try_from(n).unwrap_or(0);
    part(time.tv_sec()).saturating_mul(1_000_000_000).saturating_add(part(time.tv_nsec()))
}

/// What the watch has seen. Shared with its threads.
#[derive(Debug, Default)]
pub struct Seen {
    readings: AtomicU64,
    monotonic_back: AtomicU64,
    realtime_back: AtomicU64,
    largest_back_ns: AtomicU64,
    largest_step_ns: AtomicU64,
}

/// The figures of a watch at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClockReport {
    /// How often the clocks were read and compared.
    pub readings: u64,
    /// How often CLOCK_MONOTONIC went back.
    pub monotonic_back: u64,
    /// How often CLOCK_REALTIME went back.
    pub realtime_back: u64,
    /// By how much at most, in ns.
    pub largest_back_ns: u64,
    /// The largest step of CLOCK_REALTIME against CLOCK_MONOTONIC between two readings, in ns:
    /// somebody set the wall clock.
    pub largest_step_ns: u64,
}

impl ClockReport {
    /// How often a clock went back.
    #[must_use]
    pub fn violations(&self) -> u64 {
        self.monotonic_back.saturating_add(self.realtime_back)
    }
}

impl Seen {
    /// The figures now.
    #[must_use]
    pub fn report(&self) -> ClockReport {
        ClockReport {
            readings: self.readings.load(Ordering::Relaxed),
            monotonic_back: self.monotonic_back.load(Ordering::Relaxed),
            realtime_back: self.realtime_back.load(Ordering::Relaxed),
            largest_back_ns: self.largest_back_ns.load(Ordering::Relaxed),
            largest_step_ns: self.largest_step_ns.load(Ordering::Relaxed),
        }
    }

    /// Compares a reading with one that was surely made before it.
    fn compare(&self, before: &Token, now: &Token) {
        self.readings.fetch_add(1, Ordering::Relaxed);
        self.ordered(&self.monotonic_back, before.clocks.monotonic_ns, now.clocks.monotonic_ns);
        self.ordered(&self.realtime_back, before.clocks.realtime_ns, now.clocks.realtime_ns);
        if let (Some(before), Some(now)) = (before.offset_ns, now.offset_ns) {
            let step = u64::try_from(before.abs_diff(now)).unwrap_or(u64::MAX);
            self.largest_step_ns.fetch_max(step, Ordering::Relaxed);
        }
    }

    fn ordered(&self, violations: &AtomicU64, before: u64, now: u64) {
        if let Some(back) = before.checked_sub(now).filter(|back| *back > 0) {
            violations.fetch_add(1, Ordering::Relaxed);
            self.largest_back_ns.fetch_max(back, Ordering::Relaxed);
        }
    }
}

/// What goes round.
#[derive(Clone, Copy, Debug)]
struct Token {
    clocks: Clocks,
    /// Realtime minus monotonic, in ns, if both were read at nearly the same time.
    offset_ns: Option<i128>,
}

impl Token {
    fn now() -> nix::Result<Self> {
        let clocks = Clocks::now()?;
        let after = nanoseconds(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let close = after.saturating_sub(clocks.monotonic_ns) <= LONGEST_PAIR_NS;
        let offset = i128::from(clocks.realtime_ns) - i128::from(clocks.monotonic_ns);
        Ok(Self { clocks, offset_ns: close.then_some(offset) })
    }
}

/// Starts the watch on every CPU that this process may use; it ends when `stop` is set.
///
/// # Errors
/// When the CPUs are not known or the clocks cannot be read.
pub fn watch(seen: &Arc<Seen>, stop: &Stop) -> nix::Result<Vec<JoinHandle<nix::Result<()>>>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let cpus: Vec<usize> =
        (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
    let (first_sender, mut receiver) = sync_channel(1);
    // A channel that is full takes nothing, and this one is new.
    let _ = first_sender.send(Token::now()?);
    let mut first_sender = Some(first_sender);
    let mut threads = Vec::with_capacity(cpus.len());
    for (place, cpu) in cpus.iter().copied().enumerate() {
        let last = place + 1 == cpus.len();
        let (sender, next_receiver) = sync_channel(1);
        let sender = if last { first_sender.take().unwrap_or(sender) } else { sender };
        let (seen, receiver_here) = (Arc::clone(seen), receiver);
        receiver = next_receiver;
        let pacer = (place == 0).then(|| (Pace::every(REST), stop.clone()));
        threads.push(thread::spawn(move || {
            let mut only = CpuSet::new();
            only.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &only)?;
            pass_on(&receiver_here, &sender, &seen, pacer)
        }));
    }
    Ok(threads)
}

/// One CPU's part. The first one (it has a pace) lets the token rest after some laps, and ends
/// everything: when it is gone, its neighbours have nobody to hear from.
fn pass_on(
    receiver: &Receiver<Token>,
    sender: &SyncSender<Token>,
    seen: &Seen,
    mut pacer: Option<(Pace, Stop)>,
) -> nix::Result<()> {
    let mut lap = 0;
    while let Ok(token) = receiver.recv() {
        let now = Token::now()?;
        seen.compare(&token, &now);
        lap = (lap + 1) % LAPS;
        if let Some((pace, stop)) = pacer.as_mut().filter(|_| lap == 0)
            && !pace.wait(stop)
        {
            break;
        }
        if sender.send(Token::now()?).is_err() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(monotonic_ns: u64, realtime_ns: u64) -> Token {
        let offset_ns = Some(i128::from(realtime_ns) - i128::from(monotonic_ns));
        Token { clocks: Clocks { monotonic_ns, realtime_ns }, offset_ns }
    }

    #[test]
    fn clocks_that_go_on_or_stand_are_no_violation() {
        let seen = Seen::default();
        seen.compare(&token(10, 110), &token(10, 110));
        seen.compare(&token(10, 110), &token(20, 120));
        let report = seen.report();
        assert_eq!((report.readings, report.violations(), report.largest_step_ns), (2, 0, 0));
    }

    #[test]
    fn each_clock_that_goes_back_is_counted() {
        let seen = Seen::default();
        seen.compare(&token(30, 130), &token(20, 140));
        seen.compare(&token(30, 130), &token(40, 125));
        let report = seen.report();
        assert_eq!((report.monotonic_back, report.realtime_back), (1, 1));
        assert_eq!(report.largest_back_ns, 10);
        assert_eq!(report.violations(), 2);
    }

    #[test]
    fn a_wall_clock_that_was_set_forward_shows_as_a_step() {
        let seen = Seen::default();
        seen.compare(&token(10, 110), &token(20, 5120));
        assert_eq!(seen.report().largest_step_ns, 5000);
        assert_eq!(seen.report().violations(), 0);
    }

    #[test]
    fn the_token_goes_round_all_cpus_until_the_watch_is_stopped() {
        let (seen, stop) = (Arc::new(Seen::default()), Stop::new());
        let threads = watch(&seen, &stop).unwrap();
        let laps = u64::try_from(threads.len()).unwrap() * u64::from(LAPS);
        while seen.report().readings < 2 * laps && threads.iter().all(|t| !t.is_finished()) {
            thread::yield_now();
        }
        stop.now();
        for thread in threads {
            thread.join().unwrap().unwrap();
        }
        assert!(seen.report().readings >= 2 * laps);
        assert_eq!(seen.report().monotonic_back, 0);
    }
}
