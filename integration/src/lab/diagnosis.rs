//! What can be said about a lab in which something has gone wrong.

use std::fmt::Write;
use std::fs;
use std::time::Duration;

use super::host::{Condition, Host, tail};
use super::layout::Layout;
use super::{attach, daemon};
use crate::binaries::Program;

const LINES: usize = 60;
/// How long a host may be silent before it is given up.
const LIMIT: Duration = Duration::from_secs(120);

/// Everything about every host that helps to understand a failure: what can't
/// be found out is said in its place.
#[must_use]
pub fn of(layout: &Layout) -> String {
    let mut text = format!("=== the lab in {}\n", layout.root().display());
    let hosts = match attach(layout) {
        Ok(hosts) => hosts,
        Err(error) => return format!("{text}{error:#}"),
    };
    section(&mut text, "switch", &fs::read_to_string(layout.switch_log()).unwrap_or_default());
    for host in hosts {
        of_host(&mut text, layout, &host);
    }
    text
}

fn of_host(text: &mut String, layout: &Layout, host: &Host) {
    let number = host.number();
    let condition = host.condition();
    let cable = if host.is_cut() { "cut" } else { "whole" };
    section(text, &format!("host {number}: {condition:?}, cable {cable}"), "");
    section(text, &format!("host {number}, QEMU"), &host.qemu_said());
    let console = fs::read_to_string(layout.console(number)).unwrap_or_default();
    section(text, &format!("host {number}, console"), &tail(&console, LINES));
    // A host that is off or frozen can't be asked.
    if !matches!(condition, Ok(Condition::On)) {
        return;
    }
    let migctl = Program::Migctl.path().map(|path| path.display().to_string()).unwrap_or_default();
    let migctl = format!("{migctl} --host {}", number.migrd());
    let questions = [
        ("kernel messages", format!("dmesg | tail -n {LINES}")),
        (
            "network",
            "ip -brief address; ip -brief link; bridge fdb show br br0; free -m".to_owned(),
        ),
        ("migrd", format!("tail -n 200 {}", daemon::LOG)),
        ("processes of VMs", format!("tail -n 20 {}/vms/*/vmm.log", daemon::STATE)),
        ("workloads", format!("timeout 20 {migctl} list")),
        ("guests", guest_logs(&migctl)),
    ];
    for (what, script) in questions {
        let said = host.ask_shell(&format!("({script}) 2>&1"), LIMIT);
        let silent = said.is_err();
        let said = said.unwrap_or_else(|error| format!("{error:#}"));
        section(text, &format!("host {number}, {what}"), &said);
        if silent {
            // It will not answer the next question either.
            return;
        }
    }
}

/// The end of each guest's output.
fn guest_logs(migctl: &str) -> String {
    format!(
        "for name in $(timeout 20 {migctl} -o json list | tr '{{' '\\n' | \
         sed -n 's/.*\"name\":\"\\([^\"]*\\)\".*/\\1/p'); do \
         echo \"-- $name\"; timeout 20 {migctl} logs \"$name\" | tail -n {LINES}; done"
    )
}

fn section(text: &mut String, title: &str, content: &str) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "--- {title}");
    if !content.trim().is_empty() {
        let _ = writeln!(text, "{}", content.trim_end());
    }
}
