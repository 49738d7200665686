//! What is left of a tree, put away.

use std::path::Path;

use migr_proto::v1 as proto;
use migr_proto::v1::keeper_request::Request;

use super::keeper::Keeper;
use crate::keeper::cgroup::Cgroup;

/// Ends a keeper and everything in its cgroup.
pub(super) async fn put_away(keeper: &Keeper, cgroup: &Path) {
    let kill = Request::Kill(proto::KeeperKill {});
    if let Err(error) = keeper.done(kill).await {
        tracing::info!(%error, "a process tree did not end in good order");
    }
    keeper.quit().await;
    clear_cgroup(cgroup).await;
}

/// Kills what is in a cgroup, and removes it. Harmless when it is not there.
pub(super) async fn clear_cgroup(path: &Path) {
    let cgroup = Cgroup::at(path);
    let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(cgroup = %path.display(), %error, "a cgroup stays behind");
    }
}

/// Deletes a tree's directory: its files, and directories only when they are empty.
/// Below one of them the keeper has `/`, in its own mount namespace; nothing may ever
/// be removed through that, wherever it is seen.
pub(super) fn remove(directory: &Path) {
    let empty = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::remove_dir(directory)
    };
    if let Err(error) = empty() {
        tracing::warn!(directory = %directory.display(), %error, "a directory stays behind");
    }
}
