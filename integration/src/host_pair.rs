//! Hosts that move VMs between each other, all on this machine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::{Daemon, write_pulse};
use crate::leaks;
use crate::migctl::Ran;
use crate::wait;

/// Two daemons and the guest they run. Everything of them goes when it is
/// dropped.
#[derive(Debug)]
pub struct HostPair {
    /// Where scenarios begin.
    pub a: Daemon,
    /// Where they usually move to.
    pub b: Daemon,
    kernel: PathBuf,
    directory: TempDir,
}

impl HostPair {
    /// Waits until exactly one host has the workload, running; whether that is `a`.
    ///
    /// # Errors
    /// When both run it, or nobody does.
    pub fn runs_at_a(&self, name: &str) -> Result<bool> {
        let mut seen = String::new();
        let at_a = wait::until("one host to run it", || {
            let states = (self.a.state_of(name)?, self.b.state_of(name)?);
            seen = format!("{states:?}");
            Ok(match (states.0.as_deref(), states.1.as_deref()) {
                (Some("running"), Some("running")) => bail!("both hosts run it"),
                (Some("running"), None) => Some(true),
                (None, Some("running")) => Some(false),
                _ => None,
            })
        });
        at_a.with_context(|| format!("states of it: {seen}"))
    }

    /// Two daemons that serve.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn start() -> Result<Self> {
        let mut pair = Self::prepare()?;
        pair.a.start()?;
        pair.b.start()?;
        Ok(pair)
    }

    /// Two daemons that are not started yet.
    ///
    /// # Errors
    /// When there is no room for them, or no KVM.
    pub fn prepare() -> Result<Self> {
        ensure!(
            Path::new("/dev/kvm").exists(),
            "these scenarios run on real KVM and /dev/kvm is missing: load kvm_intel or kvm_amd"
        );
        eprintln!("runs on: real KVM");
        Self::without_kvm()
    }

    /// The same, for workloads that need no KVM.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn without_kvm() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("migr-").tempdir()?;
        let kernel = write_pulse(directory.path())?;
        let a = Daemon::new("a", directory.path())?;
        let b = Daemon::new("b", directory.path())?;
        Ok(Self { a, b, kernel, directory })
    }

    /// The pulse image.
    #[must_use]
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// A directory that goes with the pair.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Moves `name` from `a` to `b` and checks that it completed.
    ///
    /// # Errors
    /// When it did not.
    pub fn there(&self, name: &str, options: &[&str]) -> Result<Value> {
        migrate(&self.a, &self.b, name, options)?.ok()?.json()
    }

    /// Moves `name` from `b` to `a` and checks that it completed.
    ///
    /// # Errors
    /// When it did not.
    pub fn back(&self, name: &str, options: &[&str]) -> Result<Value> {
        migrate(&self.b, &self.a, name, options)?.ok()?.json()
    }

    /// Removes `name` from wherever it is and checks that nothing of any
    /// workload is left on either host.
    ///
    /// # Errors
    /// Saying what is left.
    pub fn finish(&self, name: &str) -> Result<()> {
        for daemon in [&self.a, &self.b] {
            match daemon.state_of(name)?.as_deref() {
                None | Some("gone") => continue,
                Some("stopped") => {}
                Some(_) => drop(daemon.migctl(&["stop", name, "--force"])?.ok()?),
            }
            daemon.migctl(&["rm", name])?.ok()?;
        }
        leaks::expect_nothing_left(&self.a)?;
        leaks::expect_nothing_left(&self.b)?;
        self.a.done();
        self.b.done();
        Ok(())
    }
}

/// Moves `name`; the `migctl` that ended, however it ended.
///
/// # Errors
/// When it can't be run.
pub fn migrate(from: &Daemon, to: &Daemon, name: &str, options: &[&str]) -> Result<Ran> {
    let to = to.to();
    let args = [&["-o", "json", "migrate", name, "--to", &to], options].concat();
    from.migctl(&args)
}
