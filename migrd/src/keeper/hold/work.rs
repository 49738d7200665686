//! What CRIU is told of a tree, whichever way it goes, and what it says when that fails.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use migr_proto::v1 as proto;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::{DUMP_LOG, Ended};
use crate::keeper::criu::rpc::{CgroupMode, NetworkLock, Options};
use crate::keeper::criu::{Failure, Log};
use crate::keeper::mounts;
use crate::sys::tmpfs;

/// CRIU's log level: what failed, and the steps before it.
const LOG_LEVEL: i32 = 4;
/// What CRIU's logs may come to (bytes).
const LOGS_BYTES: u64 = 1 << 30;

/// What both ways have in common.
#[derive(Debug)]
pub struct Work {
    /// CRIU.
    pub criu: PathBuf,
    /// Directory of the images.
    pub images: OwnedFd,
    /// Directory of CRIU's logs. Not that of the images, which may be the user's, or
    /// full, and the log says so.
    pub logs: OwnedFd,
    /// The cgroup of the tree.
    pub cgroup: PathBuf,
    /// What the user lets CRIU do.
    pub options: proto::ProcessOptions,
    /// The network namespace of the tree, if it has one.
    pub network: Option<OwnedFd>,
    /// Mount points that CRIU does not look into.
    pub mounts: Vec<String>,
    /// What else is outside of it, as CRIU's `--external` has it; for a dump.
    pub external: Vec<String>,
    /// What its network namespace is called between a dump and a restore.
    pub network_key: &'static str,
    /// A page server that memory goes to; none: into images.
    pub page_server: Option<OwnedFd>,
    /// Directory of the images that a dump builds on, relative to that of its own; empty:
    /// it has everything.
    pub parent: String,
    /// What the tree writes to its memory after a dump is told to a later one.
    pub track: bool,
}

impl Work {
    pub(in crate::keeper) fn options(&self, log: &str) -> Options {
        use std::os::fd::AsRawFd;
        let proto::ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections } =
            self.options;
        let ghost = u32::try_from(ghost_limit_bytes).unwrap_or(u32::MAX);
        Options {
            images_dir_fd: self.images.as_raw_fd(),
            work_dir_fd: Some(self.logs.as_raw_fd()),
            log_level: Some(LOG_LEVEL),
            log_file: Some(log.to_owned()),
            notify_scripts: Some(true),
            manage_cgroups_mode: Some(CgroupMode::Ignore.into()),
            // The tree's network is cut off by its namespace, from outside.
            network_lock: Some(NetworkLock::Skip.into()),
            tcp_established: Some(!drop_connections),
            tcp_close: Some(drop_connections),
            file_locks: Some(file_locks),
            link_remap: Some(link_remap),
            ghost_limit: (ghost > 0).then_some(ghost),
            ext_sharing: Some(true),
            ext_masters: Some(true),
            ..Options::default()
        }
    }

    /// How the tree of `pid` is written.
    pub(in crate::keeper) fn dump_options(&self, pid: u32) -> Result<Options, Failure> {
        let mut options = self.options(DUMP_LOG);
        options.pid = i32::try_from(pid).ok();
        let named = self.mounts.iter().enumerate();
        options.external =
            named.map(|(index, path)| format!("mnt[{path}]:{}", mount_key(index))).collect();
        if let Some(network) = &self.network {
            let inode = inode(network).map_err(|e| system_failure(&e))?;
            options.external.push(format!("net[{inode}]:{}", self.network_key));
        }
        options.external.extend(self.external.iter().cloned());
        if !self.parent.is_empty() {
            options.parent_img = Some(self.parent.clone());
        }
        if self.track || !self.parent.is_empty() {
            options.track_mem = Some(true);
        }
        Ok(options)
    }

    /// What CRIU's answer and its log say of a failure.
    pub(in crate::keeper) fn failure(&self, log: &str, ended: Ended) -> Failure {
        explain(ended, || read_log(&self.logs, log))
    }

    /// The same of a CRIU whose log is among the images.
    pub(in crate::keeper) fn failure_among_images(&self, log: &str, ended: Ended) -> Failure {
        explain(ended, || read_log(&self.images, log))
    }
}

fn explain(ended: Ended, log: impl FnOnce() -> Log) -> Failure {
    match ended {
        Ended::Failed(response) => Failure::explain(&response, &log()),
        Ended::Broken(error) => system_failure(&error),
        Ended::Refused => system_failure(&"it was told not to go on"),
        Ended::Slow => Failure {
            code: "slow",
            message: "CRIU does not come to an end".into(),
            remedy: "see what that host is busy with: its storage, its memory",
        },
    }
}

fn read_log(directory: &OwnedFd, name: &str) -> Log {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let opened = openat(directory, name, flags, Mode::empty());
    let read = opened.map_err(io::Error::from).and_then(|fd| Log::read(File::from(fd)));
    read.unwrap_or_default()
}

/// A directory for CRIU's logs, in memory.
///
/// # Errors
/// When the kernel makes none.
pub fn logs() -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(&tmpfs::create(LOGS_BYTES)?, ".", flags, Mode::empty())?)
}

/// What a mount is called between a dump and a restore.
pub(super) fn mount_key(index: usize) -> String {
    format!("migr-mount-{index}")
}

/// A failure that is not CRIU's.
pub(in crate::keeper) fn system_failure(error: &impl std::fmt::Display) -> Failure {
    let remedy = "see what the keeper's log has to say";
    Failure { code: "system", message: error.to_string(), remedy }
}

fn inode(fd: &OwnedFd) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::File::from(fd.try_clone()?).metadata()?.ino())
}

/// The mounts of a tree that CRIU does not look into.
///
/// # Errors
/// When its init is gone.
pub fn external_mounts(init: u32) -> io::Result<Vec<String>> {
    Ok(mounts::external(&mounts::of(&init.to_string())?))
}
