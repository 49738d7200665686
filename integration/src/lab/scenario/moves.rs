//! A guest that serves TCP and writes its disk moves there and back, many times.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::table::{Table, figure};
use crate::lab::Lab;
use crate::lab::client::{Client, wall_offset_ms};
use crate::lab::guest::{CLEAN, Guest};
use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::settings::Settings;

/// What a guest's wall clock may be off beside what it stood still, in ms.
const CLOCK_TOLERANCE_MS: f64 = 50.0;

/// Where the guest's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In a directory that both hosts have.
    Shared,
    /// On each host's own disk: it is copied with each move.
    Copied,
}

/// Moves it `moves` times, then judges what its client, its kernel and its disk
/// saw.
///
/// # Errors
/// When anything is not as if it had never moved.
pub fn there_and_back(storage: Storage, moves: usize) -> Result<()> {
    let lab = Lab::start(&Settings::default())?;
    let guest = match storage {
        Storage::Shared => Guest::on_shared_storage(),
        Storage::Copied => Guest::on_local_storage(),
    };
    guest.run(lab.host(1)?)?;
    guest.wait_up(lab.host(1)?)?;
    let client = Client::start(lab.host(2)?, &guest)?;
    let mut series = Series::new(storage);
    for number in 0..moves {
        let (from, to) = if number.is_multiple_of(2) { (1, 2) } else { (2, 1) };
        series.step(lab.host(from)?, lab.host(to)?, &guest, &client)?;
    }
    let home = lab.host(if moves.is_multiple_of(2) { 1 } else { 2 })?;
    series.judge(home, &guest, client)?;
    lab.done();
    Ok(())
}

/// Moves of one guest, and what they cost.
#[derive(Debug)]
pub struct Series {
    storage: Storage,
    table: Table,
    moves: usize,
    downtime_ms: f64,
}

impl Series {
    /// None yet.
    #[must_use]
    pub fn new(storage: Storage) -> Self {
        let title = match storage {
            Storage::Shared => "Moves with shared storage",
            Storage::Copied => "Moves with their disk",
        };
        let columns = ["move", "way", "total ms", "downtime ms", "MiB", "rounds"];
        Self { storage, table: Table::new(title, &columns), moves: 0, downtime_ms: 0.0 }
    }

    /// Moves it once, and sees that it goes on there.
    ///
    /// # Errors
    /// When the move does not complete, or the guest or its client stand still.
    pub fn step(&mut self, from: &Host, to: &Host, guest: &Guest, client: &Client) -> Result<()> {
        let options: &[&str] = match self.storage {
            Storage::Shared => &[],
            Storage::Copied => &["--copy-disks"],
        };
        self.moves += 1;
        let way = format!("{} to {}", from.number(), to.number());
        let report = from.migrate(guest.name, to, options);
        let report = report.with_context(|| format!("move {} from {way}", self.moves))?;
        self.note(&way, &report)?;
        guest.expect_alive(to).with_context(|| format!("after move {}", self.moves))?;
        client.expect_progress().with_context(|| format!("after move {}", self.moves))?;
        ensure!(from.state_of(guest.name)?.is_none_or(|state| state == "gone"), "it stayed, too");
        Ok(())
    }

    fn note(&mut self, way: &str, report: &Value) -> Result<()> {
        let bytes = report["bytes_on_wire"].as_f64().context("no bytes in the report")?;
        self.downtime_ms += report["downtime_ms"].as_f64().context("no downtime in the report")?;
        let row = [
            self.moves.to_string(),
            way.to_owned(),
            figure(report, "total_ms"),
            figure(report, "downtime_ms"),
            format!("{:.1}", bytes / f64::from(1 << 20)),
            report["rounds"].as_array().map_or(0, Vec::len).to_string(),
        ];
        eprintln!("move {}", row.join("  "));
        self.table.row(&row);
        Ok(())
    }

    /// Ends the guest in order and looks at everything that it leaves behind.
    ///
    /// # Errors
    /// Saying what is wrong.
    pub fn judge(self, home: &Host, guest: &Guest, client: Client) -> Result<()> {
        judge::kernel_is_content(guest, home)?;
        let at_first = client.first_wall_offset_ms();
        let seen = client.finish()?;
        home.migctl(&["stop", guest.name, "--timeout", "10m"])?.ok()?;
        let log = home.guest_log(guest.name)?;
        ensure!(log.contains(CLEAN), "the guest did not end in order:\n{log}");
        let synced = seen["server_records"].as_u64().context("no number of records")?;
        let disk = judge::disk_is_whole(guest, home, synced)?;
        home.migctl(&["rm", guest.name])?.ok()?;

        let offset_ms = wall_offset_ms(&seen)?;
        let allowed = self.downtime_ms + CLOCK_TOLERANCE_MS;
        self.table.print();
        println!(
            "one connection: {} frames from the guest, {} echoes, longest silence {} ms\n\
             disk: file system clean, {} records and none missing, longest gap {} ms\n\
             the guest's wall clock was {at_first:.1} ms off, is {offset_ms:.1} ms off; downtimes \
             together {:.1} ms\n\
             the guest's kernel: no lockup, no stall, no watchdog, no I/O error",
            seen["ticks"],
            seen["echoed"],
            seen["longest_silence_ms"],
            disk["records"],
            disk["largest_gap_ns"].as_u64().unwrap_or_default() / 1_000_000,
            self.downtime_ms,
        );
        ensure!(
            offset_ms.abs() < allowed,
            "the guest's wall clock is {offset_ms:.1} ms off; {allowed:.1} ms were allowed"
        );
        Ok(())
    }
}
