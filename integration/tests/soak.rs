//! A short soak; `cargo run --release -p integration --bin soak` is the long one.

use anyhow::{Result, ensure};
use integration::scenario::Pulse;
use integration::soak::{Plan, run};

fn soak(cpus: u32) -> Result<()> {
    let plan = Plan { pulse: Pulse::small().cpus(cpus), moves: 10, verify_every: 5 };
    let report = run(&plan, |_, _| {})?;
    eprintln!("{report:#?}");
    ensure!(report.verified == 2 && report.heartbeats.first == 1);
    report.check()
}

#[test]
fn ten_moves_in_a_row_lose_nothing_and_leak_nothing() -> Result<()> {
    soak(1)
}

#[test]
fn ten_moves_in_a_row_with_two_vcpus_lose_nothing_and_leak_nothing() -> Result<()> {
    soak(2)
}
