//! Makes process trees; [`super::recovering`] finds those again that an earlier daemon
//! has made.
//!
//! Each tree has a directory of its own, named by the workload's id, and a cgroup
//! named by host and workload: two daemons of one machine may hold copies of the
//! same tree.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use migr_proto::v1::ProcessConfig;
use prost::Message;

use super::arriving::{ArrivingTree, Parts};
use super::keeper::{Keeper, KeeperSpec};
use super::net::{self, Network};
use super::offered::{lacking, offered, rootfs_of};
use super::remains::{clear_cgroup, put_away, remove};
use super::rootfs::{self, ROOTFS_STREAM};
use super::running::Tree;
use super::{Candidate, LOG_STREAM, Starts, carried, container, told, versions};
use crate::keeper::cgroup;
use crate::keeper::container::runc_root;
use crate::keeper::criu::Criu;
use crate::units::WorkloadId;
use crate::workload::vm::Site;
use crate::workload::{Arriving, Engine, Manifest, NetAddress, Problem, Workload, WorkloadError};

/// The version of a [`ProcessConfig`] that this migrd writes.
const CONFIG_VERSION: u32 = 1;
/// The mode of directories: whoever connects to a tree's control socket owns the
/// tree, and its log is for nobody else to read.
const PRIVATE: u32 = 0o700;

/// Makes process trees in the state directory.
#[derive(Clone)]
pub struct ProcessEngine {
    directory: PathBuf,
    site: Site,
    /// The CRIU that works here, or why none does.
    criu: Arc<Result<Criu, String>>,
    /// Of an engine of containers: the runc of this host, or why there is none.
    runc: Option<Result<PathBuf, String>>,
}

impl ProcessEngine {
    /// Trees live below `directory`, which is made.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(
        directory: PathBuf,
        site: Site,
        criu: Result<Criu, String>,
    ) -> std::io::Result<Self> {
        DirBuilder::new().recursive(true).mode(PRIVATE).create(&directory)?;
        Ok(Self { directory, site, criu: Arc::new(criu), runc: None })
    }

    /// The same for containers, with the runc that is `named` or in `PATH`.
    ///
    /// # Errors
    /// When the place for runc's state can't be made.
    pub fn of_containers(self, named: Option<&Path>) -> std::io::Result<Self> {
        let root = runc_root(&self.directory.join("any"));
        DirBuilder::new().recursive(true).mode(PRIVATE).create(root)?;
        let rootfs = rootfs::places(&self.directory.join("any"));
        DirBuilder::new().recursive(true).mode(PRIVATE).create(rootfs)?;
        Ok(Self { runc: Some(container::find_runc(named)), ..self })
    }

    /// Whether this is the engine of such a workload.
    fn is_for(&self, config: &ProcessConfig) -> Result<(), WorkloadError> {
        if self.runc.is_some() == config.container.is_some() {
            return Ok(());
        }
        Err(WorkloadError::new("the configuration is of another kind than the workload"))
    }

    pub(super) fn place(&self, id: WorkloadId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    /// The directories that trees have theirs in; what was begun may have only the last
    /// of them yet, or still.
    pub(super) fn homes(&self) -> Vec<PathBuf> {
        let came = self.runc.as_ref().map(|_| rootfs::places(&self.directory.join("any")));
        [Some(self.directory.clone()), came].into_iter().flatten().collect()
    }

    /// The cgroup of a workload on this host.
    pub(super) fn cgroup(&self, id: WorkloadId) -> Result<PathBuf, WorkloadError> {
        let root = cgroup::root().map_err(|e| WorkloadError::new(e.to_string()))?;
        let host = self.site.host.to_string();
        let host = host.get(..8).unwrap_or(&host);
        Ok(root.join(format!("migr-{host}-{id}")))
    }

    /// Why there is no runc, if there should be one.
    fn no_runc(&self) -> Option<String> {
        self.runc.as_ref().and_then(|runc| runc.as_ref().err().cloned())
    }

    /// The version of the CRIU that works here; empty: none does.
    pub(super) fn criu_version(&self) -> String {
        self.version().unwrap_or_default()
    }

    fn working(&self) -> Result<&Criu, WorkloadError> {
        self.criu.as_ref().as_ref().map_err(WorkloadError::new)
    }

    /// Whether kernel and CRIU can tell what processes write to their memory.
    pub(super) fn tracks(&self) -> bool {
        self.criu.as_ref().as_ref().is_ok_and(|criu| criu.features.mem_track)
    }

    /// Whether kernel and CRIU can put memory in place when processes run already.
    fn fills_later(&self) -> bool {
        self.criu.as_ref().as_ref().is_ok_and(|criu| criu.features.lazy_pages)
    }

    /// What keeps memory from following a tree here, if it is to.
    fn can_not_fill(&self, manifest: &Manifest) -> Option<Problem> {
        let why = match self.criu.as_ref() {
            // Its own line says why.
            _ if !manifest.follows => return None,
            Err(_) => return None,
            Ok(criu) if !versions::sends_pages(&criu.version.to_string()) => {
                format!("it takes CRIU 4.2 to have memory follow, and {} is here", criu.version)
            }
            Ok(_) if self.fills_later() => return None,
            Ok(_) => "the kernel does not let CRIU put memory in place when processes run already \
                 (userfaultfd with its events for fork, mremap and munmap, which CRIU has tried)"
                .to_owned(),
        };
        Some(Problem::new("destination-postcopy", why, "use --mode stop, or leave --mode out"))
    }

    /// A keeper with no processes yet, in a network of its own if it is to have
    /// one, which is cut off.
    pub(super) async fn keep(
        &self,
        id: WorkloadId,
        config: &ProcessConfig,
    ) -> Result<(Arc<Keeper>, Option<Network>, PathBuf), WorkloadError> {
        check(config)?;
        self.is_for(config)?;
        let criu = self.working()?.path.clone();
        let cgroup = self.cgroup(id)?;
        let directory = self.place(id);
        let made = DirBuilder::new().mode(PRIVATE).create(&directory);
        made.map_err(super::failed("make its directory"))?;
        if let Some(runc) = &self.runc {
            let prepared = match runc {
                Ok(runc) => container::prepare(&directory, runc),
                Err(why) => Err(std::io::Error::other(why.clone())),
            };
            if let Err(error) = prepared {
                container::clear(&directory, &cgroup).await;
                remove(&directory);
                return Err(super::failed("prepare it for runc")(error));
            }
        }
        let network = match &config.net {
            Some(net) => Network::make(id, net).await.map(Some),
            None => Ok(None),
        };
        // What is in the way may be the network of the same tree, of another daemon in
        // this network namespace: it is not this one's to remove.
        if network.is_err() {
            container::clear(&directory, &cgroup).await;
        }
        let network = network.inspect_err(|_| remove(&directory))?;
        let kept = async {
            let namespace = network.as_ref().map(|n| n.namespace().try_clone_to_owned());
            let namespace = namespace.transpose().map_err(super::failed("hold its network"))?;
            let spec = KeeperSpec {
                directory: directory.clone(),
                config: config.clone(),
                criu,
                cgroup: cgroup.clone(),
                network: namespace,
            };
            let keeper = Keeper::spawn(spec).await.map_err(told("start its keeper"))?;
            Ok::<_, WorkloadError>((Arc::new(keeper), network, cgroup))
        };
        match kept.await {
            Ok(kept) => Ok(kept),
            Err(error) => {
                self.clear(id).await;
                Err(error)
            }
        }
    }

    /// What a tree arrives in whose keeper is there, and to which nothing is sent.
    pub(super) fn parts(
        &self,
        id: WorkloadId,
        keeper: Arc<Keeper>,
        network: Option<Network>,
        cgroup: PathBuf,
    ) -> Parts {
        Parts {
            id,
            directory: self.place(id),
            cgroup,
            keeper,
            network,
            images: Vec::new(),
            rootfs: None,
            tracks: self.tracks(),
            lazy: self.fills_later(),
            follows: false,
            criu: self.criu_version(),
        }
    }

    /// Makes room for the root file system that `manifest` brings, if it does; what
    /// this host makes the container of.
    async fn land(
        &self,
        manifest: &Manifest,
        config: ProcessConfig,
    ) -> Result<(Option<rootfs::Landing>, ProcessConfig), WorkloadError> {
        let Some(spec) = rootfs_of(manifest).cloned() else { return Ok((None, config)) };
        let directory = self.place(manifest.workload);
        let place = rootfs::place_of(&directory);
        let list = carried::list_in(&manifest.needs).unwrap_or_default();
        let (devices, home) = (carried::devices_of(&config)?, carried::at_home(&config, &place)?);
        carried::clear(&directory).await;
        let made = rootfs::apart(move || rootfs::Landing::make(&place, &spec, list, devices));
        match made.await {
            Ok(landing) => Ok((Some(landing), home)),
            Err(error) => {
                carried::clear(&directory).await;
                Err(error)
            }
        }
    }

    /// What keeps the root file system that `manifest` brings from being taken.
    async fn no_room_for(&self, manifest: &Manifest, config: &ProcessConfig) -> Vec<Problem> {
        let (Some(spec), Ok(devices)) = (rootfs_of(manifest), carried::devices_of(config)) else {
            return Vec::new();
        };
        let (spec, list) = (spec.clone(), carried::list_in(&manifest.needs));
        let places = rootfs::places(&self.directory.join("any"));
        let looked = tokio::task::spawn_blocking(move || {
            rootfs::problems(&places, &spec, list.as_ref(), devices)
        });
        looked.await.unwrap_or_else(|error| {
            vec![Problem::new("engine", error.to_string(), "see the log of that host's migrd")]
        })
    }
}

pub(super) fn check(config: &ProcessConfig) -> Result<(), WorkloadError> {
    if config.version > CONFIG_VERSION {
        return Err(WorkloadError::new(format!(
            "the process tree is of a newer version ({}) than this migrd knows \
             ({CONFIG_VERSION}); upgrade it",
            config.version
        )));
    }
    if config.argv.is_empty() || !config.cwd.starts_with('/') {
        return Err(WorkloadError::new("the process tree has no command or no directory"));
    }
    super::container_of(config)?;
    config.net.as_ref().map_or(Ok(()), net::check)
}

#[async_trait]
impl Starts for ProcessEngine {
    async fn create(
        &self,
        id: WorkloadId,
        _name: &str,
        config: &ProcessConfig,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        let (keeper, network, cgroup) = self.keep(id, config).await?;
        let (directory, tracks) = (self.place(id), self.tracks());
        match Tree::new(directory, cgroup.clone(), keeper.clone(), network, true, tracks) {
            Ok(tree) => Ok(Box::new(tree.written_by(self.criu_version()))),
            Err(error) => {
                put_away(&keeper, &cgroup).await;
                self.clear(id).await;
                Err(error)
            }
        }
    }

    async fn adopt(
        &self,
        id: WorkloadId,
        candidate: &Candidate,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        self.take_over(id, candidate).await
    }

    fn rootfs_of(&self, id: WorkloadId) -> Option<PathBuf> {
        rootfs::arrived(&rootfs::place_of(&self.place(id)))
    }

    fn problem(&self) -> Option<String> {
        let criu = self.criu.as_ref().as_ref().err().cloned();
        criu.or_else(|| cgroup::root().err().map(|error| error.to_string())).or(self.no_runc())
    }

    fn version(&self) -> Option<String> {
        self.criu.as_ref().as_ref().ok().map(|criu| criu.version.to_string())
    }
}

#[async_trait]
impl Engine for ProcessEngine {
    fn addresses(&self, config: &[u8]) -> Vec<NetAddress> {
        let net = ProcessConfig::decode(config).ok().and_then(|config| config.net);
        net.map_or_else(Vec::new, |net| net::addresses(&net))
    }

    async fn check(&self, manifest: &Manifest) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(problem) = self.problem() {
            let remedy = "see `migctl hosts` for this host";
            let code = if self.no_runc().as_ref() == Some(&problem) { "runc" } else { "criu" };
            problems.push(Problem::new(code, problem, remedy));
        }
        problems.extend(lacking(&manifest.needs, &self.criu_version()).await);
        problems.extend(self.can_not_fill(manifest));
        match offered(manifest).and_then(|config| self.is_for(&config).map(|()| config)) {
            Ok(config) => {
                if let Ok(Some(spec)) = super::container_of(&config) {
                    let brought = rootfs_of(manifest);
                    problems.extend(container::lacking(&spec, brought.is_some()));
                    problems.extend(self.no_room_for(manifest, &config).await);
                }
                let id = manifest.workload;
                problems.extend(config.net.iter().flat_map(|net| net::problems(id, net)));
            }
            Err(error) => {
                let remedy = "bring both daemons to the same version";
                problems.push(Problem::new("engine", error.to_string(), remedy));
            }
        }
        problems
    }

    async fn clear(&self, id: WorkloadId) {
        let directory = self.place(id);
        if !directory.exists() {
            carried::clear(&directory).await;
            return;
        }
        if let Ok(cgroup) = self.cgroup(id) {
            match Keeper::adopt(&directory, cgroup.clone()).await {
                Ok(Some(keeper)) => keeper.quit().await,
                Ok(None) => {}
                Err(error) => tracing::warn!(%id, %error, "a keeper could not be ended"),
            }
            clear_cgroup(&cgroup).await;
            container::clear(&directory, &cgroup).await;
        }
        if let Err(error) = net::remove(id).await {
            tracing::warn!(%id, %error, "the network of a process tree stays behind");
        }
        carried::clear(&directory).await;
        remove(&directory);
    }

    async fn prepare(&self, manifest: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError> {
        let config = offered(manifest)?;
        let id = manifest.workload;
        let directory = self.place(id);
        let (rootfs, config) = self.land(manifest, config).await?;
        let kept = self.keep(id, &config).await;
        if kept.is_err() {
            carried::clear(&directory).await;
        }
        let (keeper, network, cgroup) = kept?;
        let others = [LOG_STREAM, ROOTFS_STREAM];
        let images = manifest.streams.iter().filter(|s| !others.contains(&s.key)).cloned();
        let images = images.collect();
        let kept = self.parts(id, keeper, network, cgroup);
        let follows = manifest.follows;
        match ArrivingTree::new(Parts { images, rootfs, follows, ..kept }) {
            Ok(arriving) => Ok(Box::new(arriving)),
            Err(error) => {
                self.clear(id).await;
                Err(error)
            }
        }
    }
}
