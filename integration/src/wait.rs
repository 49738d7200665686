//! Waiting for something to become true, with an end.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything on a busy machine; only a hang gets here.
pub const LIMIT: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(20);

/// Asks `probe` until it has an answer.
///
/// # Errors
/// When it has none within [`LIMIT`], or says that it never will.
pub fn until<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if started.elapsed() > LIMIT {
            bail!("waited {LIMIT:?} in vain: {what}");
        }
        std::thread::sleep(PAUSE);
    }
}
