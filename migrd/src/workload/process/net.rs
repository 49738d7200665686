//! The network of a process tree: a network namespace of its own, joined to a
//! bridge of the host by a veth pair.
//!
//! The inner end, `eth0`, has the workload's hardware address and addresses, the
//! same on every host. It has no others, as one that a router of one network
//! hands out would be missing in the next: IPv6 is off beside an IPv4 address,
//! and router advertisements are not heeded. The outer end is in the daemon's
//! namespace, named after the workload's id. It is put into the bridge only
//! while the workload may be heard ([`Network::join`], [`Network::cut`]).
//!
//! The pair is gone when the namespace is, which is when no process is in it and
//! nobody has it open. So a daemon that ends leaves nothing but what a living
//! tree uses, and the next one finds it by the tree's keeper ([`Network::find`]).
//!
//! In a bridge with spanning tree nothing is forwarded before its forward delay
//! is over: switch one of them off.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use migr_proto::v1::ProcessNet;

use super::super::{Problem, WorkloadError};
use crate::units::{Mac, WorkloadId};
use crate::workload::vm::nets;

use config::Plan;
use ends::{Ends, address_is_free, bridge, is_of};
use error::{NetError, system};
use route::Route;

mod config;
mod ends;
mod error;
mod frames;
mod inside;
mod route;

pub use config::{addresses, check};

/// What the workload's interface is called inside.
const INNER_NAME: &str = "eth0";
/// Frames get lost, and who should see one may not be there yet.
const ANNOUNCEMENTS: u32 = 3;
const BETWEEN_ANNOUNCEMENTS: Duration = Duration::from_millis(100);

/// Does what may take some milliseconds beside the caller's thread, in the same
/// namespace.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, WorkloadError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(NetError::on_this_host),
        Err(e) => Err(WorkloadError::caused("the work on a network failed", e)),
    }
}

/// The network of one workload on this host. Dropping it changes nothing for the
/// processes in it.
#[derive(Clone, Debug)]
pub struct Network(Arc<Ends>);

impl Network {
    /// Makes the network of a workload, cut off.
    ///
    /// # Errors
    /// When this host can't have it; nothing is left of it then. That there is
    /// an interface of its name already is such an error: [`remove`] it before.
    pub async fn make(id: WorkloadId, config: &ProcessNet) -> Result<Self, WorkloadError> {
        let config = config.clone();
        aside(move || Ends::make(Plan::new(id, &config)?)).await.map(Self::of)
    }

    /// Takes back the network that an earlier daemon made for the workload in that
    /// namespace. It is as that daemon left it, joined or cut.
    ///
    /// # Errors
    /// When the namespace has no network of that workload, or that has lost its outer end.
    pub async fn find(
        id: WorkloadId,
        config: &ProcessNet,
        namespace: OwnedFd,
    ) -> Result<Self, WorkloadError> {
        let config = config.clone();
        aside(move || Ends::find(Plan::new(id, &config)?, namespace)).await.map(Self::of)
    }

    fn of(ends: Ends) -> Self {
        Self(Arc::new(ends))
    }

    /// The namespace, for the processes that are to be in it.
    #[must_use]
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.0.namespace.as_fd()
    }

    /// The namespace's number, as CRIU names it: `net[INODE]`.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.0.inode
    }

    /// The hardware address inside.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.0.plan.mac
    }

    /// The name of the end in this host's namespace.
    #[must_use]
    pub fn interface(&self) -> String {
        config::name_of(self.0.plan.id)
    }

    /// Lets the workload reach the bridge and be reached. Harmless if it does.
    ///
    /// # Errors
    /// When the bridge is gone, or the outer end; it may still be cut off then,
    /// or not.
    pub async fn join(&self) -> Result<(), WorkloadError> {
        let ends = Arc::clone(&self.0);
        aside(move || ends.join()).await
    }

    /// Does of [`Self::join`] what may fail, and lets the workload not be heard yet.
    /// Harmless if it is.
    ///
    /// # Errors
    /// When the bridge is gone, or the outer end.
    pub async fn ready(&self) -> Result<(), WorkloadError> {
        let ends = Arc::clone(&self.0);
        aside(move || ends.put_in_bridge()).await
    }

    /// Lets nothing of the workload reach the network, and nothing reach it.
    /// Connections inside stay as they are. Harmless if it is cut off.
    ///
    /// # Errors
    /// When the outer end can't be switched off; it may still be joined then.
    pub async fn cut(&self) -> Result<(), WorkloadError> {
        let ends = Arc::clone(&self.0);
        aside(move || ends.cut()).await
    }

    /// Tells neighbours and switches that the workload's address is here now, and asks for
    /// those that it still waits for, three times in a fifth of a second. For a network that
    /// was joined.
    ///
    /// # Errors
    /// When nothing could be sent.
    pub async fn announce(&self) -> Result<(), WorkloadError> {
        let ends = Arc::clone(&self.0);
        let socket = aside(move || ends.frame_socket()).await?;
        let frames = frames::announcement(self.0.plan.mac, self.0.plan.address);
        let (mut sent, mut last) = (0, Ok(()));
        for turn in 0..ANNOUNCEMENTS {
            if turn > 0 {
                tokio::time::sleep(BETWEEN_ANNOUNCEMENTS).await;
                // A question or its answer may be lost like any frame.
                let ends = Arc::clone(&self.0);
                if let Err(error) = aside(move || ends.ask_again()).await {
                    tracing::info!(%error, "neighbours were not asked again");
                }
            }
            for frame in &frames {
                last = socket.send(frame);
                sent += u32::from(last.is_ok());
            }
        }
        match last {
            Err(e) if sent == 0 => {
                Err(system("announce the address of", &self.interface())(e).on_this_host())
            }
            _ => Ok(()),
        }
    }

    /// Announces it without anybody waiting for it.
    pub fn announce_aside(&self) {
        let network = self.clone();
        tokio::spawn(async move {
            // Neighbours that do not hear of it ask again later.
            if let Err(error) = network.announce().await {
                let interface = network.interface();
                tracing::warn!(%interface, %error, "the network was not told of a process tree");
            }
        });
    }

    /// Takes the network away from the workload: it has no `eth0` any more.
    /// Harmless if it was done before.
    ///
    /// # Errors
    /// What the system says.
    pub async fn remove(&self) -> Result<(), WorkloadError> {
        remove(self.0.plan.id).await
    }
}

/// Removes whatever network of the workload is on this host, made by this daemon
/// or an earlier one. Harmless if there is none. An interface that only has the
/// same name stays.
///
/// # Errors
/// What the system says.
pub async fn remove(id: WorkloadId) -> Result<(), WorkloadError> {
    aside(move || {
        let name = config::name_of(id);
        let mut host = Route::open().map_err(system("ask about", &name))?;
        match host.named(&name).map_err(system("look at", &name))? {
            Some(link) if is_of(&link, id) => {
                host.delete(link.index).map_err(system("delete", &name))
            }
            _ => Ok(()),
        }
    })
    .await
}

/// The hardware address that a workload has in this network, if it can be one.
#[must_use]
pub fn hardware(id: WorkloadId, config: &ProcessNet) -> Option<Mac> {
    Plan::new(id, config).ok().map(|plan| plan.mac)
}

/// What keeps a workload with this network from arriving on this host. Nothing
/// is changed.
#[must_use]
pub fn problems(id: WorkloadId, config: &ProcessNet) -> Vec<Problem> {
    let plan = match Plan::new(id, config) {
        Ok(plan) => plan,
        Err(error) => return vec![NetError::Config(error).problem()],
    };
    let bridge = Route::open()
        .map_err(system("ask about", &plan.bridge))
        .and_then(|mut host| bridge(&mut host, &plan.bridge));
    let hardware = nets::hardware_is_free(plan.mac).map_err(NetError::from);
    let taken = [address_is_free(plan.address), hardware, ends::name_is_free(id)].map(Result::err);
    let found = [bridge.err()].into_iter().chain(taken).flatten();
    found.map(|error| error.problem()).collect()
}
