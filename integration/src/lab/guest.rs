//! The Linux guest of `guest-images/linux`, run in the lab.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::host::Host;
use super::layout::BRIDGE;
use crate::binaries;
use crate::wait;

/// The port that its witness serves.
pub const PORT: &str = "7007";
/// The port of its root shell.
const SHELL: &str = "2323";
/// What it prints when it has booted.
pub const UP: &str = "init: up, kernel";
/// What it prints when it ends in order.
pub const CLEAN: &str = "init: file systems are unmounted";

/// The path of a file that `guest-images/linux/build.sh` makes. It is the same
/// outside and in every host.
///
/// # Errors
/// When it was not made.
pub fn file(name: &str) -> Result<String> {
    let path: PathBuf = binaries::build_dir()?.join("guest-linux").join(name);
    ensure!(
        path.is_file(),
        "{} is missing: build it with `integration/lab/lab.sh build`",
        path.display()
    );
    Ok(path.display().to_string())
}

/// A guest with two vCPUs, a disk and a network card in the hosts' bridge.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its name.
    pub name: &'static str,
    /// Path of its disk in the host where it starts.
    pub disk: String,
    /// `vmlinuz`, or `vmlinux`: the same kernel, which boots faster.
    pub kernel: &'static str,
    /// Which CPU it is given, as `--cpu` takes it.
    pub cpu: Option<&'static str>,
    /// Its memory, in MiB.
    pub memory_mib: u32,
}

impl Guest {
    /// One with its disk in the directory that all hosts share.
    #[must_use]
    pub fn on_shared_storage() -> Self {
        Self::with_disk(format!("{}/web.img", super::layout::SHARED))
    }

    /// One with its disk on the host's own disk.
    #[must_use]
    pub fn on_local_storage() -> Self {
        Self::with_disk(format!("{}/web.img", super::layout::DISK))
    }

    fn with_disk(disk: String) -> Self {
        Self { name: "web", disk, kernel: "vmlinux", cpu: None, memory_mib: 256 }
    }

    /// Its address in the private network.
    #[must_use]
    pub fn address(&self) -> &'static str {
        "10.99.0.50"
    }

    /// Makes its disk in `host` and starts it there. It boots meanwhile.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn run(&self, host: &Host) -> Result<()> {
        host.sh(&format!("cp --sparse=always {} {}", file("disk.img")?, self.disk))?;
        self.run_again(host)
    }

    /// Starts it with the disk that it had.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn run_again(&self, host: &Host) -> Result<()> {
        let (kernel, initrd) = (file(self.kernel)?, file("initrd")?);
        let memory = format!("{}M", self.memory_mib);
        let cmdline = format!(
            "console=ttyS0 quiet panic=-1 migr.ip={}/24 migr.witness migr.shell={SHELL}",
            self.address()
        );
        let net = format!("bridge={BRIDGE}");
        let fixed = ["run", self.name, "--kernel", &kernel, "--initrd", &initrd];
        let sized = ["--memory", &memory, "--cpus", "2", "--cmdline", &cmdline];
        let devices = ["--disk", &self.disk, "--net", &net];
        let cpu = self.cpu.map_or(vec![], |cpu| vec!["--cpu", cpu]);
        host.migctl(&[&fixed[..], &sized, &devices, &cpu].concat())?.ok()?;
        Ok(())
    }

    /// Waits until it has booted.
    ///
    /// # Errors
    /// When it does not, with what it printed.
    pub fn wait_up(&self, host: &Host) -> Result<()> {
        self.wait_up_times(host, 1)
    }

    /// Waits until it has booted that many times, and its witness works.
    ///
    /// # Errors
    /// When it does not, with what it printed.
    pub fn wait_up_times(&self, host: &Host, times: usize) -> Result<()> {
        let mut printed = String::new();
        wait::patiently(&format!("boot {times} of {}", self.name), || {
            let state = host.state_of(self.name)?;
            printed = host.guest_log(self.name)?;
            let last_boot = printed.match_indices(UP).nth(times - 1);
            if last_boot.is_some_and(|(at, _)| heartbeats(&printed[at..]) > 1) {
                return Ok(Some(()));
            }
            ensure!(state.as_deref() == Some("running"), "{} is {state:?}", self.name);
            Ok(None)
        })
        .with_context(|| format!("{} printed\n{printed}", self.name))
    }

    /// Runs a command in it, over the network from `host`; what it printed.
    ///
    /// # Errors
    /// When the guest can't be reached.
    pub fn shell(&self, host: &Host, command: &str) -> Result<String> {
        let input = format!("{command}\necho; echo ended\nexit\n");
        let words = ["/lab/busybox", "nc", self.address(), SHELL];
        let printed = host.exec_with(&words, Some(&input))?.ok()?.stdout;
        let (printed, _) = printed.rsplit_once("\nended").with_context(|| {
            format!("the guest did not run {command} to its end; it printed {printed}")
        })?;
        Ok(printed.to_owned())
    }

    /// Checks that it runs at `host` and goes on: it prints a further heartbeat.
    ///
    /// # Errors
    /// When it does not.
    pub fn expect_alive(&self, host: &Host) -> Result<()> {
        let state = host.state_of(self.name)?;
        ensure!(state.as_deref() == Some("running"), "{} is {state:?}", self.name);
        let before = heartbeats(&host.guest_log(self.name)?);
        wait::patiently(&format!("a heartbeat of {}", self.name), || {
            let now = heartbeats(&host.guest_log(self.name)?);
            Ok((now > before).then_some(()))
        })
    }
}

/// How many heartbeats are in a log.
fn heartbeats(log: &str) -> usize {
    log.matches("witness beat=").count()
}
