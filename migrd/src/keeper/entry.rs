//! The start of a keeper: takes what it inherited and moves into a mount namespace
//! of its own.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use migr_proto::v1 as proto;
use nix::sched::{CloneFlags, unshare};
use prost::Message;

use super::control::Control;
use crate::child::listener::Listener;
use crate::sys::fds;

/// The numbers under which a keeper finds its descriptors.
pub mod number {
    use std::os::fd::RawFd;

    /// Listening control socket.
    pub const LISTENER: RawFd = 3;
    /// The log of what its processes print.
    pub const LOG: RawFd = 4;
    /// Eventfd, rung after each write to the log.
    pub const BELL: RawFd = 5;
    /// An encoded `ProcessConfig`.
    pub const CONFIG: RawFd = 6;
    /// The network namespace of its processes, if they have one of their own.
    pub const NETWORK: RawFd = 7;
    /// The first number that means nothing.
    pub const FIRST_FREE: RawFd = 8;
}

/// The longest configuration the daemon hands over (bytes).
const CONFIG_BYTES: u64 = 8 << 20;

/// How a keeper is started.
#[derive(Clone, Debug, clap::Args)]
pub struct KeeperArgs {
    /// The CRIU to use
    #[arg(long)]
    pub criu: PathBuf,
    /// The cgroup of its processes
    #[arg(long)]
    pub cgroup: PathBuf,
    /// An empty directory of its own, where it mounts what it needs
    #[arg(long)]
    pub root: PathBuf,
}

/// A keeper can't go on.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Not started by a daemon.
    #[error("process-keeper is started by migrd, not by hand")]
    Inherit(#[source] io::Error),
    /// The system failed.
    #[error("the keeper cannot go on: {0}")]
    Io(#[from] io::Error),
}

/// What a keeper shares with every daemon that comes.
#[derive(Debug)]
pub struct Fds {
    /// The control socket.
    pub listener: Listener,
    /// The log.
    pub log: File,
    /// Rung after each write to the log.
    pub bell: File,
    /// The network namespace of its processes.
    pub network: Option<OwnedFd>,
}

/// Serves until it is told to quit.
///
/// # Errors
/// When it was not started as a keeper, or the system fails.
pub fn run(args: &KeeperArgs) -> Result<(), EntryError> {
    let take = |number| fds::inherited(number).map_err(EntryError::Inherit);
    let listener = take(number::LISTENER)?;
    let shared = Fds {
        listener: Listener::take_over(listener)?,
        log: take(number::LOG)?.into(),
        bell: take(number::BELL)?.into(),
        network: fds::inherited(number::NETWORK).ok(),
    };
    let config = File::from(take(number::CONFIG)?);
    fds::close_from(number::FIRST_FREE)?;
    let mut bytes = Vec::new();
    config.take(CONFIG_BYTES).read_to_end(&mut bytes)?;
    let config = proto::ProcessConfig::decode(bytes.as_slice()).map_err(io::Error::other)?;
    // What is mounted here is seen by nobody else and goes with this process.
    unshare(CloneFlags::CLONE_NEWNS).map_err(io::Error::from)?;
    super::mounts::make_private()?;
    if config.container.is_some() {
        // runc starts its processes, and ends before they do.
        nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)?;
    }
    Ok(Control::new(shared, config, args)?.serve()?)
}
