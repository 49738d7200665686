//! A server with a network of its own, as a workload, and clients that notice what a
//! move must not do to their connections.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::container::{self, Bundle};
use super::{PYTHON, wait_for_line};
use crate::two_nets::{BRIDGE, Side, TwoNets};
use crate::wait;

/// What the server is called as a workload.
pub const NAME: &str = "echo";
/// Its address, which goes where it goes.
pub const ADDRESS: &str = "10.98.0.50";
/// Its port.
pub const PORT: &str = "7000";
/// Answers checksummed messages; each has it verify a part of its memory.
const SERVER: &str = include_str!("server.py");
/// Sends them, many at a time, and verifies the answers.
const CLIENT: &str = include_str!("client.py");
/// The same over many connections, one at a time on each.
const CROWD: &str = include_str!("crowd.py");
/// Answers to one client after which the server has verified all of its memory once
/// more: one for each block of it, and as many as a client has under way.
pub const WHOLE_MEMORY: u64 = 128 + 64;

/// A Python program on a host, beside the workloads. Killed when dropped.
#[derive(Debug)]
pub struct Beside {
    name: String,
    child: Child,
    output: PathBuf,
    /// That it has to the server.
    connections: usize,
}

impl Beside {
    /// Starts it. There is room for one on each host.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(nets: &TwoNets, side: Side, script: &str, args: &[&str]) -> Result<Self> {
        Self::start_as(&format!("{side:?}"), nets, side, script, args)
    }

    fn start_as(
        file: &str,
        nets: &TwoNets,
        side: Side,
        script: &str,
        args: &[&str],
    ) -> Result<Self> {
        let name = format!("program on host {side:?}");
        let output = nets.directory().join(format!("{file}.out"));
        let mut command = nets.command(side, PYTHON);
        command.args(["-c", script]).args(args);
        command.stdin(Stdio::piped()).stdout(File::create(&output)?);
        let child = command.spawn().with_context(|| format!("start {PYTHON}"))?;
        Ok(Self { name, child, output, connections: 1 })
    }

    /// A client of the server that [`Kind::serve`] starts.
    ///
    /// # Errors
    /// When it does not start.
    pub fn client(nets: &TwoNets, side: Side) -> Result<Self> {
        Self::client_of(nets, side, ADDRESS)
    }

    /// The same, of a server with another address.
    ///
    /// # Errors
    /// When it does not start.
    pub fn client_of(nets: &TwoNets, side: Side, address: &str) -> Result<Self> {
        Self::start(nets, side, CLIENT, &[address, PORT])
    }

    /// One with that many connections, beside the program that there is room for.
    ///
    /// # Errors
    /// When it does not start.
    pub fn crowd(nets: &TwoNets, side: Side, connections: usize) -> Result<Self> {
        let count = connections.to_string();
        let file = format!("crowd-{side:?}");
        let mut started = Self::start_as(&file, nets, side, CROWD, &[ADDRESS, PORT, &count])?;
        started.connections = connections;
        Ok(started)
    }

    /// All it has printed.
    ///
    /// # Errors
    /// When that can't be read.
    pub fn said(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.output)?)
    }

    /// Its standard input, which ends when that is dropped.
    pub fn input(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The answers a client has got so far.
    ///
    /// # Errors
    /// When something was wrong, or it has ended.
    pub fn answers(&mut self) -> Result<u64> {
        let said = self.said()?;
        if said.contains("WRONG") || self.child.try_wait()?.is_some() {
            bail!("{}: {}", self.name, said.lines().last().unwrap_or("it ended"));
        }
        Ok(answers(&said).last().map_or(0, |(number, _)| number))
    }

    /// Waits until a client has got `more` further answers.
    ///
    /// # Errors
    /// When it does not get them.
    pub fn gets(&mut self, more: u64) -> Result<()> {
        let before = self.answers()?;
        let what = format!("{} to be answered after {before}", self.name);
        wait::until(&what, || Ok((self.answers()? >= before + more).then_some(())))
    }

    /// The longest time (ms) that a client has waited for an answer after the one with
    /// this number.
    ///
    /// # Errors
    /// When it has got none since.
    pub fn longest_wait_ms(&self, after: u64) -> Result<f64> {
        let said = self.said()?;
        let waits = answers(&said).filter(|(number, _)| *number > after).map(|(_, ms)| ms);
        waits.max_by(f64::total_cmp).with_context(|| format!("{} got no answer", self.name))
    }

    /// Has a client end, with an answer to everything; how many there were.
    ///
    /// # Errors
    /// When one is missing.
    pub fn finish(mut self) -> Result<u64> {
        let answers = self.answers()?;
        drop(self.input());
        let ended = wait::until("a client to end", || Ok(self.child.try_wait()?))?;
        let said = self.said()?;
        let last = said.lines().last().unwrap_or_default();
        ensure!(ended.success() && last == "done", "{} ended with {ended}: {last}", self.name);
        Ok(self::answers(&said).last().map_or(answers, |(number, _)| number))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Number and waiting time of each answer; a line may still be arriving.
fn answers(said: &str) -> impl Iterator<Item = (u64, f64)> {
    let whole = said.rfind('\n').map_or("", |end| &said[..end]);
    whole.lines().filter_map(|line| {
        let (number, ms) = line.strip_prefix("ok ")?.split_once(' ')?;
        Some((number.parse().ok()?, ms.parse().ok()?))
    })
}

/// The options of `exec-process` for a network of its own with this address.
#[must_use]
pub fn own_network(address: &str) -> [String; 2] {
    ["--net".to_owned(), format!("ip={address}/24,bridge={BRIDGE}")]
}

/// What the server is as a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command.
    Process,
    /// An OCI bundle with the host's programs in it.
    Container,
}

impl Kind {
    /// As `migctl` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Container => "container",
        }
    }

    /// Starts the server on host A and waits until it listens.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn serve(self, nets: &TwoNets) -> Result<()> {
        self.serve_blocks(nets, 128)
    }

    /// The same, with so many blocks of memory, of 64 KiB each.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn serve_blocks(self, nets: &TwoNets, blocks: u64) -> Result<()> {
        self.serve_at(nets, &own_network(ADDRESS), "0.0.0.0", blocks)
    }

    /// The same, in such a network of its own, at that address in it.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn serve_at(
        self,
        nets: &TwoNets,
        network: &[String; 2],
        address: &str,
        blocks: u64,
    ) -> Result<()> {
        let program = [PYTHON, "-c", SERVER, PORT, &blocks.to_string(), address];
        self.start(nets, NAME, network, &program)?;
        wait_for_line(&nets.a, NAME, "listening")
    }

    /// Starts a program of the host's on host A, with a network of its own.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(
        self,
        nets: &TwoNets,
        name: &str,
        network: &[String; 2],
        program: &[&str],
    ) -> Result<()> {
        let [option, net] = network;
        let started = match self {
            Self::Process => {
                let command = ["exec-process", name, option, net, "--"];
                nets.a.migctl(&[&command[..], program].concat())
            }
            Self::Container => {
                let bundle = bundle(&nets.directory().join("bundle"), program)?;
                let bundle = bundle.path.display().to_string();
                nets.a.migctl(&["run-container", name, "--bundle", &bundle, option, net])
            }
        };
        started?.ok()?;
        Ok(())
    }
}

/// A bundle at `path` whose container runs `program` of the host's.
fn bundle(path: &Path, program: &[&str]) -> Result<Bundle> {
    let rootfs = path.join("rootfs");
    for empty in ["dev", "proc", "sys", "tmp", "usr"] {
        fs::create_dir_all(rootfs.join(empty))?;
    }
    let mut spec = container::spec("");
    spec["process"]["args"] = json!(program);
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    mounts.retain(|mount| mount["destination"] != "/data");
    let mut bind = |path: &str| {
        let options = ["rbind", "ro"];
        let mount =
            json!({"destination": path, "type": "bind", "source": path, "options": options});
        mounts.push(mount);
    };
    bind("/usr");
    for name in ["bin", "lib", "lib64"] {
        let host = Path::new("/").join(name);
        match fs::read_link(&host) {
            Ok(target) => symlink(target, rootfs.join(name))?,
            Err(_) if host.is_dir() => {
                fs::create_dir(rootfs.join(name))?;
                bind(&format!("/{name}"));
            }
            Err(_) => {}
        }
    }
    let bundle = Bundle { path: path.to_owned() };
    bundle.write(&spec)?;
    Ok(bundle)
}

/// A client on either host, each of which the server answers.
///
/// # Errors
/// When it does not.
pub fn clients(nets: &TwoNets) -> Result<[Beside; 2]> {
    let mut clients = [Beside::client(nets, Side::A)?, Beside::client(nets, Side::B)?];
    for client in &mut clients {
        client.gets(1)?;
    }
    Ok(clients)
}

/// Ends the clients, then the server, and checks that it had no connections but theirs
/// and that nothing stays on any host. The answers that all of them got.
///
/// # Errors
/// Saying what is wrong.
pub fn finish(nets: &TwoNets, at: Side, clients: impl IntoIterator<Item = Beside>) -> Result<u64> {
    let (mut answers, mut connections) = (0, 0);
    for client in clients {
        connections += client.connections;
        answers += client.finish()?;
    }
    let host = nets.daemon(at);
    let log = host.migctl(&["logs", NAME])?.ok()?.stdout;
    let accepted = log.matches("accepted ").count();
    ensure!(!log.contains("WRONG") && accepted == connections, "{accepted} connections: {log}");
    nets.remove(at, NAME)?;
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_numbers_and_times_and_the_last_line_may_be_cut() {
        let all: Vec<_> = answers("ok 1 0.5\nok 2 12.0\nok 3 9").collect();
        assert_eq!(all, [(1, 0.5), (2, 12.0)]);
        assert_eq!(answers("ok 1 0.").count(), 0);
    }
}
