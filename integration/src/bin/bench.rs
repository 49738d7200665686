//! What a move costs, measured in the same run: of a VM beside a plain copy of as many
//! bytes over loopback TCP, of a process beside CRIU alone.

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::leaks::{status_kib, vm_processes};
use integration::measure::{Spread, measured, plain_copy, to_thousandth};
use integration::process;
use integration::scenario::Pulse;
use integration::tidy;
use serde::Serialize;

/// Measures moves of VMs and of a process between two daemons on this machine.
#[derive(Debug, Parser)]
struct Args {
    /// Moves of each; an even number ends where it began.
    #[arg(long, default_value_t = 6)]
    moves: u32,
    /// Measure these only.
    #[arg(long)]
    only: Option<Kind>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Fail when a target is missed.
    #[arg(long)]
    check: bool,
}

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Virtual machines.
    Vms,
    /// A process.
    Processes,
}

/// Memory of the process that is moved, in MiB.
const PROCESS_MIB: u32 = 512;

/// One guest's moves.
#[derive(Clone, Debug, Serialize)]
struct Guest {
    memory_mib: u32,
    filled_mib: u32,
    hot_mib: u32,
    total_ms: Spread,
    downtime_ms: Spread,
    guest_gap_ms: Spread,
    longest_interval_in_precopy_ms: Spread,
    mib_on_wire: Spread,
    rounds: Spread,
    plain_copy_ms: Spread,
    total_to_plain_copy: Spread,
}

#[derive(Clone, Debug, Serialize)]
struct Target {
    what: &'static str,
    limit: f64,
    found: f64,
    met: bool,
}

impl Target {
    fn new(what: &'static str, limit: f64, found: f64) -> Self {
        Self { what, limit, found, met: found <= limit }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    moves: u32,
    #[serde(flatten)]
    vms: Option<Vms>,
    process: Option<process::bench::Row>,
    targets: Vec<Target>,
}

#[derive(Debug, Serialize)]
struct Vms {
    ran_on: &'static str,
    small: Guest,
    large: Guest,
    large_to_small: f64,
    vmm_beyond_guest_mib: f64,
    daemon_idle_mib: f64,
}

/// What one move took.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    total: f64,
    downtime: f64,
    gap: f64,
    brownout: f64,
    bytes: f64,
    rounds: f64,
    copy: f64,
}

fn main() -> Result<()> {
    tidy::hold_signals()?;
    let args = Args::parse();
    ensure!(args.moves >= 2 && args.moves.is_multiple_of(2), "--moves must be even, and 2 or more");
    let vms = if args.only == Some(Kind::Processes) { None } else { Some(bench(args.moves)?) };
    let process = if args.only == Some(Kind::Vms) {
        None
    } else {
        let plan = process::bench::Plan { memory: PROCESS_MIB, moves: args.moves };
        Some(process::bench::run(plan, |text| eprintln!("{text}"))?)
    };
    let targets = [
        vms.iter().flat_map(vm_targets).collect::<Vec<_>>(),
        process.iter().flat_map(process_targets).collect(),
    ];
    let report = Report { moves: args.moves, vms, process, targets: targets.concat() };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let missed = report.targets.iter().filter(|t| !t.met).count();
    ensure!(!args.check || missed == 0, "{missed} of the targets are missed");
    Ok(())
}

fn bench(moves: u32) -> Result<Vms> {
    let pair = HostPair::start()?;
    tidy::end_on_signal(&pair)?;
    let idle = status_kib(pair.a.pid()?, "VmRSS:")?.max(status_kib(pair.b.pid()?, "VmRSS:")?);
    let small = Pulse::of_the_demo();
    // The same work in four times the memory.
    let large = Pulse { name: "large", memory: 4096, filled: 496, ..small };
    small.run(&pair, &pair.a)?;
    let beyond = beyond_guest(&pair.a)?;
    pair.a.migctl(&["pause", small.name])?.ok()?;
    large.run(&pair, &pair.a)?;
    let (mut of_small, mut of_large) = (Vec::new(), Vec::new());
    for number in 0..moves {
        let (from, to) = if number % 2 == 0 { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
        // One runs and moves while the other stands still.
        from.migctl(&["pause", large.name])?.ok()?;
        from.migctl(&["resume", small.name])?.ok()?;
        of_small.push(sample(from, to, &small)?);
        to.migctl(&["pause", small.name])?.ok()?;
        from.migctl(&["resume", large.name])?.ok()?;
        of_large.push(sample(from, to, &large)?);
    }
    pair.a.migctl(&["stop", large.name, "--force"])?.ok()?;
    pair.a.migctl(&["rm", large.name])?.ok()?;
    pair.finish(small.name)?;
    vms(guest(&small, &of_small)?, guest(&large, &of_large)?, beyond, idle)
}

/// Resident memory of the one VM process of `host` that is not the guest's.
fn beyond_guest(host: &Daemon) -> Result<u64> {
    let pids = vm_processes(host.state_dir());
    let pid = *pids.first().context("no VM process")?;
    Ok(status_kib(pid, "RssAnon:")? + status_kib(pid, "RssFile:")?)
}

fn sample(from: &Daemon, to: &Daemon, pulse: &Pulse) -> Result<Sample> {
    let moved = measured(from, to, pulse.name, &[])?;
    moved.heartbeats.check()?;
    let bytes = moved.result["bytes_on_wire"].as_u64().context("no bytes_on_wire")?;
    let rounds = moved.result["rounds"].as_array().map_or(0, Vec::len);
    to.migctl(&["pause", pulse.name])?.ok()?;
    let copy = plain_copy(usize::try_from(bytes)?)?;
    to.migctl(&["resume", pulse.name])?.ok()?;
    let sample = Sample {
        total: moved.figure("total_ms")?,
        downtime: moved.figure("downtime_ms")?,
        gap: moved.gap_ms,
        brownout: moved.brownout_ms,
        bytes: moved.figure("bytes_on_wire")?,
        rounds: f64::from(u32::try_from(rounds)?),
        copy: copy.as_secs_f64() * 1000.0,
    };
    eprintln!(
        "{} MiB: total {:.0} ms, downtime {:.1} ms, guest gap {:.1} ms, plain copy {:.0} ms; {}",
        pulse.memory,
        sample.total,
        sample.downtime,
        sample.gap,
        sample.copy,
        moved.result["downtime_breakdown_ms"]
    );
    Ok(sample)
}

fn guest(pulse: &Pulse, samples: &[Sample]) -> Result<Guest> {
    let spread = |figure: fn(&Sample) -> f64| Spread::of(samples.iter().map(figure));
    Ok(Guest {
        memory_mib: pulse.memory,
        filled_mib: pulse.filled,
        hot_mib: pulse.hot,
        total_ms: spread(|s| s.total)?,
        downtime_ms: spread(|s| s.downtime)?,
        guest_gap_ms: spread(|s| s.gap)?,
        longest_interval_in_precopy_ms: spread(|s| s.brownout)?,
        mib_on_wire: spread(|s| s.bytes / f64::from(1 << 20))?,
        rounds: spread(|s| s.rounds)?,
        plain_copy_ms: spread(|s| s.copy)?,
        total_to_plain_copy: spread(|s| s.total / s.copy)?,
    })
}

fn vms(small: Guest, large: Guest, beyond: u64, idle: u64) -> Result<Vms> {
    let mib = |kib: u64| Ok::<_, anyhow::Error>(f64::from(u32::try_from(kib)?) / 1024.0);
    let (beyond, idle) = (to_thousandth(mib(beyond)?), to_thousandth(mib(idle)?));
    Ok(Vms {
        ran_on: "real KVM",
        large_to_small: to_thousandth(large.total_ms.median / small.total_ms.median),
        small,
        large,
        vmm_beyond_guest_mib: beyond,
        daemon_idle_mib: idle,
    })
}

fn vm_targets(vms: &Vms) -> Vec<Target> {
    vec![
        Target::new("median gap that the guest sees, ms", 25.0, vms.small.guest_gap_ms.median),
        Target::new("median total, plain copies", 3.0, vms.small.total_to_plain_copy.median),
        Target::new("4 GiB guest, times the 1 GiB one", 1.2, vms.large_to_small),
        Target::new("VM process beyond the guest, MiB", 12.0, vms.vmm_beyond_guest_mib),
        Target::new("idle daemon, MiB", 40.0, vms.daemon_idle_mib),
    ]
}

fn process_targets(row: &process::bench::Row) -> Vec<Target> {
    vec![
        Target::new("process frozen, times CRIU alone", 0.6, row.frozen_to_plain.median),
        Target::new("daemon and keeper of a process, MiB", 64.0, row.own_memory_mib),
        Target::new("written to a disk in its move, MiB", 1.0, row.written_mib),
    ]
}

fn print(report: &Report) {
    for guest in report.vms.iter().flat_map(|vms| [&vms.small, &vms.large]) {
        println!(
            "\nGuest of {} MiB, {} MiB filled, {} MiB hot; {} moves{:>13}{:>10}{:>10}",
            guest.memory_mib, guest.filled_mib, guest.hot_mib, report.moves, "min", "median", "max"
        );
        for (label, spread) in [
            ("total, ms", guest.total_ms),
            ("downtime, ms", guest.downtime_ms),
            ("gap between heartbeats at the move, ms", guest.guest_gap_ms),
            ("longest such gap during precopy, ms", guest.longest_interval_in_precopy_ms),
            ("sent, MiB", guest.mib_on_wire),
            ("rounds", guest.rounds),
            ("plain TCP copy of as many bytes, ms", guest.plain_copy_ms),
            ("total / plain copy", guest.total_to_plain_copy),
        ] {
            line(label, spread);
        }
    }
    if let Some(row) = &report.process {
        println!(
            "\nProcess of {} MiB, mode stop; {} moves{:>24}{:>10}{:>10}",
            row.memory_mib, row.moves, "min", "median", "max"
        );
        for (label, spread) in [
            ("frozen, ms", row.frozen_ms),
            ("  of that: pause", row.pause_ms),
            ("  memory", row.memory_ms),
            ("  restore", row.restore_ms),
            ("frozen with CRIU alone, ms", row.plain_ms),
            ("  dump to memory", row.plain_dump_ms),
            ("  copy over loopback TCP", row.plain_copy_ms),
            ("  restore", row.plain_restore_ms),
            ("frozen / frozen with CRIU alone, pair by pair", row.frozen_to_plain),
        ] {
            line(label, spread);
        }
    }
    println!("\nTargets{:>48}{:>10}", "limit", "found");
    for target in &report.targets {
        let verdict = if target.met { "met" } else { "MISSED" };
        let Target { what, limit, found, .. } = target;
        let digits = digits(*limit);
        println!("  {what:<43}{limit:>10.digits$}{found:>10.digits$}  {verdict}");
    }
}

fn line(label: &str, Spread { min, median, max }: Spread) {
    let digits = digits(max);
    println!("  {label:<58}{min:>10.digits$}{median:>10.digits$}{max:>10.digits$}");
}

/// How many digits a figure as large as that has behind its point.
fn digits(largest: f64) -> usize {
    if largest < 10.0 { 2 } else { 1 }
}
