//! Moves a pulse VM back and forth many times, with 1 and with 2 vCPUs, or a process
//! tree with TCP connections, and prints what the daemons used before and after.

use anyhow::Result;
use clap::Parser;
use integration::leaks::Usage;
use integration::process;
use integration::process::served::Kind;
use integration::scenario::Pulse;
use integration::soak::{self, Plan};

/// Moves a VM or a process tree back and forth and looks for wrong memory and for leaks.
#[derive(Debug, Parser)]
struct Args {
    /// Moves for each number of vCPUs, or of what is moved instead.
    #[arg(long, default_value_t = 200)]
    moves: u32,
    /// Numbers of vCPUs.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<u32>,
    /// Move a process tree instead: a server with a network of its own that answers a
    /// client on either host.
    #[arg(long, conflicts_with = "cpus")]
    processes: bool,
    /// Move a container instead, with the same server in it.
    #[arg(long, conflicts_with_all = ["cpus", "processes"])]
    containers: bool,
    /// So many busy connections more from each host to the process tree or container.
    #[arg(long, default_value_t = 0, conflicts_with = "cpus")]
    crowd: usize,
    /// Every such move is verified at both ends.
    #[arg(long, default_value_t = 10)]
    verify_every: u32,
    /// Print JSON, one object for each number of vCPUs, or one for the process tree.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.processes {
        return connections(Kind::Process, &args);
    }
    if args.containers {
        return connections(Kind::Container, &args);
    }
    for cpus in &args.cpus {
        let pulse = Pulse::small().cpus(*cpus);
        let plan = Plan { pulse, moves: args.moves, verify_every: args.verify_every };
        let report = soak::run(&plan, |number, downtime| {
            eprintln!("{cpus} vCPU(s), move {number} of {}: {downtime:.1} ms", plan.moves);
        })?;
        if args.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print(&report);
        }
        report.check()?;
    }
    Ok(())
}

fn connections(kind: Kind, args: &Args) -> Result<()> {
    let Args { moves, verify_every, crowd, .. } = *args;
    let plan = process::soak::Plan { kind, moves, verify_every, crowd };
    let what = kind.name();
    let report = process::soak::run(plan, move |number, downtime| {
        eprintln!("{what}, move {number} of {}: {downtime:.1} ms", plan.moves);
    })?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{} moves of a {what} in {:.1} s", report.moves, report.seconds);
        println!("  verified at both ends: {}", report.verified);
        println!("  all of its memory verified after each: {}", report.memory_verified);
        println!(
            "  answers over {} connections: {}, none lost, all in order",
            2 + 2 * crowd,
            report.answers
        );
        spread("downtime", &report.downtime_ms);
        spread("longest wait of a client", &report.stall_ms);
        row("a", &report.a_before.usage, &report.a_after.usage);
        row("b", &report.b_before.usage, &report.b_after.usage);
    }
    report.check()
}

fn print(report: &soak::Report) {
    let heartbeats = report.heartbeats;
    println!("{} moves with {} vCPU(s) in {:.1} s", report.moves, report.cpus, report.seconds);
    println!("  verified at both ends: {}", report.verified);
    println!(
        "  heartbeats {} to {}, lost {}, repeated {}",
        heartbeats.first, heartbeats.last, heartbeats.lost, heartbeats.repeated
    );
    spread("downtime", &report.downtime_ms);
    row("a", &report.a_before, &report.a_after);
    row("b", &report.b_before, &report.b_after);
}

/// Times from short to long.
fn spread(what: &str, times: &[f64]) {
    if let [shortest, .., longest] = times {
        let median = times[times.len() / 2];
        println!("  {what} {shortest:.1} / {median:.1} / {longest:.1} ms (min, median, max)");
    }
}

fn row(name: &str, before: &Usage, after: &Usage) {
    println!(
        "  daemon {name}: fds {} -> {}, threads {} -> {}, resident {} -> {} KiB, VMs {} -> {}",
        before.fds,
        after.fds,
        before.threads,
        after.threads,
        before.rss_kib,
        after.rss_kib,
        before.vms,
        after.vms
    );
}
