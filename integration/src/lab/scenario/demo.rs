//! What migr does, in a few minutes.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::moves::{Series, Storage};
use super::power;
use super::table::Table;
use crate::lab::client::Client;
use crate::lab::guest::Guest;
use crate::lab::host::Host;

/// Moves of the demo.
const MOVES: usize = 4;

/// Boots a stock guest on host 1, moves it there and back under a client's eyes,
/// takes host 1's power away in the middle of a move, and judges what the guest
/// saw.
///
/// # Errors
/// When anything is not as if it had never moved.
pub fn show(hosts: &[Host]) -> Result<()> {
    let [one, two] = hosts else { anyhow::bail!("the demo is for two hosts") };
    let mut table = Table::new("What was shown", &["what", "seen", "s"]);
    let mut started = Instant::now();
    let mut shown = |what: &str, seen: &str| {
        eprintln!("{what}: {seen}");
        let seconds = format!("{:.0}", started.elapsed().as_secs_f64());
        table.row(&[what.to_owned(), seen.to_owned(), seconds]);
        started = Instant::now();
    };

    let guest = Guest { kernel: "vmlinuz", ..Guest::on_shared_storage() };
    guest.run(one)?;
    guest.wait_up(one)?;
    let client = Client::start(two, &guest)?;
    let release = guest.shell(two, "uname -r")?;
    shown("a stock kernel boots on host 1", last_line(&release));

    let mut series = Series::new(Storage::Shared);
    for number in 0..MOVES {
        let (from, to) = if number.is_multiple_of(2) { (one, two) } else { (two, one) };
        series.step(from, to, &guest, &client)?;
    }
    shown("moves there and back", &format!("{MOVES}, a client on host 2 kept one connection"));

    // The daemon is exchanged under the guest, which goes on.
    one.signal_migrd("TERM")?;
    one.wait_migrd_ended()?;
    one.start_migrd_halting_at("source-activated")?;
    guest.expect_alive(one).context("under another daemon")?;
    shown("migrd was exchanged under the guest", "it ran on");

    let there = power::lose_source(one, two, &guest, &client)?;
    ensure!(two.state_of(guest.name)?.as_deref() == Some("running"), "it does not run at host 2");
    shown("host 1 lost its power after it released the guest", "it runs on host 2");
    shown("host 1 was powered on again", &there);

    series.judge(two, &guest, client)?;
    shown("the guest was shut down and looked at", "nothing wrong");
    table.print();
    Ok(())
}

fn last_line(text: &str) -> &str {
    text.trim().lines().last().unwrap_or_default()
}
