//! What a guest's kernel and disk say about what was done to it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::guest::{self, Guest};
use super::host::Host;

/// Words of a kernel that something has gone wrong with its time, its CPUs or
/// its devices.
const BAD_WORDS: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "rcu_preempt detected stalls",
    "rcu: INFO:",
    "self-detected stall",
    "clocksource: Marking clocksource",
    "clocksource: timekeeping watchdog",
    "I/O error",
    "EXT4-fs error",
    "WARNING: CPU",
    "BUG:",
    "Oops",
    "blocked for more than",
    "general protection",
    "Call Trace",
];

/// The lines of a kernel's log that complain.
#[must_use]
pub fn complaints(kernel_log: &str) -> Vec<&str> {
    let lines = kernel_log.lines();
    lines.filter(|line| BAD_WORDS.iter().any(|word| line.contains(word))).collect()
}

/// Checks that the guest's kernel has nothing to complain of.
///
/// # Errors
/// With its complaints.
pub fn kernel_is_content(guest: &Guest, from: &Host) -> Result<()> {
    let log = guest.shell(from, "dmesg")?;
    ensure!(log.contains("Linux version"), "the guest's dmesg is not whole:\n{log}");
    let complaints = complaints(&log);
    ensure!(complaints.is_empty(), "the guest's kernel complains:\n{}", complaints.join("\n"));
    Ok(())
}

/// Checks the disk of a guest that has ended in order: the file system is clean,
/// and of its records none is wrong and none missing. What `witness check` said.
///
/// # Errors
/// Saying what is wrong.
pub fn disk_is_whole(guest: &Guest, host: &Host, at_least: u64) -> Result<Value> {
    let disk = &guest.disk;
    host.exec(&["e2fsck", "-f", "-n", disk])?.ok().context("the file system is not clean")?;
    let copy = "/lab/disk/records";
    host.exec(&["debugfs", "-R", &format!("dump /records {copy}"), disk])?.ok()?;
    let witness = guest::file("witness")?;
    let checked = host.exec(&[&witness, "check", copy])?.ok().context("records are wrong")?;
    let summary: Value = serde_json::from_str(checked.stdout.trim())
        .with_context(|| format!("witness check printed {}", checked.stdout))?;
    let records = summary["records"].as_u64().context("no number of records")?;
    ensure!(
        records >= at_least,
        "the disk has {records} records, and the guest had synced {at_least}"
    );
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_complains_is_heard() {
        let log = "[    0.0] Linux version 6.1\n\
                   [   50.1] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!\n\
                   [   51.0] clocksource: Switched to clocksource tsc\n\
                   [   60.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\n";
        assert_eq!(complaints(log).len(), 2);
        assert!(complaints("[    0.0] Linux version 6.1\n").is_empty());
    }
}
