//! The lab's program: `integration/lab/lab.sh` builds and starts it. It brings
//! hosts up and down from outside and, as `lab agent`, serves inside one.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use integration::binaries;
use integration::lab::host::Host;
use integration::lab::layout::{Layout, SHARED};
use integration::lab::process::Life;
use integration::lab::qemu::Accelerator;
use integration::lab::scenario::demo;
use integration::lab::settings::{HostNumber, Settings};
use integration::lab::{self, agent, diagnosis, script, switch, watch};

use integration::tidy;

/// Stock Debian hosts on this one machine, joined by a private network.
#[derive(Debug, Parser)]
#[command(name = "lab.sh")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring a lab up and leave it running.
    Up(Shape),
    /// Bring a lab up, run a script with it, and take it down.
    Run {
        #[command(flatten)]
        shape: Shape,
        /// The script, and its arguments. It finds in its environment: LAB (this
        /// program), MIGR_LAB_DIR, MIGCTL, SHARED (a directory outside that
        /// hosts have at /lab/shared) and HOST1, HOST2, … (ADDR:PORT).
        #[arg(required = true, trailing_var_arg = true)]
        script: Vec<String>,
    },
    /// Show in a few minutes what migr does, with a table at the end.
    Demo,
    /// Cut the network cable of a host, or of all.
    Cut { host: Option<HostNumber> },
    /// Mend the network cable of a host, or of all.
    Heal { host: Option<HostNumber> },
    /// Stop all CPUs of a host.
    Freeze { host: HostNumber },
    /// Let the CPUs of a host go on.
    Thaw { host: HostNumber },
    /// Take the power of a host away.
    Kill { host: HostNumber },
    /// Power a host on again, with its migrd.
    Start { host: HostNumber },
    /// Run a command in a host, over a channel that needs no network.
    Exec {
        /// Give the command this program's input.
        #[arg(short, long)]
        input: bool,
        host: HostNumber,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Say how the hosts are.
    Status,
    /// Show what the hosts have to say about a failure.
    Diagnose,
    /// End the lab: hosts, files, everything.
    Down,
    #[command(hide = true)]
    Agent,
    #[command(hide = true)]
    Switch { socket: PathBuf },
}

/// What a new lab is to be like.
#[derive(Debug, Args)]
struct Shape {
    /// How many hosts.
    #[arg(long, default_value_t = Settings::default().hosts)]
    hosts: u8,
    /// Memory of each host, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = Settings::default().memory_mib)]
    memory: u32,
    /// CPUs of each host.
    #[arg(long, default_value_t = Settings::default().cpus)]
    cpus: u8,
    /// A QEMU CPU model for one host, as in 2=EPYC,+svm,-avx2; repeatable.
    #[arg(long = "cpu", value_name = "HOST=MODEL", value_parser = model)]
    models: Vec<(HostNumber, String)>,
    /// Do not start migrd in the hosts.
    #[arg(long)]
    no_migrd: bool,
}

fn model(text: &str) -> Result<(HostNumber, String)> {
    let (host, model) = text.split_once('=').context("not of the form HOST=MODEL")?;
    Ok((host.parse()?, model.to_owned()))
}

impl Shape {
    fn settings(&self) -> Result<Settings> {
        let settings = Settings {
            hosts: self.hosts,
            memory_mib: self.memory,
            cpus: self.cpus,
            models: self.models.iter().cloned().collect(),
            ..Settings::default()
        };
        settings.check()?;
        Ok(settings)
    }
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Where the lab is: MIGR_LAB_DIR, or beside what cargo builds.
fn layout() -> Result<Layout> {
    match std::env::var_os("MIGR_LAB_DIR") {
        Some(directory) => Layout::new(Path::new(&directory)),
        None => Layout::new(&binaries::build_dir()?.join("lab/run")),
    }
}

fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Agent => agent::serve()?,
        Command::Switch { socket } => switch::serve(&socket)?,
        Command::Up(shape) => up(&shape)?,
        Command::Run { shape, script } => return run(&shape, &script),
        Command::Demo => demo()?,
        Command::Cut { host } => each(host, Host::cut)?,
        Command::Heal { host } => each(host, Host::heal)?,
        Command::Freeze { host } => each(Some(host), Host::freeze)?,
        Command::Thaw { host } => each(Some(host), Host::thaw)?,
        Command::Kill { host } => each(Some(host), Host::power_off)?,
        Command::Start { host } => each(Some(host), |host| {
            host.power_on(Life::UntilEnded)?;
            host.wait_up()?;
            host.start_migrd(&[])
        })?,
        Command::Exec { input, host, words } => return exec(input, host, &words),
        Command::Status => status()?,
        Command::Diagnose => print!("{}", diagnosis::of(&layout()?)),
        Command::Down => lab::remove(&layout()?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Does something to one host, or to all of a lab that is up.
fn each(host: Option<HostNumber>, action: impl Fn(&Host) -> Result<()>) -> Result<()> {
    let hosts = lab::attach(&layout()?)?;
    let chosen: Vec<_> =
        hosts.iter().filter(|other| host.is_none_or(|host| host == other.number())).collect();
    ensure!(!chosen.is_empty(), "this lab has {} hosts", hosts.len());
    chosen.into_iter().try_for_each(action)
}

/// Brings a lab up. What was begun is taken down when that fails, or a signal
/// comes meanwhile.
fn bring_up(shape: &Shape, layout: &Layout) -> Result<Vec<Host>> {
    let settings = shape.settings()?;
    eprintln!("starting {} hosts ({})", settings.hosts, Accelerator::of_this_machine().describe());
    // Before anything is made: a lab that is up already is not to be taken down.
    layout.make()?;
    let up = lab::bring_up(layout, &settings, Life::UntilEnded).and_then(|hosts| {
        if !shape.no_migrd {
            hosts.iter().try_for_each(|host| host.start_migrd(&[]))?;
        }
        Ok(hosts)
    });
    up.inspect_err(|_| {
        lab::report_failure(layout);
        if let Err(error) = lab::remove(layout) {
            eprintln!("the lab in {} is not gone: {error:#}", layout.root().display());
        }
    })
}

fn up(shape: &Shape) -> Result<()> {
    let layout = layout()?;
    tidy::hold_signals()?;
    lab::remove_on_signal(&layout, None);
    let hosts = bring_up(shape, &layout)?;
    for host in hosts {
        println!("host {}: migrd at {}", host.number(), host.number().migrd());
    }
    println!("shared directory: {} (in hosts: {SHARED})", layout.shared().display());
    Ok(())
}

fn demo() -> Result<()> {
    let layout = layout()?;
    tidy::hold_signals()?;
    lab::remove_on_signal(&layout, None);
    let settings = Settings::default();
    let (hosts, memory, cpus) = (settings.hosts, settings.memory_mib, settings.cpus);
    let shape = Shape { hosts, memory, cpus, models: Vec::new(), no_migrd: false };
    watch::attempts(|| {
        let mut watch = watch::Watch::start(&layout, &settings);
        let hosts = bring_up(&shape, &layout)?;
        let shown = demo::show(&hosts);
        if shown.is_err() {
            lab::report_failure(&layout);
        }
        lab::remove(&layout)?;
        watch.end();
        shown
    })
}

fn run(shape: &Shape, script: &[String]) -> Result<ExitCode> {
    let layout = layout()?;
    tidy::hold_signals()?;
    let group = script::Group::default();
    lab::remove_on_signal(&layout, Some(group.clone()));
    let hosts = bring_up(shape, &layout)?;
    // What the script waits for in a host that the emulation has lost never comes.
    let mut watch = watch::Watch::start(&layout, &shape.settings()?);
    let ended = script::run(&layout, &hosts, script, &group);
    if !matches!(ended, Ok(0)) {
        lab::report_failure(&layout);
    }
    lab::remove(&layout)?;
    watch.end();
    for lost in watch::lost_hosts() {
        eprintln!("the emulation lost a host: {lost}");
    }
    Ok(ExitCode::from(ended?))
}

fn exec(input: bool, host: HostNumber, words: &[String]) -> Result<ExitCode> {
    let hosts = lab::attach(&layout()?)?;
    let Some(host) = hosts.iter().find(|other| other.number() == host) else {
        bail!("this lab has {} hosts", hosts.len());
    };
    if input && std::io::stdin().is_terminal() {
        eprintln!("(input goes to the host line by line)");
    }
    let input = input.then(|| -> Box<dyn Read + Send> { Box::new(std::io::stdin()) });
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let status = host.stream(&words, input, &mut |error, data| {
        if error {
            std::io::stderr().write_all(data)?;
        } else {
            std::io::stdout().write_all(data)?;
            std::io::stdout().flush()?;
        }
        Ok(())
    })?;
    // As a shell has it, when a signal ended it.
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(128)))
}

fn status() -> Result<()> {
    let layout = layout()?;
    println!("{:<6}{:<18}{:<8}{:<8}workloads", "host", "migrd", "power", "cable");
    for host in lab::attach(&layout)? {
        let condition = host.condition()?;
        let workloads = match condition {
            lab::host::Condition::On => workloads(&host),
            lab::host::Condition::Off | lab::host::Condition::Frozen => String::new(),
        };
        println!(
            "{:<6}{:<18}{:<8}{:<8}{workloads}",
            host.number().to_string(),
            host.number().migrd().to_string(),
            format!("{condition:?}").to_lowercase(),
            if host.is_cut() { "cut" } else { "whole" },
        );
    }
    println!("directory: {}", layout.root().display());
    Ok(())
}

fn workloads(host: &Host) -> String {
    let Ok(list) = host.ask(&["list"]) else { return "migrd does not answer".to_owned() };
    let all = list["workloads"].as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("?").to_owned();
    let each = all.iter().map(|one| format!("{} ({})", text(&one["name"]), text(&one["state"])));
    each.collect::<Vec<_>>().join(", ")
}
