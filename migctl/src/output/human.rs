//! Results as tables and text for people.

use comfy_table::{CellAlignment, Table, presets};

use super::json::{
    AdoptPlan, Blocker, CheckpointPlan, Host, Inspection, Migration, MigrationFailure, Outcome,
    Plan, Process, Workload,
};
use crate::units::{plain, show_bytes, show_ms};

/// `list`.
pub fn workloads(workloads: &[Workload]) -> String {
    if workloads.is_empty() {
        return "No workloads.".to_owned();
    }
    let mut table = table(&["NAME", "KIND", "STATE", "EPOCH", "MEMORY", "CPUS", "NOTE"]);
    for workload in workloads {
        table.add_row(vec![
            plain(&workload.name),
            workload.kind.to_owned(),
            workload.state.to_owned(),
            workload.epoch.to_string(),
            // Process trees have what they take.
            if workload.memory_bytes == 0 { none() } else { show_bytes(workload.memory_bytes) },
            if workload.cpus == 0 { none() } else { workload.cpus.to_string() },
            note(workload),
        ]);
    }
    align_right(&mut table, &[3, 4, 5]);
    trimmed(&table)
}

fn none() -> String {
    "-".to_owned()
}

/// One sentence about a workload after a verb changed it.
pub fn workload(workload: &Workload) -> String {
    let note = note(workload);
    let note = if note.is_empty() { note } else { format!(": {note}") };
    format!("{} is {} (epoch {}){note}", plain(&workload.name), workload.state, workload.epoch)
}

fn note(workload: &Workload) -> String {
    let moved = workload.moved_to.as_ref().map(|peer| match workload.state {
        "in_doubt" => format!("{peer} has not said the last word"),
        "migrating" => format!("runs at {peer}"),
        _ => format!("now at {peer}"),
    });
    let parts: Vec<_> = [moved, workload.reason.clone()].into_iter().flatten().collect();
    plain(&parts.join("; "))
}

/// `inspect`.
pub fn inspection(inspection: &Inspection) -> String {
    let workload = &inspection.workload;
    let mut facts = vec![
        ("name", workload.name.clone()),
        ("id", workload.id.clone()),
        ("kind", workload.kind.to_owned()),
        ("state", workload.state.to_owned()),
        ("note", note(workload)),
        ("epoch", workload.epoch.to_string()),
    ];
    match &inspection.process {
        Some(process) => facts.extend(self::process(inspection, process)),
        None => facts.extend(vm(inspection)),
    }
    facts.extend([
        ("log", show_bytes(inspection.log_bytes)),
        ("log dropped", show_bytes(inspection.log_dropped_bytes)),
    ]);
    facts.extend(inspection.disks.iter().map(|disk| {
        let how = if disk.read_only { " (read-only)" } else { "" };
        ("disk", format!("{}{how}", disk.path))
    }));
    facts.extend(inspection.nets.iter().map(|net| {
        let bridge = net.bridge.as_ref().map_or_else(String::new, |b| format!(" in {b}"));
        ("network", format!("{}{bridge}, {}", net.tap, net.mac))
    }));
    facts.retain(|(label, value)| *label != "note" || !value.is_empty());
    let mut text = aligned(&facts);
    if let Some(last) = &inspection.last_migration {
        text.push_str(&format!("\nlast migration:\n{}{}", migration(last), why(last)));
    }
    text
}

fn vm(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let workload = &inspection.workload;
    vec![
        ("cpus", workload.cpus.to_string()),
        ("cpu model", cpu_model(inspection)),
        ("memory", show_bytes(workload.memory_bytes)),
        ("memory touched", show_bytes(inspection.memory_populated_bytes)),
        ("vmm overhead", show_bytes(inspection.vmm_overhead_bytes)),
        ("vmm pid", pid(inspection.vmm_pid)),
        ("kernel", inspection.kernel.clone()),
        ("initrd", inspection.initrd.clone().unwrap_or_else(|| "none".to_owned())),
        ("cmdline", inspection.cmdline.clone()),
    ]
}

fn process(inspection: &Inspection, process: &Process) -> Vec<(&'static str, String)> {
    let words: Vec<_> = process.argv.iter().map(|word| quoted(word)).collect();
    let net = process.net.as_ref().map_or_else(
        || "the host's".to_owned(),
        |net| {
            let gateway = net.gateway.as_ref().map(|g| format!(", gateway {g}"));
            let mac = net.mac.as_ref().map(|mac| format!(", {mac}"));
            let more = [gateway, mac].into_iter().flatten().collect::<String>();
            format!("{} in {}{more}", net.ip, net.bridge)
        },
    );
    // What a bundle says of its network is not known here.
    let net = match (&process.net, &process.container) {
        (None, Some(_)) => "as its bundle says".to_owned(),
        _ => net,
    };
    let mut facts = vec![
        ("command", words.join(" ")),
        ("directory", process.cwd.clone()),
        ("network", net),
        ("pid", pid(process.pid)),
        ("processes", process.processes.to_string()),
        ("memory", show_bytes(inspection.memory_populated_bytes)),
        ("keeper overhead", show_bytes(inspection.vmm_overhead_bytes)),
    ];
    if let Some(container) = &process.container {
        facts.extend([
            ("bundle", container.bundle.clone()),
            ("root file system", format!("{} ({})", container.rootfs, container.rootfs_mode)),
            ("container of runc", container.runc_id.clone()),
        ]);
    }
    facts
}

fn pid(pid: Option<u32>) -> String {
    pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string())
}

/// A word of a command as a shell would take it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn cpu_model(inspection: &Inspection) -> String {
    match &inspection.cpu {
        Some(cpu) => format!("{} ({} features)", cpu.name, cpu.features.len()),
        None => "that of its first host".to_owned(),
    }
}

/// The summary at the end of a migration.
pub fn migration(result: &Migration) -> String {
    let headline = match result.outcome {
        Outcome::Completed => format!("{} now runs at", result.workload),
        Outcome::Cancelled => {
            format!("{} stays at its source; cancelled on the way to", result.workload)
        }
        Outcome::Failed if !result.blockers.is_empty() => {
            format!("{} was not moved to", result.workload)
        }
        Outcome::Failed => format!("{} stays at its source; it did not move to", result.workload),
        Outcome::InDoubt => {
            format!("{} is IN DOUBT: it is not known to run at", result.workload)
        }
    };
    let mut facts = vec![("outcome", result.outcome.name().to_owned())];
    if let Some(total) = result.total_ms.filter(|_| result.blockers.is_empty()) {
        facts.push(("mode", with_reason(result.mode, result.mode_reason.as_deref())));
        facts.push(("total", show_ms(total)));
        facts.push(("downtime", downtime(result)));
        facts.push(("rounds", rounds(result)));
        facts.push(("pages", pages(result)));
        facts.push(("on the wire", show_bytes(result.bytes_on_wire.unwrap_or_default())));
    }
    let verified = match result.verified {
        None => "not asked for",
        Some(true) => "yes: memory is the same at both ends",
        Some(false) => "NO: memory differs",
    };
    facts.push(("verified", verified.to_owned()));
    format!("{} {}\n{}", plain(&headline), plain(&result.destination), aligned(&facts))
}

/// Why it did not move, which `migrate` itself says on stderr.
fn why(result: &Migration) -> String {
    if !result.blockers.is_empty() {
        return result.blockers.iter().map(blocker).collect();
    }
    let Some(failure) = &result.failure else { return String::new() };
    let MigrationFailure { message, host, phase, remedy } = failure;
    let mut facts = vec![("why", message.clone())];
    facts.extend(host.clone().map(|host| ("at", host)));
    facts.extend(phase.map(|phase| ("phase", phase.to_owned())));
    facts.extend(remedy.clone().map(|remedy| ("what to do", remedy)));
    format!("\n{}", aligned(&facts))
}

fn with_reason(mode: &str, reason: Option<&str>) -> String {
    reason.map_or_else(|| mode.to_owned(), |reason| format!("{mode}: {}", plain(reason)))
}

fn downtime(result: &Migration) -> String {
    let mut text = show_ms(result.downtime_ms.unwrap_or_default());
    if let Some(parts) = &result.downtime_breakdown_ms {
        let mut named = vec![
            ("pause", parts.pause),
            ("memory", parts.memory),
            ("state", parts.state),
            ("restore", parts.restore),
            ("resume", parts.resume),
        ];
        named.extend(parts.verify.map(|ms| ("verify", ms)));
        let named: Vec<_> =
            named.iter().map(|(name, ms)| format!("{name} {}", show_ms(*ms))).collect();
        text.push_str(&format!(" ({})", named.join(", ")));
    }
    match result.predicted_downtime_ms.filter(|ms| *ms > 0.0) {
        Some(predicted) => format!("{text}; predicted {}", show_ms(predicted)),
        None => format!("{text}; not predicted: nothing was measured to that host yet"),
    }
}

fn rounds(result: &Migration) -> String {
    let sizes: Vec<_> = result.rounds.iter().map(|round| show_bytes(round.bytes)).collect();
    match sizes.len() {
        0 => "0".to_owned(),
        count => format!("{count} ({})", sizes.join(", ")),
    }
}

fn pages(result: &Migration) -> String {
    let after = match result.pages_after_switch {
        Some(pages @ 1..) => format!(", {pages} after it ran there"),
        Some(0) | None => String::new(),
    };
    let skipped = match result.pages_skipped {
        Some(pages @ 1..) => format!(", {pages} skipped"),
        Some(0) | None => String::new(),
    };
    format!(
        "{} sent, {} zero{skipped}{after}",
        result.pages_sent.unwrap_or_default(),
        result.pages_zero.unwrap_or_default(),
    )
}

fn blocker(blocker: &Blocker) -> String {
    let host = blocker.host.as_ref().map(|host| format!(" (at {host})")).unwrap_or_default();
    let remedy = blocker.remedy.as_ref().map(|r| format!("\n    what to do: {}", plain(r)));
    format!(
        "\n  {}: {}{}{}",
        plain(&blocker.code),
        plain(&blocker.message),
        plain(&host),
        remedy.unwrap_or_default()
    )
}

/// `migrate --dry-run`.
pub fn plan(plan: &Plan) -> String {
    let verdict = if plan.possible { "can move" } else { "cannot move" };
    let rate = plan
        .measured_rate_bytes_per_s
        .map_or_else(|| "not measured".to_owned(), |rate| format!("{}/s", show_bytes(rate)));
    let predicted =
        |ms: Option<f64>| ms.map_or_else(|| "not known before a first migration".into(), show_ms);
    let allowed = match plan.max_downtime_ms {
        ms if ms > 0.0 => show_ms(ms),
        _ => "as short as can be".to_owned(),
    };
    let mut facts = vec![
        ("source", plan.source.clone()),
        ("destination", plan.destination.clone()),
        ("mode", with_reason(plan.mode, plan.mode_reason.as_deref())),
    ];
    let touched = show_bytes(plan.populated_bytes);
    match plan.memory_bytes {
        // A process tree has no other memory than what it has touched.
        0 => facts.push(("memory", touched)),
        all => facts.extend([("memory", show_bytes(all)), ("memory touched", touched)]),
    }
    facts.extend([
        ("destination free", show_bytes(plan.destination_free_bytes)),
        ("link rate", rate),
        ("predicted total", predicted(plan.predicted_total_ms)),
        ("predicted downtime", predicted(plan.predicted_downtime_ms)),
        ("allowed downtime", allowed),
    ]);
    if let Some(bytes) = plan.rootfs_bytes {
        facts.push(("root file system", format!("{} are sent while it runs", show_bytes(bytes))));
    }
    let mut text = format!("{} {verdict}; nothing was touched", plain(&plan.workload));
    text.push('\n');
    text.push_str(&aligned(&facts));
    for blocker in &plan.blockers {
        text.push_str(&self::blocker(blocker));
    }
    text
}

/// `adopt` that was refused, or `--dry-run`.
pub fn adopt_plan(plan: &AdoptPlan) -> String {
    let verdict = if plan.possible { "can be adopted" } else { "cannot be adopted" };
    let mut text = format!("process {} {verdict}; nothing was touched", plan.pid);
    for blocker in &plan.blockers {
        text.push_str(&self::blocker(blocker));
    }
    text
}

/// `checkpoint --dry-run`.
pub fn checkpoint_plan(plan: &CheckpointPlan) -> String {
    let verdict = if plan.possible { "can be saved" } else { "cannot be saved" };
    let mut text = format!(
        "{} {verdict} in {}; nothing was touched",
        plain(&plan.workload),
        plain(&plan.directory)
    );
    for blocker in &plan.blockers {
        text.push_str(&self::blocker(blocker));
    }
    text
}

/// `hosts`.
pub fn hosts(hosts: &[Host]) -> String {
    let mut table = table(&[
        "ADDRESS",
        "VERSION",
        "KERNEL",
        "CPUS",
        "MEMORY",
        "FREE",
        "RESERVED",
        "KVM",
        "CPU",
        "CRIU",
        "WORKLOADS",
    ]);
    for host in hosts {
        let kvm = host.kvm_problem.clone().unwrap_or_else(|| "no".to_owned());
        table.add_row(vec![
            plain(&host.address),
            plain(&host.version),
            plain(&host.kernel),
            host.cpus.to_string(),
            show_bytes(host.memory_total_bytes),
            show_bytes(host.memory_free_bytes),
            show_bytes(host.memory_reserved_bytes),
            if host.kvm { "yes".to_owned() } else { plain(&kvm) },
            host.cpu.as_ref().map_or_else(|| "-".to_owned(), |cpu| plain(&cpu.vendor)),
            criu(host),
            host.workloads.to_string(),
        ]);
    }
    align_right(&mut table, &[3, 4, 5, 6, 10]);
    trimmed(&table)
}

/// The version that works there, or why none does; a peer tells neither.
fn criu(host: &Host) -> String {
    let told = host.criu_problem.as_ref().or(host.criu.as_ref());
    told.map_or_else(|| "-".to_owned(), |text| plain(text))
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for index in columns {
        if let Some(column) = table.column_mut(*index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// Lines without the padding at their ends.
fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Two columns: labels and values.
fn aligned(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(label, _)| label.len()).max().unwrap_or_default();
    let lines: Vec<_> =
        facts.iter().map(|(label, value)| format!("  {label:width$}  {}", plain(value))).collect();
    lines.join("\n")
}
