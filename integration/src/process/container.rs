//! Containers: small bundles of busybox, and what runc and the kernel know of them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Counter;
use crate::daemon::Daemon;
use crate::migctl::Ran;

/// The container's name in the tests.
pub const NAME: &str = "web";
/// Where its server listens.
pub const PORT: u16 = 7000;
/// Its limit of memory, in bytes.
pub const MEMORY: u64 = 96 << 20;
/// Its limit of processes.
pub const PIDS: u64 = 50;
/// What busybox is in it.
const APPLETS: [&str; 4] = ["sh", "cat", "nc", "sleep"];
/// Answers connections with what they say, and counts.
const PROGRAM: &str = "nc -ll -p 7000 -e /bin/cat & \
                       i=0; while :; do i=$((i+1)); echo count $i; sleep 0.05; done";

/// What reads its log: every number once and in order.
#[must_use]
pub fn counter() -> Counter {
    Counter { name: NAME, memory: 0, depth: 0, threads: 0 }
}

/// A bundle on this machine.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Its directory.
    pub path: PathBuf,
}

impl Bundle {
    /// One below `directory` whose container counts and serves.
    ///
    /// # Errors
    /// When there is no busybox to make it of.
    pub fn make(directory: &Path) -> Result<Self> {
        let path = directory.join("bundle");
        let bin = path.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        for empty in ["dev", "proc", "sys", "tmp", "data"] {
            fs::create_dir(path.join("rootfs").join(empty))?;
        }
        fs::create_dir(path.join("data"))?;
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|p| fs::exists(p).unwrap_or(false));
        let busybox = busybox.context("install busybox-static: containers are made of it")?;
        fs::copy(busybox, bin.join("busybox"))?;
        for applet in APPLETS {
            symlink("busybox", bin.join(applet))?;
        }
        let bundle = Self { path };
        bundle.write(&spec(PROGRAM))?;
        Ok(bundle)
    }

    /// Its root file system.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// What it is made of now.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn spec(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.path.join("config.json"))?)?)
    }

    /// Makes it of something else.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, spec: &Value) -> Result<()> {
        Ok(fs::write(self.path.join("config.json"), serde_json::to_vec_pretty(spec)?)?)
    }

    /// Starts it as a workload; how that ended.
    ///
    /// # Errors
    /// When `migctl` can't be run.
    pub fn start(&self, host: &Daemon, options: &[&str]) -> Result<Ran> {
        let path = self.path.to_str().context("a directory with an odd name")?;
        host.migctl(&[&["run-container", NAME, "--bundle", path], options].concat())
    }

    /// The same, until it counts.
    ///
    /// # Errors
    /// When it does not.
    pub fn run(&self, host: &Daemon, options: &[&str]) -> Result<()> {
        self.start(host, options)?.ok()?;
        counter().counts(host, 1)?;
        Ok(())
    }
}

/// The specification of a container that runs `program` in a shell.
#[must_use]
pub fn spec(program: &str) -> Value {
    let own = ["pid", "mount", "ipc", "uts", "network"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "hostname": "box",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", program],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
            {"destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "rw"]},
        ],
        "linux": {
            "namespaces": own,
            "resources": {"memory": {"limit": MEMORY}, "pids": {"limit": PIDS}},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["ptrace", "reboot"], "action": "SCMP_ACT_ERRNO"}],
            },
        },
    })
}

/// Runs the runc that knows the host's containers.
///
/// # Errors
/// When there is none.
pub fn runc(host: &Daemon, args: &[&str]) -> Result<Output> {
    let mut command = Command::new("runc");
    command.arg("--root").arg(host.state_dir().join("runc")).args(args);
    command.output().context("install runc: containers are made by it")
}

/// What `inspect` says of the container.
///
/// # Errors
/// When it is not there.
pub fn inspect(host: &Daemon) -> Result<Value> {
    host.ask(&["inspect", NAME])
}

/// What runc calls it, and its first process.
///
/// # Errors
/// When it is not there.
pub fn identity(host: &Daemon) -> Result<(String, u32)> {
    let said = inspect(host)?;
    let process = &said["process"];
    let id = process["container"]["runc_id"].as_str();
    let pid = process["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    Ok((id.with_context(|| said.to_string())?.to_owned(), pid.with_context(|| said.to_string())?))
}

/// Checks that it lives at `host` as it should: runc knows it, can start something in
/// it, and its limits and its seccomp filter are there.
///
/// # Errors
/// Saying what is not.
pub fn is_whole(host: &Daemon) -> Result<()> {
    let (id, pid) = identity(host)?;
    let listed = runc(host, &["list", "--format", "json"])?;
    let listed: Value = serde_json::from_slice(&listed.stdout)?;
    let known = listed.as_array().is_some_and(|all| {
        all.len() == 1 && all[0]["id"] == id.as_str() && all[0]["status"] == "running"
    });
    ensure!(known && listed[0]["pid"] == pid, "runc lists {listed}");
    let said = runc(host, &["exec", &id, "/bin/busybox", "hostname"])?;
    ensure!(said.status.success() && said.stdout == b"box\n", "runc exec: {said:?}");
    ensure!(limit(pid, "memory")? == MEMORY, "memory: {}", limit(pid, "memory")?);
    ensure!(limit(pid, "pids")? == PIDS, "pids: {}", limit(pid, "pids")?);
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(status.lines().any(|line| line == "Seccomp:\t2"), "no filter: {status}");
    Ok(())
}

/// A limit of the cgroup that a process is in.
fn limit(pid: u32, controller: &str) -> Result<u64> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut of_v2 = None;
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        if controllers.split(',').any(|name| name == controller) {
            let root = mount(&mounts, "cgroup", controller)?;
            let name = if controller == "memory" { "memory.limit_in_bytes" } else { "pids.max" };
            return number(&root.join(path.trim_start_matches('/')).join(name));
        }
        if controllers.is_empty() {
            of_v2 = Some(path.trim_start_matches('/').to_owned());
        }
    }
    let path = of_v2.context("it is in no cgroup")?;
    number(&mount(&mounts, "cgroup2", "")?.join(path).join(format!("{controller}.max")))
}

fn mount(mounts: &str, kind: &str, option: &str) -> Result<PathBuf> {
    let found = mounts.lines().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let options = words.get(3)?.split(',').any(|has| has == option) || option.is_empty();
        (words.get(2) == Some(&kind) && options).then(|| PathBuf::from(words[1]))
    });
    found.with_context(|| format!("no {kind} with {option:?} is mounted"))
}

fn number(file: &Path) -> Result<u64> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Ok(text.trim().parse()?)
}
