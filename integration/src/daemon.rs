//! One `migrd serve` with a state directory of its own.

use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::binaries::Program;
use crate::migctl::{Ran, Running};
use crate::process::left;
use crate::{leaks, two_nets, wait};

/// The port of every daemon; their addresses differ.
const PORT: u16 = 7070;

/// A daemon. Dropping it ends it and the workloads it has started.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    address: SocketAddr,
    state_dir: PathBuf,
    log: PathBuf,
    program: Program,
    halt_at: Option<String>,
    /// Where it waits, and the file as long as which is there.
    waits: Option<(String, PathBuf)>,
    before: Option<String>,
    criu: Option<PathBuf>,
    /// Its runc, unless it is the one in PATH.
    runc: Option<PathBuf>,
    /// The network it trusts.
    trusted: Option<String>,
    /// The process in whose network it runs.
    network_of: Option<u32>,
    done: AtomicBool,
    process: Option<Child>,
}

impl Daemon {
    /// A daemon that is not started yet, with everything of it below
    /// `directory`, which must exist.
    ///
    /// # Errors
    /// When no address is free.
    pub fn new(name: &str, directory: &Path) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            address: free_address()?,
            state_dir: directory.join(name),
            log: directory.join(format!("{name}.log")),
            program: Program::Migrd,
            halt_at: None,
            waits: None,
            before: None,
            criu: None,
            runc: None,
            trusted: None,
            network_of: None,
            done: AtomicBool::new(false),
            process: None,
        })
    }

    /// Makes the next start stop dead (SIGSTOP) when it first reaches the
    /// failpoint; `None` for a daemon as users have it.
    pub fn halt_at(&mut self, point: Option<&str>) {
        self.halt_at = point.map(ToOwned::to_owned);
        self.program = if point.is_some() { Program::MigrdFailpoints } else { Program::Migrd };
    }

    /// Makes the next start wait wherever it reaches the place, as long as there is a file:
    /// that file, which is there now.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn wait_at(&mut self, place: &str) -> Result<PathBuf> {
        let file = self.state_dir.with_extension("waits");
        File::create(&file)?;
        self.waits = Some((place.to_owned(), file.clone()));
        self.program = Program::MigrdFailpoints;
        Ok(file)
    }

    /// Runs `script` in a mount namespace of the daemon's own before it starts;
    /// `$STATE` is the state directory.
    pub fn before(&mut self, script: &str) {
        self.before = Some(script.to_owned());
    }

    /// Makes it use that CRIU from its next start on.
    pub fn criu(&mut self, path: &Path) {
        self.criu = Some(path.to_owned());
    }

    /// Makes it use that runc from its next start on.
    pub fn runc(&mut self, path: &Path) {
        self.runc = Some(path.to_owned());
    }

    /// Has it listen at `address`, which is in the network that it trusts: in the
    /// network namespace of a process, or in the caller's.
    pub fn listen_in(&mut self, trusted: &str, address: SocketAddr, network_of: Option<u32>) {
        self.address = address;
        self.trusted = Some(trusted.to_owned());
        self.network_of = network_of;
    }

    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// When it ends instead, with what it logged.
    pub fn start(&mut self) -> Result<()> {
        let process = self.spawn()?;
        self.process = Some(process);
        wait::until(&format!("{} to serve at {}", self.name, self.address), || {
            if let Some(status) = self.exited()? {
                bail!("{} ended with {status}:\n{}", self.name, self.log());
            }
            Ok(TcpStream::connect(self.address).ok())
        })?;
        self.migctl(&["-o", "json", "hosts"])?.ok()?;
        Ok(())
    }

    /// Starts it, expecting that it refuses; what it logged.
    ///
    /// # Errors
    /// When it does not end with a failure.
    pub fn start_refused(&mut self) -> Result<String> {
        let mut process = self.spawn()?;
        let status = wait::until("the daemon to give up", || Ok(process.try_wait()?));
        let status = status.inspect_err(|_| {
            let _ = process.kill();
            let _ = process.wait();
        })?;
        ensure!(!status.success(), "{} ended well:\n{}", self.name, self.log());
        Ok(self.log())
    }

    fn spawn(&self) -> Result<Child> {
        ensure!(self.process.is_none(), "{} runs already", self.name);
        let program = self.program.path()?;
        let mut command = match (&self.before, self.network_of) {
            (None, None) => Command::new(&program),
            (None, Some(pid)) => two_nets::within(pid, &program),
            (Some(script), network) => {
                fs::create_dir_all(&self.state_dir)?;
                let unshare = Path::new("unshare");
                let within = |pid| two_nets::within(pid, unshare);
                let mut command = network.map_or_else(|| Command::new(unshare), within);
                let script = format!("set -e; {script}; exec \"$@\"");
                command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"]);
                command.arg(&program).env("STATE", &self.state_dir);
                command
            }
        };
        command.args(["serve", "--insecure", "--listen"]).arg(self.address.to_string());
        command.arg("--state-dir").arg(&self.state_dir);
        if let Some(criu) = &self.criu {
            command.arg("--criu").arg(criu);
        }
        if let Some(runc) = &self.runc {
            command.arg("--runc").arg(runc);
        }
        if let Some(network) = &self.trusted {
            command.args(["--trust-network", network]);
        }
        command
            .env_remove("MIGR_HALT_AT")
            .env("NO_COLOR", "1")
            .env("MIGRD_LOG", "info,migrd=debug");
        if let Some(point) = &self.halt_at {
            command.env("MIGR_HALT_AT", point);
        }
        if let Some((place, file)) = &self.waits {
            command.env("MIGR_WAIT_AT", place).env("MIGR_WAIT_WHILE", file);
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Ctrl-C on a terminal is for the program that runs the daemons: it
        // ends them in order.
        command.process_group(0);
        command.spawn().with_context(|| format!("start {}", program.display()))
    }

    fn exited(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.process {
            Some(process) => Ok(process.try_wait()?),
            None => Ok(None),
        }
    }

    /// Its process id.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self) -> Result<u32> {
        self.process.as_ref().map(Child::id).with_context(|| format!("{} is down", self.name))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid()?)?);
        kill(pid, signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// Ends it as a crash would. Its VMs live on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        if let Some(mut process) = self.process.take() {
            process.wait()?;
        }
        Ok(())
    }

    /// Asks it to end and waits until it has. Its VMs live on.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let status = self.wait_ended()?;
        ensure!(status.success(), "{} ended with {status}:\n{}", self.name, self.log());
        Ok(())
    }

    /// Waits for the end of one that was asked to end already.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait_ended(&mut self) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        let status = wait::until(&what, || self.exited())?;
        self.process = None;
        Ok(status)
    }

    /// Kills it and starts it again, as users have it.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            self.kill()?;
        }
        self.halt_at(None);
        self.waits = None;
        self.start()
    }

    /// Waits until it stands still at its failpoint.
    ///
    /// # Errors
    /// When it never does.
    pub fn wait_halted(&mut self) -> Result<()> {
        let point = self.halt_at.clone().context("no failpoint was set")?;
        wait::until(&format!("{} to reach {point}", self.name), || {
            if let Some(status) = self.exited()? {
                bail!("{} ended with {status}:\n{}", self.name, self.log());
            }
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()?))?;
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            Ok((state == Some('T')).then_some(()))
        })
    }

    /// Lets it go on from its failpoint.
    ///
    /// # Errors
    /// When it does not run.
    pub fn go_on(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as an argument.
    #[must_use]
    pub fn to(&self) -> String {
        self.address.to_string()
    }

    /// Its state directory.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Everything went well: nobody needs to see its log at its end.
    pub fn done(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    /// All it has logged, over its restarts.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Runs a `migctl` against it.
    ///
    /// # Errors
    /// When that can't be started or never ends; not when it fails.
    pub fn migctl(&self, args: &[&str]) -> Result<Ran> {
        Running::start(self.address, args, None)?.wait()
    }

    /// Starts a `migctl` against it.
    ///
    /// # Errors
    /// When that can't be started.
    pub fn start_migctl(&self, args: &[&str]) -> Result<Running> {
        Running::start(self.address, args, None)
    }

    /// The object that a `migctl` printed, which must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn ask(&self, args: &[&str]) -> Result<Value> {
        let args = [&["-o", "json"], args].concat();
        self.migctl(&args)?.ok()?.json()
    }

    /// Its workloads, by `list`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn workloads(&self) -> Result<Vec<Value>> {
        let list = self.ask(&["list"])?;
        Ok(list["workloads"].as_array().cloned().unwrap_or_default())
    }

    /// The state of a workload; none when it does not have it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn state_of(&self, name: &str) -> Result<Option<String>> {
        let all = self.workloads()?;
        let found = all.iter().find(|workload| workload["name"] == name);
        Ok(found.and_then(|workload| workload["state"].as_str()).map(ToOwned::to_owned))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.done.load(Ordering::Relaxed) {
            eprintln!("--- {} at {}\n{}", self.name, self.address, self.log());
        }
        if self.process.is_some() {
            // Nothing is left to do when it has died by itself.
            let _ = self.kill();
        }
        if let Err(error) = leaks::kill_vms(&self.state_dir) {
            eprintln!("VMs of {} stay behind: {error:#}", self.name);
        }
        if let Err(error) = left::kill_trees(&self.state_dir) {
            eprintln!("processes of {} stay behind: {error:#}", self.name);
        }
    }
}

/// A loopback address whose port is free and that nothing else here uses: each
/// daemon gets an IP address of its own out of 127.0.0.0/8, so that it can be
/// restarted at its port at any time.
///
/// # Errors
/// When none is found.
pub fn free_address() -> Result<SocketAddr> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let seed = std::process::id().wrapping_mul(64);
    for _ in 0..64 {
        let number = seed.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) & 0x00ff_ffff;
        let address = SocketAddr::from((Ipv4Addr::from_bits(0x7f00_0000 | number), PORT));
        let usable = number & 0xff != 0 && number & 0xff != 0xff && number != 1;
        if usable && TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no loopback address has port {PORT} free")
}

/// Writes the pulse guest where a daemon can read it.
///
/// # Errors
/// Those of writing.
pub fn write_pulse(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("pulse.elf");
    pulse::write_image(&path).with_context(|| format!("write {}", path.display()))?;
    File::open(&path)?;
    Ok(path)
}
