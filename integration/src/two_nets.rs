//! Two hosts with networks of their own, on this machine: two network namespaces,
//! in each a bridge `br0`, and a veth pair that is a port of both.
//!
//! Host A's namespace is the one of the thread that runs a test, so everything it
//! starts is there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::process::left;
use crate::wait;

/// The network that the hosts and their workloads are in.
pub const NETWORK: &str = "10.98.0.0/24";
/// The bridge of each host.
pub const BRIDGE: &str = "br0";
/// Host A's port towards host B.
const CABLE: &str = "cable-a";

/// A host's end of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the test runs.
    A,
    /// The other.
    B,
}

impl Side {
    /// The one that this is not.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// Both hosts. Everything of them goes when it is dropped.
#[derive(Debug)]
pub struct TwoNets {
    /// 10.98.0.1.
    pub a: Daemon,
    /// 10.98.0.2.
    pub b: Daemon,
    /// Keeps B's namespace, and ends with its standard input.
    holder: Child,
    directory: TempDir,
}

/// Runs `test` on two hosts that nobody else is on.
///
/// # Errors
/// Those of the test, or of making the hosts.
pub fn on_two_hosts<T: Send + 'static>(
    test: impl FnOnce(&mut TwoNets) -> Result<T> + Send + 'static,
) -> Result<T> {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).context("run the tests as root")?;
        test(&mut TwoNets::prepare()?)
    });
    thread.join().expect("the test does not panic")
}

impl TwoNets {
    fn prepare() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("migr-").tempdir()?;
        let mut holder = Command::new("unshare");
        holder.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let holder = holder.spawn().context("install util-linux")?;
        let mut a = Daemon::new("a", directory.path())?;
        let mut b = Daemon::new("b", directory.path())?;
        a.listen_in(NETWORK, "10.98.0.1:7070".parse()?, None);
        b.listen_in(NETWORK, "10.98.0.2:7070".parse()?, Some(holder.id()));
        let nets = Self { a, b, holder, directory };
        nets.lay_cables()?;
        Ok(nets)
    }

    fn lay_cables(&self) -> Result<()> {
        let own = fs::read_link("/proc/thread-self/ns/net")?;
        let theirs = format!("/proc/{}/ns/net", self.holder.id());
        // It starts in this one, and leaves it.
        wait::until("a namespace for host B", || {
            Ok((fs::read_link(&theirs)? != own).then_some(()))
        })?;
        let b = self.holder.id();
        self.ip(Side::A, &format!("link add {CABLE} type veth peer name cable-b netns {b}"))?;
        for (side, cable, address) in [(Side::A, CABLE, 1), (Side::B, "cable-b", 2)] {
            self.ip(side, "link set lo up")?;
            self.ip(side, &format!("link add {BRIDGE} type bridge forward_delay 0"))?;
            self.ip(side, &format!("link set {cable} master {BRIDGE} up"))?;
            self.ip(side, &format!("addr add 10.98.0.{address}/24 dev {BRIDGE}"))?;
            self.ip(side, &format!("link set {BRIDGE} up"))?;
        }
        Ok(())
    }

    /// Starts both daemons.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn start(&mut self) -> Result<()> {
        self.a.start()?;
        self.b.start()
    }

    /// A command that runs on a host.
    #[must_use]
    pub fn command(&self, side: Side, program: &str) -> Command {
        match side {
            Side::A => Command::new(program),
            Side::B => within(self.holder.id(), Path::new(program)),
        }
    }

    /// Runs `ip` on a host; what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn ip(&self, side: Side, args: &str) -> Result<String> {
        let ran = self.command(side, "ip").args(args.split(' ')).output();
        let ran = ran.context("install iproute2")?;
        let said = String::from_utf8_lossy(&ran.stderr);
        ensure!(ran.status.success(), "ip {args} on host {side:?}: {said}");
        Ok(String::from_utf8(ran.stdout)?)
    }

    /// Pulls the cable between the hosts, or puts it in again.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn connect(&self, connected: bool) -> Result<()> {
        let state = if connected { "up" } else { "down" };
        self.ip(Side::A, &format!("link set {CABLE} {state}"))?;
        if connected {
            // Who was looked for in vain meanwhile is not looked for again at once.
            for side in [Side::A, Side::B] {
                self.ip(side, "neigh flush all")?;
            }
        }
        Ok(())
    }

    /// A directory that goes with the hosts.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The daemon of a host.
    #[must_use]
    pub fn daemon_mut(&mut self, side: Side) -> &mut Daemon {
        match side {
            Side::A => &mut self.a,
            Side::B => &mut self.b,
        }
    }

    /// The same, to look at.
    #[must_use]
    pub fn daemon(&self, side: Side) -> &Daemon {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// Ends a workload and checks that nothing of any stays on either host.
    ///
    /// # Errors
    /// Saying what is left.
    pub fn remove(&self, at: Side, name: &str) -> Result<()> {
        let host = self.daemon(at);
        if host.state_of(name)?.as_deref() != Some("stopped") {
            host.migctl(&["stop", name, "--force"])?.ok()?;
        }
        host.migctl(&["rm", name])?.ok()?;
        self.expect_nothing_left(Side::A)?;
        self.expect_nothing_left(Side::B)?;
        self.a.done();
        self.b.done();
        Ok(())
    }

    /// Checks that nothing of any process tree is on a host: no interface, filter,
    /// cgroup or directory, and no network namespace that its daemon holds.
    ///
    /// # Errors
    /// Saying what is left.
    pub fn expect_nothing_left(&self, side: Side) -> Result<()> {
        let mut left = Vec::new();
        let clean = wait::until("nothing to be left", || {
            left = self.what_is_left(side)?;
            Ok(left.is_empty().then_some(()))
        });
        clean.with_context(|| format!("left on host {side:?}: {left:?}"))
    }

    fn what_is_left(&self, side: Side) -> Result<Vec<String>> {
        let daemon = self.daemon(side);
        let mut left = Vec::new();
        let links = self.ip(side, "-o link")?;
        left.extend(links.lines().filter(|line| line.contains(": mgp")).map(ToOwned::to_owned));
        for table in ["ip_tables_names", "ip6_tables_names", "arp_tables_names"] {
            let file = format!("/proc/{}/net/{table}", daemon.pid()?);
            match fs::read_to_string(&file) {
                Ok(tables) if !tables.is_empty() => left.push(format!("{table}: {tables}")),
                // A kernel that has none of these filters.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        let host = daemon.ask(&["hosts"])?;
        let host = host["hosts"][0]["host_id"].as_str().context("no host_id")?.to_owned();
        let start = host.get(..8).context("a short host_id")?;
        left.extend(cgroups(&format!("migr-{start}-"))?);
        for parent in ["processes", "containers", "runc"] {
            let workloads = paths_in(&daemon.state_dir().join(parent))?;
            left.extend(workloads.iter().map(|path| path.display().to_string()));
        }
        let open = paths_in(Path::new(&format!("/proc/{}/fd", daemon.pid()?)))?;
        let open = open.iter().filter_map(|fd| fs::read_link(fd).ok());
        left.extend(open.map(|to| to.display().to_string()).filter(|to| to.starts_with("net:")));
        let keepers = left::keepers(daemon.state_dir());
        left.extend(keepers.iter().map(|keeper| format!("keeper {}", keeper.pid)));
        Ok(left)
    }
}

impl Drop for TwoNets {
    fn drop(&mut self) {
        // Of a test that failed: its workloads outlive the daemons.
        let _ = self.connect(true);
        for daemon in [&self.a, &self.b] {
            let _ = daemon.go_on();
            for workload in daemon.workloads().unwrap_or_default() {
                if let Some(name) = workload["name"].as_str() {
                    let _ = daemon.migctl(&["stop", name, "--force"]);
                }
            }
        }
        // It may have ended already, which is as good.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A command that runs in the network of the process `pid`.
#[must_use]
pub fn within(pid: u32, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{pid}/ns/net")).arg("--").arg(program);
    command
}

fn paths_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// The cgroups of this machine whose names begin so.
fn cgroups(start: &str) -> Result<Vec<String>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut root = root.filter(|fields| fields.get(2) == Some(&"cgroup2"));
    let root = root.next().context("mount a cgroup v2")?;
    let names = paths_in(Path::new(root[1]))?;
    let names = names.iter().filter_map(|path| path.file_name()?.to_str());
    Ok(names.filter(|name| name.starts_with(start)).map(ToOwned::to_owned).collect())
}
