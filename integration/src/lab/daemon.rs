//! `migrd` in a host, and `migctl` against it.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::host::Host;
use super::qemu::Accelerator;
use super::settings::NETWORK;
use crate::binaries::Program;
use crate::migctl::Ran;
use crate::wait;

/// The daemon's state directory in a host.
pub const STATE: &str = "/lab/disk/migr";
/// Its log.
pub const LOG: &str = "/lab/disk/migrd.log";
/// Its process id.
const PID: &str = "/run/migrd.pid";

impl Host {
    /// Starts `migrd` and waits until it serves.
    ///
    /// # Errors
    /// When it ends instead, with what it logged.
    pub fn start_migrd(&self, options: &[&str]) -> Result<()> {
        self.start_program(Program::Migrd, options, &[])
    }

    /// Starts a `migrd` that stops dead (SIGSTOP) when it first reaches the
    /// failpoint.
    ///
    /// # Errors
    /// When it ends instead, with what it logged.
    pub fn start_migrd_halting_at(&self, point: &str) -> Result<()> {
        self.start_program(Program::MigrdFailpoints, &[], &[("MIGR_HALT_AT", point)])
    }

    fn start_program(
        &self,
        program: Program,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<()> {
        let program = program.path()?.display().to_string();
        let listen = self.number().migrd().to_string();
        let fixed = [
            &program,
            "serve",
            "--insecure",
            "--trust-network",
            NETWORK,
            "--listen",
            &listen,
            "--state-dir",
            STATE,
        ];
        let words = [&fixed[..], options].concat();
        let logging = [("NO_COLOR", "1"), ("MIGRD_LOG", "info,migrd=debug")];
        let pid = self.spawn(&words, &[&logging[..], environment].concat(), LOG)?;
        self.sh(&format!("echo {pid} > {PID}"))?;
        wait::patiently(&format!("migrd at {listen}"), || {
            let asked = self.migctl(&["-o", "json", "hosts"])?;
            if asked.status == 0 {
                return Ok(Some(()));
            }
            let alive = self.exec(&["kill", "-0", &pid.to_string()])?.status == 0;
            ensure!(alive, "migrd ended in host {}:\n{}", self.number(), self.migrd_log());
            Ok(None)
        })
    }

    /// Sends the daemon a signal, as `kill` names it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal_migrd(&self, signal: &str) -> Result<()> {
        self.sh(&format!("kill -{signal} $(cat {PID})")).map(drop)
    }

    /// Waits until the daemon stands still at its failpoint.
    ///
    /// # Errors
    /// When it never does.
    pub fn wait_halted(&self) -> Result<()> {
        wait::patiently(&format!("migrd in host {} to stand still", self.number()), || {
            let state = self.sh(&format!("sed 's/.*) //; s/ .*//' /proc/$(cat {PID})/stat"))?;
            Ok((state.trim() == "T").then_some(()))
        })
    }

    /// Waits until a daemon that was asked to end has.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_migrd_ended(&self) -> Result<()> {
        wait::patiently(&format!("migrd in host {} to end", self.number()), || {
            let alive = self.exec(&["sh", "-c", &format!("kill -0 $(cat {PID})")])?.status == 0;
            Ok((!alive).then_some(()))
        })
    }

    /// What the daemon has logged, over all its lives.
    #[must_use]
    pub fn migrd_log(&self) -> String {
        self.sh(&format!("cat {LOG}")).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Runs `migctl` in the host against its own daemon.
    ///
    /// # Errors
    /// When that can't be started; not when it fails.
    pub fn migctl(&self, arguments: &[&str]) -> Result<Ran> {
        self.migctl_with(arguments, None)
    }

    /// The same, with input.
    ///
    /// # Errors
    /// When that can't be started; not when it fails.
    pub fn migctl_with(&self, arguments: &[&str], input: Option<&str>) -> Result<Ran> {
        let program = Program::Migctl.path()?.display().to_string();
        let address = self.number().migrd().to_string();
        let words = [&[&program, "--host", &address], arguments].concat();
        self.exec_with(&words, input)
    }

    /// The object that `migctl` printed, which must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        self.migctl(&[&["-o", "json"], arguments].concat())?.ok()?.json()
    }

    /// The state of a workload; none when this host does not have it.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn state_of(&self, name: &str) -> Result<Option<String>> {
        let list = self.ask(&["list"])?;
        let workloads = list["workloads"].as_array().context("list printed no workloads")?;
        let found = workloads.iter().find(|workload| workload["name"] == name);
        Ok(found.and_then(|workload| workload["state"].as_str()).map(ToOwned::to_owned))
    }

    /// Moves a workload to another host; the report of a move that completed.
    ///
    /// # Errors
    /// When it did not complete.
    pub fn migrate(&self, name: &str, to: &Host, options: &[&str]) -> Result<Value> {
        let to = to.number().migrd().to_string();
        let patience = Accelerator::of_this_machine().patience();
        let report = self.ask(&[&["migrate", name, "--to", &to], options, patience].concat())?;
        if report["outcome"] != "completed" {
            bail!("the move of {name} from host {} to {to}: {report}", self.number());
        }
        Ok(report)
    }

    /// What the guest has printed.
    ///
    /// # Errors
    /// When the daemon does not have it.
    pub fn guest_log(&self, name: &str) -> Result<String> {
        Ok(self.migctl(&["logs", name])?.ok()?.stdout)
    }

    /// Waits until the guest has printed `text`; all that it printed.
    ///
    /// # Errors
    /// When it never does, with what it printed instead.
    pub fn wait_for_output(&self, name: &str, text: &str) -> Result<String> {
        let mut seen = String::new();
        let found = wait::patiently(&format!("{name} to print {text:?}"), || {
            seen = self.guest_log(name)?;
            Ok(seen.contains(text).then_some(()))
        });
        found.with_context(|| format!("it printed\n{}", super::host::tail(&seen, 40)))?;
        Ok(seen)
    }
}
