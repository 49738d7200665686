//! What a tree does, for everybody to see.

use migr_proto::v1::{self as proto, KeeperPhase};
use tokio::sync::watch;

use super::keeper::Seen;
use crate::workload::RunState;

/// What a tree does, for everybody, as its keeper says and an operator wished.
pub(super) fn follow(
    mut seen: watch::Receiver<Seen>,
    mut wish: watch::Receiver<Option<String>>,
) -> watch::Receiver<RunState> {
    let (state, watched) = watch::channel(state_of(&seen.borrow_and_update(), None));
    tokio::spawn(async move {
        loop {
            let changed = tokio::select! {
                changed = seen.changed() => changed,
                changed = wish.changed() => changed,
            };
            let now = state_of(&seen.borrow_and_update(), wish.borrow_and_update().as_deref());
            // What has ended stays so, with its first reason.
            state.send_if_modified(|old| {
                let news = !matches!(old, RunState::Ended(_)) && *old != now;
                if news {
                    *old = now;
                }
                news
            });
            if changed.is_err() {
                return state.closed().await;
            }
        }
    });
    watched
}

fn state_of(seen: &Seen, wish: Option<&str>) -> RunState {
    let ended = |why: String| RunState::Ended(wish.map_or(why, str::to_owned));
    match seen {
        Seen::Dead(why) => ended(why.clone()),
        Seen::Alive { status, .. } => match status.phase() {
            KeeperPhase::Running => RunState::Running,
            KeeperPhase::Ended => ended(how(*status)),
            KeeperPhase::Unspecified
            | KeeperPhase::Empty
            | KeeperPhase::Paused
            | KeeperPhase::Dumping
            | KeeperPhase::Restored => RunState::Paused,
        },
    }
}

/// How an init ended.
fn how(status: proto::KeeperStatus) -> String {
    match status.loss() {
        proto::KeeperLoss::Unspecified => {}
        proto::KeeperLoss::Pager => {
            return "what put its memory in place after it had moved (`criu lazy-pages`) ended \
                early, and it can't run without: the keeper's log says more"
                .to_owned();
        }
        proto::KeeperLoss::Source => {
            return "the host that it came from can't give it the rest of its memory any more, \
                and it can't run without: the logs of migrd and of the keeper say more"
                .to_owned();
        }
    }
    match (status.exit_code, status.signal) {
        (Some(code), _) => format!("it exited with status {code}"),
        (None, 0) => "it ended".to_owned(),
        (None, signal) => match nix::sys::signal::Signal::try_from(signal) {
            Ok(name) => format!("it was ended by {name}"),
            Err(_) => format!("it was ended by signal {signal}"),
        },
    }
}
