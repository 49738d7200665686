//! A program as a workload with a network of its own.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::process::{left, moved, moves, served};
use integration::programs::Installed;
use integration::two_nets::{Side, TwoNets, on_two_hosts};
use integration::wait;

/// How often each program moves there and back.
pub const TIMES: usize = 3;
/// The user that stands for "not root": Debian's `nobody` and `nogroup`.
pub const NOBODY: u32 = 65_534;
/// An answer that does not come in this time never will: longer than any move.
const ANSWER: Duration = Duration::from_secs(90);

/// A program that serves at an address of its own.
pub struct Service<'n> {
    pub nets: &'n TwoNets,
    pub name: &'static str,
    pub address: SocketAddr,
    /// Where it is now.
    pub at: Side,
}

/// What to run, and how.
pub struct Order<'a> {
    pub name: &'static str,
    pub address: &'static str,
    pub program: &'a Installed,
    /// What runs the program: a command that ends with the program's path.
    pub before: &'a [&'a str],
    pub args: &'a [&'a str],
    /// Variables of its environment.
    pub env: &'a [&'a str],
}

/// Runs `test` with two hosts that serve.
pub fn on_hosts(test: fn(&TwoNets) -> Result<()>) -> Result<()> {
    on_two_hosts(move |nets| {
        nets.start()?;
        integration::process::can_move(&nets.a)?;
        integration::process::can_move(&nets.b)?;
        test(nets)
    })
}

impl<'n> Service<'n> {
    /// Starts it on host A.
    pub fn start(nets: &'n TwoNets, order: &Order<'_>) -> Result<Self> {
        let Order { name, address, program, before, args, env } = order;
        let address: SocketAddr = address.parse()?;
        let [option, net] = served::own_network(&address.ip().to_string());
        let variable = program.variable().map(|(name, value)| format!("{name}={value}"));
        let program = program.program();
        let mut command = vec!["exec-process", name, &option, &net];
        for variable in variable.as_deref().into_iter().chain(env.iter().copied()) {
            command.extend(["--env", variable]);
        }
        command.push("--");
        command.extend(*before);
        command.push(&program);
        command.extend(*args);
        nets.a.migctl(&command)?.ok()?;
        Ok(Self { nets, name, address, at: Side::A })
    }

    /// A connection to it, once it listens.
    pub fn connect(&self) -> Result<TcpStream> {
        let connected = wait::until(&format!("{} to listen", self.name), || {
            let state = self.nets.daemon(self.at).state_of(self.name)?;
            ensure!(state.as_deref() == Some("running"), "{}", self.log()?);
            Ok(TcpStream::connect(self.address).ok())
        })?;
        connected.set_read_timeout(Some(ANSWER))?;
        connected.set_write_timeout(Some(ANSWER))?;
        connected.set_nodelay(true)?;
        Ok(connected)
    }

    /// What it printed.
    pub fn log(&self) -> Result<String> {
        Ok(self.nets.daemon(self.at).migctl(&["logs", self.name])?.ok()?.stdout)
    }

    /// Moves it to the other host; nothing of it may stay behind.
    pub fn go(&mut self) -> Result<()> {
        let (from, to) = (self.at, self.at.other());
        moves(self.nets.daemon(from), self.nets.daemon(to), self.name, &[])
            .with_context(|| format!("{} from {from:?}", self.name))?;
        self.at = to;
        self.nets.expect_nothing_left(from)
    }

    /// Moves it there and back, some times, and has `check` look at it after each move.
    pub fn there_and_back(&mut self, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        for number in 0..2 * TIMES {
            self.go()?;
            let what = || format!("{} after move {}", self.name, number + 1);
            check().with_context(what)?;
        }
        Ok(())
    }

    /// It can't move: a dry run and a move say so with `code` alone, before anything of
    /// it is touched.
    pub fn is_refused(&self, code: &str) -> Result<()> {
        let (here, there) = (self.nets.daemon(self.at), self.nets.daemon(self.at.other()));
        wait::until("a plan that the other host has answered to", || {
            let plan = moved(here, there, self.name, &["--dry-run"])?;
            plan.expect(3, &[code])?;
            let plan = plan.json()?;
            let blockers = plan["blockers"].as_array().context("no blockers")?;
            // An emulated host takes seconds for what is little elsewhere.
            if blockers.iter().any(|b| b["code"] == "peer-silent") {
                return Ok(None);
            }
            ensure!(blockers.iter().all(|b| b["code"] == code), "{plan}");
            Ok(Some(()))
        })?;
        moved(here, there, self.name, &[])?.expect(3, &[])?;
        ensure!(here.state_of(self.name)?.as_deref() == Some("running"));
        self.nets.expect_nothing_left(self.at.other())
    }

    /// Ends it; nothing may stay.
    pub fn end(self) -> Result<()> {
        self.nets.remove(self.at, self.name)
    }

    /// The processes of it.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let keepers = left::keepers(self.nets.daemon(self.at).state_dir());
        keepers.first().context("it has no keeper")?.processes()
    }
}

/// Whether host A's daemon may read the limits of everybody's processes, without which
/// CRIU takes no process of another user (`CAP_SYS_RESOURCE`, capability.h: 24).
pub fn takes_other_users(nets: &TwoNets) -> Result<bool> {
    let status = fs::read_to_string(format!("/proc/{}/status", nets.a.pid()?))?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = u64::from_str_radix(mask.context("no CapEff")?.trim(), 16)?;
    Ok(mask & 1 << 24 != 0)
}
