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

/// A warning of guests whose host is itself emulated, at their start: the sizes
/// in CPUID leaf 0xd there are not those that the kernel adds up for itself.
const OF_THE_EMULATION: &str = "arch/x86/kernel/fpu/xstate.c";

/// The lines of a kernel's log that complain.
#[must_use]
pub fn complaints(kernel_log: &str) -> Vec<&str> {
    let lines: Vec<_> = kernel_log.lines().collect();
    let mut complaints = Vec::new();
    let mut rest = lines.as_slice();
    while let [line, after @ ..] = rest {
        rest = after;
        if line.contains("cut here") {
            let length = after.iter().take_while(|line| !line.contains("end trace")).count();
            let (report, beyond) = after.split_at(length);
            if report.first().is_some_and(|warning| warning.contains(OF_THE_EMULATION)) {
                rest = beyond;
                continue;
            }
        }
        if BAD_WORDS.iter().any(|word| line.contains(word)) {
            complaints.push(*line);
        }
    }
    complaints
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
    fn one_warning_that_the_emulation_causes_is_passed_over() {
        let report = |place: &str| {
            format!(
                "[1.5] ------------[ cut here ]------------\n\
                 [1.5] WARNING: CPU: 0 PID: 0 at {place}:606 some_function+0x85a/0xb19\n\
                 [1.5] Call Trace:\n\
                 [1.5] ---[ end trace 0000000000000000 ]---\n"
            )
        };
        let log = report(OF_THE_EMULATION) + &report("kernel/time/timekeeping.c");
        let found = complaints(&log);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("timekeeping"), "{found:?}");
    }

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
