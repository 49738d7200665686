//! Waiting for something to become true, with an end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Long enough for anything on a busy machine; only a hang gets here.
pub const LIMIT: Duration = Duration::from_secs(90);
/// How many times as long everything may take: in an emulated host, for example.
const PATIENCE: &str = "MIGR_TEST_PATIENCE";
const PAUSE: Duration = Duration::from_millis(20);

/// Asks `probe` until it has an answer.
///
/// # Errors
/// When it has none within 90 s, or as many times that as `MIGR_TEST_PATIENCE` says;
/// or when it says that it never will.
pub fn until<T>(what: &str, probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait(what, LIMIT * patience()?, PAUSE, probe)
}

/// How many times as long as usual everything may take here.
///
/// # Errors
/// When `MIGR_TEST_PATIENCE` is not a number.
pub fn patience() -> Result<u32> {
    match std::env::var(PATIENCE) {
        Ok(times) => times.parse().with_context(|| format!("{PATIENCE} is not a number")),
        Err(_) => Ok(1),
    }
}

/// The same for what is asked of a host in the lab: its CPUs may be emulated,
/// and each question costs it some of their time.
///
/// # Errors
/// When there is no answer within ten minutes, or the probe says that there will
/// never be one.
pub fn patiently<T>(what: &str, probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait(what, Duration::from_secs(600), Duration::from_millis(500), probe)
}

fn wait<T>(
    what: &str,
    limit: Duration,
    pause: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if started.elapsed() > limit {
            bail!("waited {limit:?} in vain: {what}");
        }
        std::thread::sleep(pause);
    }
}
