//! The network is cut in the middle of a move.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::table::Table;
use crate::lab::Lab;
use crate::lab::client::Client;
use crate::lab::guest::Guest;
use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::qemu::Accelerator;
use crate::lab::settings::Settings;
use crate::wait;

/// How long the network is cut.
const CUT: Duration = Duration::from_secs(30);

/// A move that was started in the background of a host.
#[derive(Debug)]
pub struct Move {
    host: Host,
    pid: u32,
    log: String,
}

impl Move {
    /// Starts it.
    ///
    /// # Errors
    /// When migctl can't be started.
    pub fn start(guest: &Guest, from: &Host, to: &Host) -> Result<Self> {
        let program = crate::binaries::Program::Migctl.path()?.display().to_string();
        let (here, there) = (from.number().migrd().to_string(), to.number().migrd().to_string());
        let log = format!("/lab/disk/move-{}.log", from.sh("date +%s%N")?.trim());
        let words =
            [&program, "--host", &here, "-o", "json", "migrate", guest.name, "--to", &there];
        let words = [&words[..], Accelerator::of_this_machine().patience()].concat();
        let pid = from.spawn(&words, &[], &log)?;
        Ok(Self { host: from.clone(), pid, log })
    }

    /// Waits for its end; its report.
    ///
    /// # Errors
    /// When it never ends, or without a report.
    pub fn report(&self) -> Result<Value> {
        wait::patiently("the move to end", || {
            let alive = self.host.exec(&["kill", "-0", &self.pid.to_string()])?.status == 0;
            Ok((!alive).then_some(()))
        })?;
        let said = self.host.sh(&format!("cat {}", self.log))?;
        let objects = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut reports = objects.filter(|object| object.get("outcome").is_some());
        reports.next_back().with_context(|| format!("the move left no report:\n{said}"))
    }
}

/// The network is cut for half a minute in the middle of a round of a move, then
/// healed. Whatever becomes of the move, the guest was not stopped for it while
/// the network was cut, its disk, clocks and client notice nothing, and the next
/// move completes.
///
/// # Errors
/// When the guest noticed, or is not where the report says.
pub fn in_the_middle_of_precopy() -> Result<()> {
    let lab = Lab::boot(&Settings::default())?;
    let (source, destination) = (lab.host(1)?, lab.host(2)?);
    source.start_migrd_halting_at("source-precopy-chunk")?;
    destination.start_migrd(&[])?;
    let guest = Guest::on_shared_storage();
    guest.run(source)?;
    guest.wait_up(source)?;
    // On the guest's own side: its connection does not cross what is cut.
    let client = Client::start(source, &guest)?;
    let moving = Move::start(&guest, source, destination)?;
    source.wait_halted()?;
    destination.cut()?;
    source.signal_migrd("CONT")?;
    std::thread::sleep(CUT);
    client.expect_progress().context("while the network is cut")?;
    let silence = client.latest()?["longest_silence_ms"].clone();
    destination.heal()?;

    let report = moving.report()?;
    let outcome = report["outcome"].as_str().unwrap_or_default().to_owned();
    let home = match outcome.as_str() {
        "failed" => source,
        "completed" => destination,
        _ => anyhow::bail!("a move whose network was cut ended so: {report}"),
    };
    // It runs on at the source all the time.
    let phase = &report["failure"]["phase"];
    ensure!(outcome == "completed" || phase == "precopy", "the move failed in phase {phase}");
    guest.expect_alive(home)?;
    let elsewhere = if outcome == "failed" { destination } else { source };
    wait::patiently("the other host to have nothing of it", || {
        let state = elsewhere.state_of(guest.name)?;
        Ok(state.is_none_or(|state| state == "gone").then_some(()))
    })?;
    let next = home.migrate(guest.name, elsewhere, &[])?;
    guest.expect_alive(elsewhere)?;
    judge::kernel_is_content(&guest, elsewhere)?;
    let seen = client.finish()?;
    ensure!(next["outcome"] == "completed");

    let mut table = Table::new("The network was cut for 30 s in precopy", &["what", "seen"]);
    let error = report["failure"]["message"].as_str().unwrap_or_default();
    for (what, saw) in [
        ("the move", format!("{outcome} {error}")),
        ("the guest's connection", format!("whole, {} frames", seen["ticks"])),
        ("its longest silence until healed", format!("{silence} ms")),
        ("with the next move", format!("{} ms", seen["longest_silence_ms"])),
        ("the next move", "completed".to_owned()),
    ] {
        table.row(&[what.to_owned(), saw]);
    }
    table.print();
    lab.done();
    Ok(())
}
