//! A host loses its power in the middle of a move.

use anyhow::{Context, Result, ensure};

use super::cut::Move;
use super::table::Table;
use crate::lab::Lab;
use crate::lab::client::Client;
use crate::lab::guest::Guest;
use crate::lab::host::Host;
use crate::lab::process::Life;
use crate::lab::settings::Settings;
use crate::wait;

/// The source goes off when the destination has the guest: it runs there, and
/// the source, on again, knows that it does not own it.
///
/// # Errors
/// When it does not run, or runs twice.
pub fn source_off_after_released() -> Result<()> {
    let lab = Lab::boot(&Settings::default())?;
    let (source, destination) = (lab.host(1)?, lab.host(2)?);
    source.start_migrd_halting_at("source-activated")?;
    destination.start_migrd(&[])?;
    let guest = Guest::on_shared_storage();
    guest.run(source)?;
    guest.wait_up(source)?;
    let client = Client::start(destination, &guest)?;
    let there = lose_source(source, destination, &guest, &client)?;
    destination.migrate(guest.name, source, &[])?;
    guest.expect_alive(source)?;
    let seen = client.finish()?;
    table(
        "The source went off after Released",
        &[
            ("the guest", "runs at the destination".to_owned()),
            ("its connection", format!("whole, {} frames", seen["ticks"])),
            ("the source, on again", there),
            ("a move back", "completed".to_owned()),
        ],
    );
    lab.done();
    Ok(())
}

/// Moves the guest from a source that stands still once the destination has the
/// guest, takes the source's power away, sees the guest go on, and powers the
/// source on again; what the source then says of the guest.
///
/// # Errors
/// When the guest does not go on, or the source thinks that it owns it.
pub fn lose_source(
    source: &Host,
    destination: &Host,
    guest: &Guest,
    client: &Client,
) -> Result<String> {
    let _moving = Move::start(guest, source, destination)?;
    source.wait_halted()?;
    source.power_off()?;
    guest.expect_alive(destination).context("with its source off")?;
    client.expect_progress().context("with its source off")?;
    back_on(source)?;
    // It may have to ask first.
    wait::patiently("the source to know that it does not own it", || {
        let there = source.state_of(guest.name)?;
        ensure!(there.as_deref() != Some("running"), "the guest runs at both hosts");
        let known = there.as_deref().is_none_or(|state| state == "gone");
        Ok(known.then(|| there.unwrap_or_else(|| "does not have it".to_owned())))
    })
}

/// The source goes off when it has released the guest and not yet told the
/// destination: nobody may run it until the source is on again and tells.
///
/// # Errors
/// When it runs before, or not after.
pub fn source_off_before_it_told() -> Result<()> {
    let lab = Lab::boot(&Settings::default())?;
    let (source, destination) = (lab.host(1)?, lab.host(2)?);
    source.start_migrd_halting_at("source-released")?;
    destination.start_migrd(&[])?;
    let guest = Guest::on_shared_storage();
    guest.run(source)?;
    guest.wait_up(source)?;
    let _moving = Move::start(&guest, source, destination)?;
    source.wait_halted()?;
    source.power_off()?;
    wait::patiently("the destination to be in doubt", || {
        let state = destination.state_of(guest.name)?;
        ensure!(state.as_deref() != Some("running"), "it runs without having been handed over");
        Ok((state.as_deref() == Some("in_doubt")).then_some(()))
    })?;
    back_on(source)?;
    wait::patiently("the guest to run at the destination", || {
        Ok((destination.state_of(guest.name)?.as_deref() == Some("running")).then_some(()))
    })?;
    guest.expect_alive(destination)?;
    table(
        "The source went off between Released and Activate",
        &[
            ("while it is off", "the destination is in doubt and does not run it".to_owned()),
            ("the source on again", "the guest runs at the destination".to_owned()),
        ],
    );
    lab.done();
    Ok(())
}

/// The destination goes off when it has all of the guest and has not said so:
/// the guest goes on at the source.
///
/// # Errors
/// When it does not, or the destination runs it once it is on again.
pub fn destination_off_at_sealed() -> Result<()> {
    let lab = Lab::boot(&Settings::default())?;
    let (source, destination) = (lab.host(1)?, lab.host(2)?);
    source.start_migrd(&[])?;
    destination.start_migrd_halting_at("destination-sealed")?;
    let guest = Guest::on_shared_storage();
    guest.run(source)?;
    guest.wait_up(source)?;
    let client = Client::start(source, &guest)?;
    let moving = Move::start(&guest, source, destination)?;
    destination.wait_halted()?;
    destination.power_off()?;
    let report = moving.report()?;
    ensure!(report["outcome"] == "failed", "{report}");
    guest.expect_alive(source)?;
    client.expect_progress()?;

    back_on(destination)?;
    wait::patiently("the destination to know that it has nothing", || {
        Ok(destination.state_of(guest.name)?.is_none().then_some(()))
    })?;
    guest.expect_alive(source)?;
    source.migrate(guest.name, destination, &[])?;
    guest.expect_alive(destination)?;
    let seen = client.finish()?;
    table(
        "The destination went off at Sealed",
        &[
            ("the move", "failed".to_owned()),
            ("the guest", "goes on at the source".to_owned()),
            ("its connection", format!("whole, {} frames", seen["ticks"])),
            ("the destination, on again", "does not have it".to_owned()),
            ("the next move", "completed".to_owned()),
        ],
    );
    lab.done();
    Ok(())
}

/// Powers a host on again, with the daemon as users have it.
fn back_on(host: &Host) -> Result<()> {
    host.power_on(Life::WithItsOwner)?;
    host.wait_up()?;
    host.start_migrd(&[])
}

fn table(title: &str, rows: &[(&str, String)]) {
    let mut table = Table::new(title, &["what", "seen"]);
    for (what, saw) in rows {
        table.row(&[(*what).to_owned(), saw.clone()]);
    }
    table.print();
}
