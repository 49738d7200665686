//! Memory that a guest has freed is not sent.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::table::{Table, figure};
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::settings::Settings;
use crate::wait;

/// What the guest fills, in MiB: less than half of its memory, because its kernel
/// reports free pages only as long as many more of them are left.
const FILLED_MIB: u64 = 100;
/// What of it has to come back. Its kernel reports free memory only where 2 MiB of it are
/// in one piece, so what is in use between it keeps some.
const BACK_MIB: u64 = FILLED_MIB / 2;
/// Has the guest's kernel move what is in use together. It does so unasked when it needs
/// large pieces; here most of what was freed was seen in pieces too small to be reported
/// for minutes.
const COMPACT: &str = "echo 1 >/proc/sys/vm/compact_memory";
/// Where the program that fills it says how far it is.
const SAID: &str = "/run/memory";

/// A guest fills memory and moves, frees it and moves again: by virtio's free page
/// reporting its host has the memory back before, so the second move does not send it.
///
/// # Errors
/// When it does, or the guest can't use that memory any more.
pub fn is_not_sent() -> Result<()> {
    let lab = Lab::start(&Settings::default())?;
    let (one, two) = (lab.host(1)?, lab.host(2)?);
    let guest = Guest::on_shared_storage();
    guest.run(one)?;
    guest.wait_up(one)?;
    let columns = ["the guest's memory", "host has MiB", "pages sent", "MiB sent", "total ms"];
    let mut table = Table::new("Moves of a guest that fills memory and frees it", &columns);

    fill(&guest, one)?;
    let used = populated_mib(&guest, one)?;
    let full = one.migrate(guest.name, two, &[])?;
    note(&mut table, "in use", used, &full);

    guest.shell(two, &format!("kill $(cat {SAID}.pid)"))?;
    let mut left = used;
    wait::patiently("the guest to report what it has freed", || {
        guest.shell(two, COMPACT)?;
        left = populated_mib(&guest, two)?;
        Ok((left + BACK_MIB <= used).then_some(()))
    })
    .with_context(|| format!("of {used} MiB its host has {left} still"))?;
    let freed = two.migrate(guest.name, one, &[])?;
    note(&mut table, "freed", left, &freed);

    // What is gone at both hosts is there again when it is used.
    fill(&guest, one)?;
    guest.expect_alive(one)?;
    judge::kernel_is_content(&guest, one)?;
    table.row(&["in use again".to_owned(), populated_mib(&guest, one)?.to_string()]);
    table.print();
    let sent = |report: &Value| report["pages_sent"].as_u64().context("no pages in the report");
    let (full, freed, back) = (sent(&full)?, sent(&freed)?, BACK_MIB << 8);
    ensure!(
        freed + back <= full,
        "{full} pages were sent when they were in use and {freed} when they were not: at least \
         {back} fewer were expected"
    );
    lab.done();
    Ok(())
}

/// Has the guest fill memory and keep it.
fn fill(guest: &Guest, host: &Host) -> Result<()> {
    let program = format!("witness memory {FILLED_MIB}M --hold 86400");
    guest.shell(host, &format!("{program} </dev/null >{SAID} 2>&1 & echo $! >{SAID}.pid"))?;
    let mut said = String::new();
    wait::patiently("the guest to fill its memory", || {
        said = guest.shell(host, &format!("cat {SAID}"))?;
        Ok(said.contains("filled").then_some(()))
    })
    .with_context(|| format!("{program} said {said}"))
}

/// What of the guest's memory its host has given it, in MiB.
fn populated_mib(guest: &Guest, host: &Host) -> Result<u64> {
    let seen = host.ask(&["inspect", guest.name])?;
    let bytes = seen["memory_populated_bytes"].as_u64();
    Ok(bytes.with_context(|| format!("no memory in {seen}"))? >> 20)
}

fn note(table: &mut Table, memory: &str, has_mib: u64, report: &Value) {
    let bytes = report["bytes_on_wire"].as_f64().unwrap_or_default();
    let row = [
        memory.to_owned(),
        has_mib.to_string(),
        report["pages_sent"].to_string(),
        format!("{:.1}", bytes / f64::from(1 << 20)),
        figure(report, "total_ms"),
    ];
    eprintln!("{}", row.join("  "));
    table.row(&row);
}
