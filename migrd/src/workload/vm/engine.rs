//! Makes VMs, and finds those again that an earlier daemon has made.
//!
//! Each VM has a directory of its own, named by the workload's id. A directory
//! that no record of the journal speaks of belongs to a VM that was never
//! owned: it is cleared away at the start.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use migr_proto::v1 as proto;
use prost::Message;

use super::arriving::ArrivingVm;
use super::child::{Child, ChildError, ChildSpec, ChildState, open_kvm};
use super::disks::{self, Disks, Holder, Purpose};
use super::running::{Vm, remove};
use super::{all_streams, chain, cpu, failed, nets, streams, told};
use crate::units::{HostId, WorkloadId};
use crate::workload::outliving::own_program;
use crate::workload::{
    Arriving, Engine, Manifest, NetAddress, Problem, Recovers, StreamSpec, Workload, WorkloadError,
};

/// The most virtual CPUs of a VM.
pub const MAX_CPUS: u32 = 64;
/// The version of a [`proto::VmConfig`] that this migrd writes.
const CONFIG_VERSION: u32 = 2;

/// The mode of directories: whoever connects to a VM's control socket owns the
/// VM, and its log is for nobody else to read.
const PRIVATE: u32 = 0o700;

/// How long, and how often, a child that does not answer is given to be gone.
const DYING_PAUSE: Duration = Duration::from_millis(50);
const DYING_TRIES: u32 = 60;

/// A VM to be made and booted.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// Path of the initrd.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Disks. Their sizes are looked up by [`VmEngine::measure`].
    pub disks: Vec<proto::DiskConfig>,
    /// Network interfaces.
    pub nets: Vec<proto::NetConfig>,
    /// What the guest's CPUs may say of themselves.
    pub cpu: Option<proto::CpuModel>,
}

impl NewVm {
    /// What the VM is made of, on this host and the next.
    #[must_use]
    pub fn config(&self) -> proto::VmConfig {
        proto::VmConfig {
            version: CONFIG_VERSION,
            memory_bytes: self.memory_bytes,
            cpus: self.cpus,
            cmdline: self.cmdline.clone(),
            kernel: self.kernel.display().to_string(),
            initrd: self.initrd.as_ref().map_or_else(String::new, |p| p.display().to_string()),
            disks: self.disks.clone(),
            nets: self.nets.clone(),
            cpu: self.cpu.clone(),
        }
    }

    /// Whether a VM can be so.
    ///
    /// # Errors
    /// What can't be, and what could.
    pub fn check(&self) -> Result<(), WorkloadError> {
        check_config(&self.config())
    }
}

fn check_config(config: &proto::VmConfig) -> Result<(), WorkloadError> {
    if config.version > CONFIG_VERSION {
        return Err(WorkloadError::new(format!(
            "the VM is of a newer version ({}) than this migrd knows ({CONFIG_VERSION}); upgrade it",
            config.version
        )));
    }
    if config.cpus == 0 || config.cpus > MAX_CPUS {
        let cpus = config.cpus;
        let text = format!("{cpus} virtual CPUs are not possible: ask for 1 to {MAX_CPUS}");
        return Err(WorkloadError::new(text));
    }
    disks::check(&config.disks)?;
    nets::check(&config.nets)?;
    streams(config.memory_bytes).map(drop).map_err(|e| WorkloadError::new(e.to_string()))
}

/// Which host this is, to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its id.
    pub host: HostId,
    /// The address of its daemon.
    pub address: String,
}

/// Makes VMs in the state directory.
#[derive(Clone, Debug)]
pub struct VmEngine {
    directory: PathBuf,
    site: Site,
}

impl VmEngine {
    /// VMs live below `directory`, which is made.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(directory: PathBuf, site: Site) -> std::io::Result<Self> {
        DirBuilder::new().recursive(true).mode(PRIVATE).create(&directory)?;
        Ok(Self { directory, site })
    }

    /// Who a workload is to those who find its disks in use.
    fn holder(&self, workload: WorkloadId, name: &str) -> Holder {
        let Site { host, address } = self.site.clone();
        Holder { workload, name: name.to_owned(), host, address }
    }

    /// Looks up how large the disks of a VM are that is to be made.
    ///
    /// # Errors
    /// When one is no disk that a VM can have.
    pub async fn measure(&self, new: &mut NewVm) -> Result<(), WorkloadError> {
        for disk in &mut new.disks {
            disks::check_path(&disk.path)?;
            disk.bytes = disks::measure(disk.path.clone(), disk.read_only).await?;
        }
        Ok(())
    }

    fn place(&self, id: WorkloadId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn make_place(&self, id: WorkloadId) -> Result<PathBuf, WorkloadError> {
        let directory = self.place(id);
        let made = DirBuilder::new().mode(PRIVATE).create(&directory);
        made.map_err(failed("make the VM's directory"))?;
        Ok(directory)
    }

    /// A VM whose kernel is loaded and that does not run yet.
    ///
    /// # Errors
    /// When a file can't be read, or the host can't have this VM. Nothing is
    /// left then.
    pub async fn create(
        &self,
        id: WorkloadId,
        name: &str,
        new: &NewVm,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        new.check()?;
        let kernel = open("kernel", &new.kernel)?;
        let initrd = new.initrd.as_deref().map(|p| open("initrd", p)).transpose()?;
        let child = self.spawn(id, new.config(), Some(kernel), initrd).await?;
        let directory = self.place(id);
        let disks = Disks::of(&child, self.holder(id, name));
        let mut vm = match Vm::new(directory.clone(), child.clone(), true, disks) {
            Ok(vm) => vm,
            Err(error) => {
                child.kill().await;
                remove(&directory);
                return Err(error);
            }
        };
        let booted = async {
            nets::attach(&child).await?;
            vm.take_disks(Purpose::New).await?;
            child.boot().await.map_err(told(&format!("boot {}", new.kernel.display())))
        };
        match booted.await {
            Ok(()) => Ok(Box::new(vm)),
            Err(error) => {
                child.kill().await;
                vm.put_disks_back().await;
                remove(&directory);
                Err(error)
            }
        }
    }

    async fn spawn(
        &self,
        id: WorkloadId,
        config: proto::VmConfig,
        kernel: Option<File>,
        initrd: Option<File>,
    ) -> Result<Arc<Child>, WorkloadError> {
        let directory = self.make_place(id)?;
        let program = own_program();
        let spec = ChildSpec { id, directory: directory.clone(), config, kernel, initrd, program };
        match Child::spawn(spec).await {
            Ok(child) => Ok(Arc::new(child)),
            Err(error) => {
                remove(&directory);
                Err(WorkloadError::new(chain(&error)))
            }
        }
    }

    async fn find_still(
        &self,
        id: WorkloadId,
        name: &str,
        paused: bool,
    ) -> Result<Option<Vm>, WorkloadError> {
        let directory = self.place(id);
        let Some(child) = self.adopt(&directory).await? else { return Ok(None) };
        let disks = Disks::of(&child, self.holder(id, name));
        let mut vm = Vm::new(directory, Arc::new(child), paused, disks)?;
        // What an earlier daemon has sent of it counts for nothing now.
        vm.end_old_tracking().await;
        Ok(Some(vm))
    }

    async fn adopt(&self, directory: &Path) -> Result<Option<Child>, WorkloadError> {
        let mut adopted = Child::adopt(directory).await;
        for _ in 0..DYING_TRIES {
            // A child that was killed just now still accepts, and says nothing.
            if !matches!(adopted, Err(ChildError::Dead(_))) {
                break;
            }
            tokio::time::sleep(DYING_PAUSE).await;
            adopted = Child::adopt(directory).await;
        }
        adopted.map_err(told("take the VM back"))
    }

    /// Why this host can't run VMs, and what to do; `None` if it can.
    #[must_use]
    pub fn problem() -> Option<String> {
        open_kvm().err().map(|error| chain(&error))
    }
}

/// The files that a VM boots from: kernel, and initrd if it has one.
pub(super) fn paths(config: &proto::VmConfig) -> (PathBuf, Option<PathBuf>) {
    let initrd = Some(&config.initrd).filter(|path| !path.is_empty()).map(PathBuf::from);
    (PathBuf::from(&config.kernel), initrd)
}

/// Opens a file that a VM boots from.
///
/// # Errors
/// When it can't be read, or is no file.
pub(super) fn open(what: &str, path: &Path) -> Result<File, WorkloadError> {
    // Not to wait for somebody to write into what may be a pipe.
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path);
    let file = opened.map_err(|e| {
        WorkloadError::caused(format!("cannot open the {what} {}: {e}", path.display()), e)
    })?;
    let regular = file.metadata().is_ok_and(|m| m.is_file());
    if !regular {
        return Err(WorkloadError::new(format!("the {what} {} is not a file", path.display())));
    }
    Ok(file)
}

#[async_trait]
impl Engine for VmEngine {
    fn addresses(&self, config: &[u8]) -> Vec<NetAddress> {
        proto::VmConfig::decode(config).map_or_else(|_| Vec::new(), |vm| nets::addresses(&vm.nets))
    }

    async fn clear(&self, id: WorkloadId) {
        let directory = self.place(id);
        if !directory.exists() {
            return;
        }
        match Child::adopt(&directory).await {
            Ok(Some(child)) => child.kill().await,
            Ok(None) => {}
            Err(error) => tracing::warn!(%id, %error, "a VM could not be ended"),
        }
        disks::undo(&directory, id, self.site.host);
        remove(&directory);
    }

    async fn check(&self, manifest: &Manifest) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(problem) = Self::problem() {
            problems.push(Problem::new("kvm", problem, HOSTS));
        }
        let by = self.holder(manifest.workload, &manifest.name);
        match check_offered(manifest) {
            Ok(config) => {
                problems.extend(nets::problems(&config.nets));
                problems.extend(disks::problems(manifest, config.disks, by).await);
            }
            Err(error) => {
                let remedy = "bring both daemons to the same version";
                problems.push(Problem::new("engine", error.to_string(), remedy));
            }
        }
        if let Ok(config) = decode(manifest) {
            problems.extend(cpu::problems(&config).await);
        }
        problems
    }

    async fn prepare(&self, manifest: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError> {
        let id = manifest.workload;
        let child = self.spawn(id, decode(manifest)?, None, None).await?;
        let (directory, holder) = (self.place(id), self.holder(id, &manifest.name));
        let arriving = async {
            nets::attach(&child).await?;
            let copies = disks::make_copies(manifest, child.config(), &holder, &directory).await?;
            ArrivingVm::new(directory.clone(), child.clone(), holder, copies)
        };
        match arriving.await {
            Ok(arriving) => Ok(Box::new(arriving)),
            Err(error) => {
                child.kill().await;
                disks::undo(&directory, id, self.site.host);
                remove(&directory);
                Err(error)
            }
        }
    }
}

#[async_trait]
impl Recovers for VmEngine {
    async fn find(
        &self,
        id: WorkloadId,
        name: &str,
        config: &[u8],
        paused: bool,
    ) -> Result<Box<dyn Workload>, WorkloadError> {
        let Some(mut vm) = self.find_still(id, name, paused).await? else {
            let config = proto::VmConfig::decode(config)
                .map_err(|e| WorkloadError::caused("its configuration is damaged", e))?;
            let why = "its VMM is gone: the host restarted, or it was stopped or killed";
            return Ok(Box::new(Vm::ended(self.place(id), config.memory_bytes, why)?));
        };
        if let Err(error) = vm.take_disks(Purpose::TakenBack).await {
            // Its memory is here: an operator can let it go on later.
            tracing::error!(%id, %error, "a VM stands still without its disks");
            return Ok(Box::new(vm));
        }
        match vm.child_state() {
            Some(ChildState::Ready | ChildState::Paused) if !paused => vm.thaw().await?,
            Some(ChildState::Running) if paused => vm.pause().await?,
            _ => {}
        }
        Ok(Box::new(vm))
    }

    async fn find_released(
        &self,
        id: WorkloadId,
        name: &str,
        paused: bool,
    ) -> Result<Option<Box<dyn Workload>>, WorkloadError> {
        let Some(vm) = self.find_still(id, name, paused).await? else { return Ok(None) };
        if vm.child_state() == Some(ChildState::Running) {
            let mut vm: Box<dyn Workload> = Box::new(vm);
            vm.freeze().await?;
            return Ok(Some(vm));
        }
        Ok(Some(Box::new(vm)))
    }

    async fn find_sealed(
        &self,
        id: WorkloadId,
        name: &str,
    ) -> Result<Option<Box<dyn Arriving>>, WorkloadError> {
        let directory = self.place(id);
        let Some(child) = self.adopt(&directory).await? else { return Ok(None) };
        let holder = self.holder(id, name);
        Ok(Some(Box::new(ArrivingVm::new(directory, Arc::new(child), holder, None)?)))
    }

    async fn sweep(&self, known: &BTreeSet<WorkloadId>) {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|n| WorkloadId::from_str(n).ok());
            let Some(id) = id.filter(|id| !known.contains(id)) else { continue };
            tracing::info!(%id, "clearing away a VM that this host does not own");
            self.clear(id).await;
        }
    }
}

/// What to do about a host that can't run what is offered.
const HOSTS: &str = "see `migctl hosts` for this host";

fn check_offered(manifest: &Manifest) -> Result<proto::VmConfig, WorkloadError> {
    let config = decode(manifest)?;
    check_config(&config)?;
    let brings_disks = disks::are_brought(&manifest.streams);
    if brings_disks {
        disks::check_copied(&config.disks)?;
    }
    let expected = all_streams(&config, brings_disks);
    let expected = expected.map_err(|e| WorkloadError::new(e.to_string()))?;
    let plain = |spec: &StreamSpec| StreamSpec { used: 0, ..spec.clone() };
    let offered: Vec<_> = manifest.streams.iter().map(plain).collect();
    let size = (manifest.memory_bytes, manifest.cpus);
    if size != (config.memory_bytes, config.cpus) || offered != expected {
        let text = "what is offered does not fit the VM's own description";
        return Err(WorkloadError::new(text));
    }
    Ok(config)
}

fn decode(manifest: &Manifest) -> Result<proto::VmConfig, WorkloadError> {
    proto::VmConfig::decode(manifest.config.as_slice())
        .map_err(|e| WorkloadError::caused("the VM's description is damaged", e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn site() -> Site {
        Site { host: HostId::random(), address: "a:1".into() }
    }

    #[test]
    fn the_directories_of_vms_are_for_their_user_alone() {
        let parent = tempfile::tempdir().unwrap();
        let vms = parent.path().join("vms");
        let engine = VmEngine::new(vms.clone(), site()).unwrap();
        let place = engine.make_place(WorkloadId::random()).unwrap();
        for directory in [vms, place] {
            let mode = std::fs::metadata(&directory).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", directory.display());
        }
    }

    #[test]
    fn a_directory_that_is_there_is_not_taken_for_a_new_vm() {
        let parent = tempfile::tempdir().unwrap();
        let engine = VmEngine::new(parent.path().to_owned(), site()).unwrap();
        let id = WorkloadId::random();
        engine.make_place(id).unwrap();
        assert!(engine.make_place(id).is_err());
    }
}
