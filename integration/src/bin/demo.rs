//! Moves a running VM between two daemons on this machine, there and back, and
//! shows what the guest saw of it; then a process tree and a container with a client,
//! between two network namespaces. `integration/demo.sh` builds and starts it.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use integration::host_pair::HostPair;
use integration::measure::{self, Measured};
use integration::process::served::Kind;
use integration::process::show::{self, Act};
use integration::scenario::{Pulse, Summary, expect_alive};
use integration::tidy;
use serde_json::{Value, json};

/// Moves a VM, and then a process tree and a container, there and back between two
/// daemons on this machine.
#[derive(Debug, Parser)]
struct Args {
    /// Print one JSON object on stdout; what happens goes to stderr.
    #[arg(long)]
    json: bool,
    /// Leave out process tree and container, for this reason.
    #[arg(long, value_name = "REASON")]
    without_process: Option<String>,
}

fn main() -> Result<()> {
    tidy::hold_signals()?;
    let args = Args::parse();
    eprintln!("starting two daemons on this machine");
    let pair = HostPair::start()?;
    tidy::end_on_signal(&pair)?;
    let pulse = Pulse::of_the_demo();
    eprintln!(
        "a: {}, b: {}\nstarting the guest: {} MiB of memory, {} MiB filled, {} MiB rewritten \
         in every pass",
        pair.a.address(),
        pair.b.address(),
        pulse.memory,
        pulse.filled,
        pulse.hot
    );
    pulse.run(&pair, &pair.a)?;
    expect_alive(&pair.a, pulse.name, 20)?;

    eprintln!("moving it from a to b while it runs");
    let there = measure::measured(&pair.a, &pair.b, pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 20)?;
    eprintln!("moving it back");
    let back = measure::measured(&pair.b, &pair.a, pulse.name, &["--verify"])?;
    let heartbeats = expect_alive(&pair.a, pulse.name, 20)?;
    pair.finish(pulse.name)?;

    let acts = match &args.without_process {
        Some(reason) => Err(reason.as_str()),
        None => {
            eprintln!("second act: two hosts with networks of their own");
            let tell = |text: &str| eprintln!("{text}");
            Ok([show::run(Kind::Process, tell)?, show::run(Kind::Container, tell)?])
        }
    };

    let moves = [("a to b", &there), ("b to a", &back)];
    if args.json {
        let mut object = object(&moves, heartbeats)?;
        for (kind, number) in [(Kind::Process, 0), (Kind::Container, 1)] {
            object[kind.name()] = match &acts {
                Ok(acts) => acts[number].object(),
                Err(reason) => json!({ "outcome": "left out", "reason": reason }),
            };
        }
        println!("{object}");
    } else {
        print_heartbeats(&moves);
        print_table(&moves, heartbeats)?;
        match &acts {
            Ok(acts) => acts.iter().try_for_each(print_act)?,
            Err(reason) => println!("\nNo process tree or container was moved: {reason}"),
        }
    }
    let wrong = "the demo did not do what it shows";
    ensure!(moves.iter().all(|(_, m)| m.result["verified"] == true), "{wrong}");
    Ok(())
}

fn object(moves: &[(&str, &Measured)], heartbeats: Summary) -> Result<Value> {
    let completed = moves.iter().all(|(_, m)| m.result["outcome"] == "completed");
    let verified = moves.iter().all(|(_, m)| m.result["verified"] == true);
    let rows: Result<Vec<Value>> = moves.iter().map(|(way, m)| row(way, m)).collect();
    Ok(json!({
        "outcome": if completed { "completed" } else { "failed" },
        "verified": verified,
        "ran_on": "real KVM",
        "heartbeats": heartbeats,
        "moves": rows?,
    }))
}

fn row(way: &str, moved: &Measured) -> Result<Value> {
    let rounds = moved.result["rounds"].as_array().context("no rounds")?.len();
    Ok(json!({
        "way": way,
        "outcome": moved.result["outcome"],
        "verified": moved.result["verified"],
        "total_ms": moved.result["total_ms"],
        "downtime_ms": moved.result["downtime_ms"],
        "downtime_breakdown_ms": moved.result["downtime_breakdown_ms"],
        "guest_gap_ms": (moved.gap_ms * 1000.0).round() / 1000.0,
        "bytes_on_wire": moved.result["bytes_on_wire"],
        "rounds": rounds,
        "pages_sent": moved.result["pages_sent"],
        "pages_zero": moved.result["pages_zero"],
        "pages_skipped": moved.result["pages_skipped"],
    }))
}

/// The guest's heartbeats around each move.
fn print_heartbeats(moves: &[(&str, &Measured)]) {
    const AROUND: usize = 4;
    for (way, moved) in moves {
        println!("\nThe guest's heartbeats around the move from {way}:");
        let beats = &moved.heartbeats.beats;
        let first_there = beats.partition_point(|beat| beat.offset < moved.boundary);
        let shown = first_there.saturating_sub(AROUND)..beats.len().min(first_there + AROUND);
        for index in shown {
            let (beat, before) = (beats[index], beats[index.saturating_sub(1)]);
            let (here, there) = way.split_once(" to ").unwrap_or((way, way));
            println!(
                "  at {}  pass {:>6}  {:>8.2} ms after the last  errors {}  back {}",
                if index < first_there { here } else { there },
                beat.pass,
                measure::milliseconds(beat.at_ns.saturating_sub(before.at_ns)),
                beat.errors,
                beat.back
            );
        }
    }
}

fn print_table(moves: &[(&str, &Measured)], heartbeats: Summary) -> Result<()> {
    println!(
        "\n{:<8}{:>10}{:>12}{:>12}{:>10}{:>8}{:>12}{:>10}",
        "way", "total", "downtime", "guest gap", "MiB", "rounds", "skipped", "verified"
    );
    for (way, moved) in moves {
        println!(
            "{way:<8}{:>7.0} ms{:>9.1} ms{:>9.1} ms{:>10.1}{:>8}{:>12}{:>10}",
            moved.figure("total_ms")?,
            moved.figure("downtime_ms")?,
            moved.gap_ms,
            moved.figure("bytes_on_wire")? / f64::from(1 << 20),
            moved.result["rounds"].as_array().map_or(0, Vec::len),
            moved.result["pages_skipped"],
            if moved.result["verified"] == true { "yes" } else { "NO" },
        );
    }
    println!(
        "\nheartbeats {} to {}: {} lost, {} repeated; no wrong page, no clock went back",
        heartbeats.first, heartbeats.last, heartbeats.lost, heartbeats.repeated
    );
    println!("downtime includes hashing all memory at both ends (--verify)");
    Ok(())
}

fn print_act(act: &Act) -> Result<()> {
    println!(
        "\nA {} with a network of its own, moved by CRIU {} while a client counted:",
        act.kind.name(),
        act.criu
    );
    println!("{:<8}{:>10}{:>12}{:>14}{:>10}", "way", "total", "downtime", "client waited", "MiB");
    for show::Shown { way, result, wait_ms } in &act.moves {
        let figure = |name: &str| result[name].as_f64().with_context(|| format!("no {name}"));
        println!(
            "{way:<8}{:>7.0} ms{:>9.1} ms{:>11.1} ms{:>10.1}",
            figure("total_ms")?,
            figure("downtime_ms")?,
            wait_ms,
            figure("bytes_on_wire")? / f64::from(1 << 20),
        );
    }
    println!("{} answers over one connection: none lost, none twice, all in order", act.answers);
    Ok(())
}
