//! Notices that a host has stopped for good though it is on.
//!
//! QEMU's emulation of a machine with virtualization loses a host now and then:
//! its CPUs sleep with interrupts pending, spin on a breakpoint that is long gone,
//! or take interrupts while these are off until the kernel panics. No migr runs that could be to blame or to blame it on, so what such a
//! host was used for proves nothing either way and may be done again, with
//! another host. Where hosts run on the machine's own virtualization nothing is
//! watched and nothing is done again.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::host::{Condition, Host};
use super::layout::Layout;
use super::qemu::Accelerator;
use super::settings::Settings;

/// How long an agent may be silent. The slowest boot beside a compilation takes
/// a third of it.
const SILENCE: Duration = Duration::from_secs(120);
/// The pause between two questions.
const PAUSE: Duration = Duration::from_secs(5);
/// How often a piece of work is begun.
const ATTEMPTS: usize = 3;

/// What hosts were lost in this process since [`attempts`] looked last.
static LOST: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Asks every host of a lab now and then, for as long as this lives.
#[derive(Debug)]
pub struct Watch {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Starts it, if the hosts are emulated. They may be off yet.
    #[must_use]
    pub fn start(layout: &Layout, settings: &Settings) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        if Accelerator::of_this_machine() == Accelerator::Emulation {
            for number in settings.numbers() {
                let host = Host::new(layout, settings, number);
                let over = Arc::clone(&over);
                threads.push(std::thread::spawn(move || watch(&host, &over)));
            }
        }
        Self { over, threads }
    }

    /// Ends it. Quick once the hosts are off.
    pub fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked watches no more, and there is nothing to watch.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

fn watch(host: &Host, over: &AtomicBool) {
    let mut asked = Instant::now();
    while !over.load(Ordering::Relaxed) {
        if asked.elapsed() < PAUSE {
            std::thread::sleep(Duration::from_millis(200));
            continue;
        }
        if matches!(host.condition(), Ok(Condition::On)) && !answers(host) && is_on(host, over) {
            lose(host);
        }
        asked = Instant::now();
    }
    // It goes on with what it has, or has gone off by that.
    if let Some(complaint) = host.complaint() {
        lost(format!("the kernel of host {} said: {complaint}", host.number()));
    }
}

fn answers(host: &Host) -> bool {
    let began = Instant::now();
    // What fails at once has gone off, or ran out of channels: not a silence.
    host.greet(SILENCE).is_ok() || began.elapsed() < SILENCE * 9 / 10
}

fn is_on(host: &Host, over: &AtomicBool) -> bool {
    !over.load(Ordering::Relaxed) && matches!(host.condition(), Ok(Condition::On))
}

/// Notes what its CPUs do and takes its power away, so that nobody waits for it.
fn lose(host: &Host) {
    let mut text = format!("host {} did not answer for {SILENCE:?}", host.number());
    let cpus = host.monitor("info registers -a").unwrap_or_else(|error| format!("{error:#}"));
    let telling = |line: &&str| ["CPU#", "RIP=", "HLT="].iter().any(|word| line.contains(word));
    for line in cpus.lines().filter(telling) {
        // Writing to a string can't fail.
        let _ = write!(text, "\n  {}", line.trim());
    }
    lost(text);
    if let Err(error) = host.power_off() {
        eprintln!("host {} stays on: {error:#}", host.number());
    }
}

fn lost(what: String) {
    LOST.lock().unwrap_or_else(PoisonError::into_inner).push(what);
}

/// What hosts were lost since anybody asked.
#[must_use]
pub fn lost_hosts() -> Vec<String> {
    std::mem::take(&mut *LOST.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Does `work`, and does it again if it failed and the emulation lost a host
/// meanwhile, up to three times in all. Says so each time.
///
/// # Errors
/// The failure, when no host was lost or it was the last attempt.
pub fn attempts(work: impl Fn() -> Result<()>) -> Result<()> {
    for attempt in 1.. {
        let result = work();
        let lost = lost_hosts();
        match &result {
            Err(error) if !lost.is_empty() && attempt < ATTEMPTS => {
                eprintln!("the emulation lost a host: {}", lost.join("\n"));
                eprintln!("attempt {attempt} of {ATTEMPTS} proves nothing ({error:#}): once more");
            }
            Ok(()) | Err(_) => return result,
        }
    }
    unreachable!("the last attempt returns")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use anyhow::bail;

    use super::*;

    /// How often work is begun that fails the first `failures` times, having
    /// lost a host if `lost`.
    fn begun(failures: usize, lost: bool) -> (usize, bool) {
        let count = Cell::new(0);
        let result = attempts(|| {
            count.set(count.get() + 1);
            if count.get() > failures {
                return Ok(());
            }
            if lost {
                LOST.lock().expect("not poisoned").push("host 1".into());
            }
            bail!("failed")
        });
        (count.get(), result.is_ok())
    }

    #[test]
    fn only_a_lost_host_is_a_reason_to_begin_again() {
        assert_eq!(begun(0, false), (1, true));
        assert_eq!(begun(1, false), (1, false));
        assert_eq!(begun(2, true), (3, true));
        assert_eq!(begun(9, true), (3, false));
    }
}
