//! Debian's stock kernel boots to a shell, and power is what it is elsewhere.

use anyhow::{Context, Result, ensure};

use super::table::Table;
use crate::lab::Lab;
use crate::lab::guest::{CLEAN, Guest};
use crate::lab::host::Host;
use crate::lab::settings::Settings;
use crate::wait;

/// Boots it from its bzImage, types at its console, and ends it in each of the
/// ways there are.
///
/// # Errors
/// When one of them does not do what it says.
pub fn boots_and_ends() -> Result<()> {
    let lab = Lab::start(&Settings { hosts: 1, ..Settings::default() })?;
    let host = lab.host(1)?;
    let guest = Guest { kernel: "vmlinuz", ..Guest::on_shared_storage() };
    let mut table = Table::new("A stock kernel and its power", &["done", "seen"]);
    let mut done = |what: &str, seen: &str| table.row(&[what.to_owned(), seen.to_owned()]);

    guest.run(host)?;
    guest.wait_up(host)?;
    type_in(host, &guest, "echo typed $((40 + 2)) on $(uname -r)")?;
    let log = host.wait_for_output(guest.name, "typed 42 on ")?;
    let line = log.lines().find(|line| line.contains("typed 42 on ")).unwrap_or_default();
    done("a command at the console", line.trim());

    type_in(host, &guest, "reboot")?;
    guest.wait_up_times(host, 2)?;
    let log = host.guest_log(guest.name)?;
    ensure!(log.contains(CLEAN), "the guest did not end in order before its reboot:\n{log}");
    guest.expect_alive(host)?;
    done("reboot in the guest", "boots again, runs");

    type_in(host, &guest, "poweroff")?;
    let reason = wait_stopped(host, &guest)?;
    ensure!(reason.contains("shut down"), "the guest powered off; its host says: {reason}");
    done("poweroff in the guest", &reason);
    host.migctl(&["rm", guest.name])?.ok()?;

    guest.run_again(host)?;
    guest.wait_up(host)?;
    let stopped = host.migctl(&["stop", guest.name, "--timeout", "10m"])?.ok()?;
    let log = host.guest_log(guest.name)?;
    ensure!(log.contains(CLEAN), "the power button did not end it in order:\n{log}");
    let reason = wait_stopped(host, &guest)?;
    done("migctl stop", &format!("{reason} {}", stopped.stdout.trim()));
    host.migctl(&["rm", guest.name])?.ok()?;

    guest.run_again(host)?;
    guest.wait_up(host)?;
    host.migctl(&["stop", guest.name, "--force"])?.ok()?;
    let log = host.guest_log(guest.name)?;
    ensure!(!log.contains(CLEAN), "it was forced, and ended in order");
    done("migctl stop --force", &wait_stopped(host, &guest)?);
    host.migctl(&["rm", guest.name])?.ok()?;

    table.print();
    lab.done();
    Ok(())
}

/// Types a line at the guest's console.
fn type_in(host: &Host, guest: &Guest, line: &str) -> Result<()> {
    let arguments = ["console", guest.name, "--detach-after", "3s"];
    host.migctl_with(&arguments, Some(&format!("{line}\n")))?.ok()?;
    Ok(())
}

/// Waits until the guest has stopped; why it did.
fn wait_stopped(host: &Host, guest: &Guest) -> Result<String> {
    wait::patiently(&format!("{} to stop", guest.name), || {
        let list = host.ask(&["list"])?;
        let all = list["workloads"].as_array().context("no workloads in the list")?;
        let found = all.iter().find(|workload| workload["name"] == guest.name);
        let found = found.with_context(|| format!("{} is gone", guest.name))?;
        let stopped = found["state"] == "stopped";
        Ok(stopped.then(|| found["reason"].as_str().unwrap_or_default().to_owned()))
    })
}
