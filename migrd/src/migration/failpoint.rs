//! Places where a test can have this daemon stand still.
//!
//! Crash tests have to kill a daemon in an exact phase, without guessing when
//! it gets there. Built with the feature `failpoints`, the daemon stops itself
//! (SIGSTOP) the first time it reaches the place that `MIGR_HALT_AT` names; the
//! test sees that and kills it, or its peer, or lets it go on. Without the
//! feature nothing of this is in the binary.

/// Stands still here if this place was named.
#[cfg(feature = "failpoints")]
pub(crate) fn reach(place: std::fmt::Arguments<'_>) {
    use std::sync::atomic::{AtomicBool, Ordering};
    static REACHED: AtomicBool = AtomicBool::new(false);
    let named = std::env::var("MIGR_HALT_AT").is_ok_and(|named| named == place.to_string());
    if named && !REACHED.swap(true, Ordering::SeqCst) {
        tracing::warn!(%place, "standing still at a failpoint");
        if let Err(error) = nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP) {
            tracing::error!(%error, "cannot stand still");
        }
    }
}

/// Nothing: there are no failpoints in this build.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn reach(_: std::fmt::Arguments<'_>) {}

/// Waits here, if this place is the one that `MIGR_WAIT_AT` names, as long as there is a
/// file `MIGR_WAIT_WHILE`. The rest of the daemon goes on.
#[cfg(feature = "failpoints")]
pub(crate) async fn wait_at(place: &str) {
    if std::env::var("MIGR_WAIT_AT").is_ok_and(|named| named == place) {
        let file = std::env::var_os("MIGR_WAIT_WHILE").unwrap_or_default();
        while std::path::Path::new(&file).exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

/// Nothing: there are no failpoints in this build.
#[cfg(not(feature = "failpoints"))]
pub(crate) async fn wait_at(_: &str) {}
