//! What a move costs, beside a plain copy of as many bytes over loopback TCP,
//! measured in the same run.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::leaks::{status_kib, vm_processes};
use integration::measure::{measured, plain_copy};
use integration::scenario::Pulse;
use integration::tidy;
use serde::Serialize;

/// Measures moves of a VM between two daemons on this machine.
#[derive(Debug, Parser)]
struct Args {
    /// Moves of each guest; an even number ends where it began.
    #[arg(long, default_value_t = 6)]
    moves: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Fail when a target is missed.
    #[arg(long)]
    check: bool,
}

/// The least, the middle and the greatest of several figures.
#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(figures: impl IntoIterator<Item = f64>) -> Result<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().map(to_thousandth).collect();
        sorted.sort_by(f64::total_cmp);
        let median = *sorted.get(sorted.len() / 2).context("no figures")?;
        Ok(Self { min: sorted[0], median, max: sorted[sorted.len() - 1] })
    }
}

fn to_thousandth(figure: f64) -> f64 {
    (figure * 1000.0).round() / 1000.0
}

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

#[derive(Debug, Serialize)]
struct Target {
    what: &'static str,
    limit: f64,
    found: f64,
    met: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    ran_on: &'static str,
    moves: u32,
    small: Guest,
    large: Guest,
    large_to_small: f64,
    vmm_beyond_guest_mib: f64,
    daemon_idle_mib: f64,
    targets: Vec<Target>,
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
    let report = bench(args.moves)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let missed = report.targets.iter().filter(|t| !t.met).count();
    ensure!(!args.check || missed == 0, "{missed} of the targets are missed");
    Ok(())
}

fn bench(moves: u32) -> Result<Report> {
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
    report(moves, guest(&small, &of_small)?, guest(&large, &of_large)?, beyond, idle)
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

fn report(moves: u32, small: Guest, large: Guest, beyond: u64, idle: u64) -> Result<Report> {
    let mib = |kib: u64| Ok::<_, anyhow::Error>(f64::from(u32::try_from(kib)?) / 1024.0);
    let (beyond, idle) = (to_thousandth(mib(beyond)?), to_thousandth(mib(idle)?));
    let ratio = to_thousandth(large.total_ms.median / small.total_ms.median);
    let target = |what, limit: f64, found: f64| Target { what, limit, found, met: found <= limit };
    let targets = vec![
        target("median gap that the guest sees, ms", 25.0, small.guest_gap_ms.median),
        target("median total, plain copies", 3.0, small.total_to_plain_copy.median),
        target("4 GiB guest, times the 1 GiB one", 1.2, ratio),
        target("VM process beyond the guest, MiB", 12.0, beyond),
        target("idle daemon, MiB", 40.0, idle),
    ];
    Ok(Report {
        ran_on: "real KVM",
        moves,
        small,
        large,
        large_to_small: ratio,
        vmm_beyond_guest_mib: beyond,
        daemon_idle_mib: idle,
        targets,
    })
}

fn print(report: &Report) {
    for guest in [&report.small, &report.large] {
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
            let Spread { min, median, max } = spread;
            println!("  {label:<58}{min:>10.1}{median:>10.1}{max:>10.1}");
        }
    }
    println!("\nTargets{:>48}{:>10}", "limit", "found");
    for target in &report.targets {
        let verdict = if target.met { "met" } else { "MISSED" };
        println!("  {:<43}{:>10.1}{:>10.1}  {verdict}", target.what, target.limit, target.found);
    }
}
