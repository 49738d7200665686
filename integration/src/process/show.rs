//! A workload that serves TCP moves between two hosts with networks of their own while
//! a client keeps counting: what the demo shows of process trees.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::served::{self, Kind};
use super::{can_move, moves};
use crate::tidy;
use crate::two_nets::{Side, TwoNets, on_two_hosts};

/// Answers that the client is to get between moves.
const SOME: u64 = 200;

/// A move, and how long the client had to wait because of it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// From where to where.
    pub way: &'static str,
    /// What `migctl migrate` printed.
    pub result: Value,
    /// The longest time between two answers, in ms.
    pub wait_ms: f64,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Act {
    /// What was moved.
    pub kind: Kind,
    /// The CRIU that moved it.
    pub criu: String,
    /// Answers that the client got over its one connection: each once and in order.
    pub answers: u64,
    /// There, and back.
    pub moves: Vec<Shown>,
}

impl Act {
    /// As an object for scripts.
    #[must_use]
    pub fn object(&self) -> Value {
        let rows: Vec<Value> = self.moves.iter().map(row).collect();
        // A client that lost an answer would have ended everything.
        json!({
            "kind": self.kind.name(),
            "outcome": "completed",
            "ran_on": format!("CRIU {}", self.criu),
            "answers": self.answers,
            "lost": 0,
            "moves": rows,
        })
    }
}

fn row(Shown { way, result, wait_ms }: &Shown) -> Value {
    json!({
        "way": way,
        "outcome": result["outcome"],
        "verified": result["verified"],
        "total_ms": result["total_ms"],
        "downtime_ms": result["downtime_ms"],
        "downtime_breakdown_ms": result["downtime_breakdown_ms"],
        "client_wait_ms": wait_ms,
        "bytes_on_wire": result["bytes_on_wire"],
    })
}

/// Moves it there and back; `tell` hears of what happens.
///
/// # Errors
/// When it does not move, or an answer is missing or wrong.
pub fn run(kind: Kind, tell: fn(&str)) -> Result<Act> {
    on_two_hosts(move |nets| {
        nets.start()?;
        tidy::end_daemons_on_signal([&nets.a, &nets.b], nets.directory())?;
        can_move(&nets.a)?;
        can_move(&nets.b)?;
        act(nets, kind, tell)
    })
}

fn act(nets: &TwoNets, kind: Kind, tell: fn(&str)) -> Result<Act> {
    let hosts = nets.a.ask(&["hosts"])?;
    let criu = hosts["hosts"][0]["criu"].as_str().context("no CRIU")?.to_owned();
    tell(&format!(
        "starting a {} that serves at {}, and a client that counts",
        kind.name(),
        served::ADDRESS
    ));
    kind.serve(nets)?;
    let mut client = served::Beside::client(nets, Side::A)?;
    client.gets(SOME)?;
    let mut shown = Vec::new();
    for (from, way) in [(Side::A, "a to b"), (Side::B, "b to a")] {
        tell(&format!("moving it from {way} while the client counts"));
        let seen = client.answers()?;
        let (from, to) = (nets.daemon(from), nets.daemon(from.other()));
        let result = moves(from, to, served::NAME, &["--verify"])?;
        ensure!(result["verified"] == true, "it was not verified: {result}");
        client.gets(SOME)?;
        shown.push(Shown { way, result, wait_ms: client.longest_wait_ms(seen)? });
    }
    let answers = served::finish(nets, Side::A, [client])?;
    Ok(Act { kind, criu, answers, moves: shown })
}
