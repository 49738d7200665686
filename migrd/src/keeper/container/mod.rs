//! Containers: process trees that runc makes, with a root file system, limits and
//! hooks of their own.
//!
//! runc starts a container ([`runc`]) and makes it again at a destination
//! ([`restore`]), so that it has its cgroups, runs its hooks and knows it afterwards.
//! It wants to start CRIU for that itself; what it starts is a [`shim`], by which the
//! keeper gets between the two ([`relay`]) and holds a restored container as it holds
//! any tree. To write a container, CRIU is enough ([`super::hold`]): runc is told
//! nothing, so that an aborted migration has nothing to undo.
//!
//! Owns the files in the directory `bundle`. [`spec`] is what runc is told to make.

mod relay;
mod restore;
mod runc;
mod shim;
mod spec;

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use migr_proto::v1 as proto;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

pub use restore::restore;
pub use runc::{CallOff, Start, end_all, start, wait};
pub use shim::{ShimArgs, shim};
pub use spec::{MAX_SPEC, Network, Spec, SpecError};

use super::cgroup::Cgroup;
use super::mounts;

/// Name of the directory that runc takes for the bundle.
pub const BUNDLE: &str = "bundle";
/// Name of the link to runc in a container's directory.
pub const RUNC: &str = "runc";
/// What runc calls a network namespace from outside, between a dump and a restore.
pub const NETWORK_KEY: &str = "extRootNetNS";

/// Where runc keeps its state of the container that lives in `directory`, beside
/// that of all others of its daemon.
#[must_use]
pub fn runc_root(directory: &Path) -> PathBuf {
    let state = directory.parent().and_then(Path::parent);
    state.unwrap_or(Path::new("/")).join("runc")
}

/// What makes the tree of a keeper a container.
#[derive(Clone, Debug)]
pub struct Container {
    spec: Spec,
    /// The container's directory; its name is what runc calls the container.
    directory: PathBuf,
    id: String,
}

impl Container {
    /// That of a configuration, if it has one. `directory` is the workload's.
    ///
    /// # Errors
    /// When it is not as it must be.
    pub fn of(config: &proto::ProcessConfig, directory: &Path) -> io::Result<Option<Self>> {
        let Some(config) = &config.container else { return Ok(None) };
        let spec = Spec::parse(&config.spec).map_err(io::Error::other)?;
        let id = directory.file_name().and_then(|name| name.to_str());
        let id = id.ok_or_else(|| io::Error::other("the directory of a container has no name"))?;
        Ok(Some(Self { spec, directory: directory.to_owned(), id: id.to_owned() }))
    }

    fn bundle(&self) -> PathBuf {
        self.directory.join(BUNDLE)
    }

    /// Writes what runc is to make: in that cgroup, and in the network namespace that
    /// this process has as `network`.
    fn write_spec(&self, cgroup: &Cgroup, network: Option<i32>) -> io::Result<()> {
        let name = cgroup.path().file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| io::Error::other("its cgroup has no name"))?;
        let network = network.map(|fd| format!("/proc/{}/fd/{fd}", std::process::id()));
        match std::fs::create_dir(self.bundle()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        std::fs::write(
            self.bundle().join("config.json"),
            self.spec.on_host(name, network.as_deref()),
        )
    }

    /// What CRIU is to find outside of the container when it writes the one whose
    /// first process is `init`, by the names that runc gives it at a restore. Its
    /// network is among them unless it is this keeper's, or dies with it.
    ///
    /// # Errors
    /// When the init is gone.
    pub fn external(&self, init: u32) -> io::Result<Vec<String>> {
        let all = mounts::of(&init.to_string())?;
        let root = PathBuf::from(format!("/proc/{init}/root"));
        let points: HashSet<&str> = all.iter().map(|mount| mount.path.as_str()).collect();
        let mut external = Vec::new();
        let shared = self.spec.binds().into_iter().map(|(inside, _)| inside);
        for inside in shared.chain(self.spec.devices()) {
            let path = resolve(&root, &inside)?;
            if points.contains(path.as_str()) {
                external.push(format!("mnt[{path}]:{path}"));
            }
        }
        for path in self.spec.masked() {
            let is_file = || {
                std::fs::metadata(root.join(path.trim_start_matches('/')))
                    .is_ok_and(|m| !m.is_dir())
            };
            if points.contains(path.as_str()) && is_file() {
                external.push(format!("mnt[{path}]:/dev/null"));
            }
        }
        if !self.spec.has_cgroup_namespace() {
            // runc binds its cgroups one by one (cgroup v1).
            let bound = all.iter().filter(|mount| mount.kind == "cgroup");
            external.extend(bound.map(|mount| format!("mnt[{0}]:{0}", mount.path)));
        }
        if let Network::At(_) = self.spec.network() {
            let inode = std::fs::metadata(format!("/proc/{init}/ns/net"))?.ino();
            external.push(format!("net[{inode}]:{NETWORK_KEY}"));
        }
        external.sort();
        external.dedup();
        Ok(external)
    }
}

/// Where a path inside leads, with its symbolic links followed inside.
fn resolve(root: &Path, inside: &Path) -> io::Result<String> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let directory = open(root, flags | OFlag::O_DIRECTORY, Mode::empty())?;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let Ok(found) = openat2(&directory, inside, how) else {
        return Ok(inside.display().to_string());
    };
    use std::os::fd::AsRawFd;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    Ok(link.display().to_string())
}
