//! What a VM does, in the words that every workload uses; and its reboots.
//!
//! A guest that resets itself is started anew in the same child, with the
//! kernel from its file. To everyone else it has run all the time.

use std::sync::{Arc, Weak};

use tokio::sync::{Mutex, watch};

use super::child::{Child, ChildState, StopReason};
use super::engine::{open, paths};
use super::told;
use crate::workload::{RunState, WorkloadError};
use migr_proto::v1::GuestStopKind;

/// Keeps a guest's reboots and the wishes of others apart.
#[derive(Debug)]
pub(super) struct Reboots {
    child: Weak<Child>,
    /// Held while the child is told to run or to stand still.
    telling: Arc<Mutex<()>>,
    state: watch::Receiver<RunState>,
}

impl Reboots {
    /// Follows what `child` does from now on. `wish` says why it ended if that
    /// was an operator's.
    pub(super) fn follow(child: &Arc<Child>, wish: watch::Receiver<Option<String>>) -> Self {
        let telling = Arc::new(Mutex::new(()));
        let mut follower = Follower {
            child: Arc::downgrade(child),
            states: child.states(),
            wish,
            telling: telling.clone(),
            failed: None,
        };
        let (tell, state) = watch::channel(follower.now());
        tokio::spawn(async move { follower.run(tell).await });
        Self { child: Arc::downgrade(child), telling, state }
    }

    /// What the VM does. The channel closes when the VM is dropped.
    pub(super) fn state(&self) -> watch::Receiver<RunState> {
        self.state.clone()
    }

    /// Pauses the child. When its guest is about to reboot, waits for that.
    ///
    /// # Errors
    /// When it has ended.
    pub(super) async fn pause(&self) -> Result<(), WorkloadError> {
        loop {
            let Some(child) = self.child.upgrade() else {
                return Err(WorkloadError::new("it has ended"));
            };
            let telling = self.telling.lock().await;
            let Err(error) = child.pause().await else { return Ok(()) };
            drop(telling);
            let mut states = child.states();
            if !is_reset(&states.borrow_and_update()) {
                return Err(told("pause it")(error));
            }
            drop(child);
            let mut state = self.state.clone();
            tokio::select! {
                // It fails only with the child, and then the next try does too.
                _ = states.wait_for(|now| !is_reset(now)) => {}
                _ = state.wait_for(|now| matches!(now, RunState::Ended(_))) => {
                    return Err(WorkloadError::new("it could not be rebooted and has ended"));
                }
            }
        }
    }
}

fn is_reset(state: &ChildState) -> bool {
    matches!(state, ChildState::Stopped(StopReason { kind: GuestStopKind::Reset, .. }))
}

/// Watches the child, and starts it anew where needed.
struct Follower {
    /// Not to keep the child when its VM was dropped.
    child: Weak<Child>,
    states: watch::Receiver<ChildState>,
    wish: watch::Receiver<Option<String>>,
    telling: Arc<Mutex<()>>,
    /// Why it could not be started anew.
    failed: Option<String>,
}

impl Follower {
    async fn run(&mut self, tell: watch::Sender<RunState>) {
        loop {
            if is_reset(&self.states.borrow_and_update()) && self.failed.is_none() {
                self.reboot().await;
            }
            let now = self.now();
            tell.send_if_modified(|state| {
                let differs = *state != now;
                *state = now;
                differs
            });
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { break },
                () = tell.closed() => break,
            }
        }
        // The state stays readable for as long as anybody looks.
        tell.closed().await;
    }

    fn now(&mut self) -> RunState {
        let wish = self.wish.borrow_and_update();
        match &*self.states.borrow_and_update() {
            ChildState::Running => RunState::Running,
            ChildState::Starting | ChildState::Ready | ChildState::Paused => RunState::Paused,
            ChildState::Stopped(reason) => match (&*wish, &self.failed) {
                (Some(wish), _) => RunState::Ended(wish.clone()),
                (None, Some(failed)) => RunState::Ended(failed.clone()),
                (None, None) if reason.kind == GuestStopKind::Reset => RunState::Running,
                (None, None) => RunState::Ended(reason.to_string()),
            },
            ChildState::Dead(why) => RunState::Ended(wish.clone().unwrap_or_else(|| why.clone())),
        }
    }

    async fn reboot(&mut self) {
        let Some(child) = self.child.upgrade() else { return };
        let telling = self.telling.lock().await;
        let rebooted = reboot(&child).await;
        drop(telling);
        match rebooted {
            Ok(()) => tracing::info!(pid = child.pid(), "a guest was rebooted"),
            Err(error) => {
                let why =
                    format!("the guest asked for a reset, and can't be started anew: {error}");
                tracing::warn!(pid = child.pid(), why, "a guest was not rebooted");
                self.failed = Some(why);
            }
        }
    }
}

async fn reboot(child: &Child) -> Result<(), WorkloadError> {
    let (kernel, initrd) = paths(child.config());
    let kernel = open("kernel", &kernel)?;
    let initrd = initrd.map(|path| open("initrd", &path)).transpose()?;
    child.reboot(kernel, initrd).await.map_err(told("load its kernel again"))?;
    child.run().await.map_err(told("let it run"))
}
