//! A tree that is complete and has not run here is let go.

use migr_proto::v1::keeper_request::Request;
use migr_proto::v1::{self as proto, KeeperPhase};

use super::keeper::Keeper;
use super::net::Network;
use super::told;
use crate::workload::WorkloadError;

/// Lets it go, and joins its network. Harmless if that was done before, by this daemon or
/// an earlier one.
///
/// # Errors
/// When it can't be let go. It may be called again then.
pub(super) async fn let_go(
    keeper: &Keeper,
    network: Option<&Network>,
    paused: bool,
) -> Result<(), WorkloadError> {
    // Until it runs here for good its kernel must acknowledge nothing: the source,
    // should it go on instead, would never see what was acknowledged.
    if let Some(network) = network {
        network.ready().await?;
    }
    match keeper.phase() {
        // A keeper that did it before the daemon that asked went away.
        KeeperPhase::Running | KeeperPhase::Paused => {}
        _ => {
            // One with a network stands still until that is joined: only then can its
            // kernel ask the other ends of its connections what they have got.
            let release = proto::KeeperRelease { paused: paused || network.is_some() };
            let released = keeper.done(Request::Release(release)).await;
            released.map_err(told("let it run"))?;
        }
    }
    if let Some(network) = network {
        // It is here, and nowhere else: without a network it is better off than killed.
        match network.join().await {
            Ok(()) => network.announce_aside(),
            Err(error) => tracing::error!(%error, "a process tree has no network"),
        }
    }
    if !paused && keeper.phase() == KeeperPhase::Paused {
        let resumed = keeper.done(Request::Resume(proto::KeeperResume {})).await;
        resumed.map_err(told("let it run"))?;
    }
    Ok(())
}
