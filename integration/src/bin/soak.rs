//! Moves a pulse VM back and forth many times, with 1 and with 2 vCPUs, and
//! prints what the daemons used before and after.

use anyhow::Result;
use clap::Parser;
use integration::leaks::Usage;
use integration::scenario::Pulse;
use integration::soak::{self, Plan};

/// Moves a VM back and forth and looks for wrong pages and for leaks.
#[derive(Debug, Parser)]
struct Args {
    /// Moves for each number of vCPUs.
    #[arg(long, default_value_t = 200)]
    moves: u32,
    /// Numbers of vCPUs.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<u32>,
    /// Every such move is verified at both ends.
    #[arg(long, default_value_t = 10)]
    verify_every: u32,
    /// Print JSON, one object for each number of vCPUs.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
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

fn print(report: &soak::Report) {
    let heartbeats = report.heartbeats;
    println!("{} moves with {} vCPU(s) in {:.1} s", report.moves, report.cpus, report.seconds);
    println!("  verified at both ends: {}", report.verified);
    println!(
        "  heartbeats {} to {}, lost {}, repeated {}",
        heartbeats.first, heartbeats.last, heartbeats.lost, heartbeats.repeated
    );
    let times = &report.downtime_ms;
    if let [shortest, .., longest] = times[..] {
        let median = times[times.len() / 2];
        println!("  downtime {shortest:.1} / {median:.1} / {longest:.1} ms (min, median, max)");
    }
    row("a", &report.a_before, &report.a_after);
    row("b", &report.b_before, &report.b_after);
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
