//! Short soaks of a process tree and of a container that CRIU moves with their
//! connections; `cargo run --release -p integration --bin soak -- --processes` and
//! `--containers` are the long ones.

use anyhow::{Result, ensure};
use integration::process::served::Kind;
use integration::process::soak::{Plan, run};

fn soak(kind: Kind) -> Result<()> {
    let report = run(Plan { kind, moves: 20, verify_every: 5, crowd: 0 }, |_, _| {})?;
    eprintln!("{report:#?}");
    ensure!(report.verified == 4 && report.memory_verified == 20);
    report.check()
}

#[test]
fn twenty_moves_of_a_process_tree_lose_no_answer_and_leak_nothing() -> Result<()> {
    soak(Kind::Process)
}

#[test]
fn twenty_moves_of_a_container_lose_no_answer_and_leak_nothing() -> Result<()> {
    soak(Kind::Container)
}
