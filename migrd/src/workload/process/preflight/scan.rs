//! The whole look at a tree.

use super::report::Report;
use super::tree::Tree;
use super::{
    Findings, Options, anonymous, deleted, descriptors, devices, files, locks, mappings,
    namespaces, outside, pipes, places, sockets, tcp, ttys, unix,
};
use crate::workload::WorkloadError;

/// Looks through the tree whose first process is `init`, without stopping it or
/// opening anything of it, and says what keeps it from moving and what it needs.
/// Blocks for some milliseconds.
///
/// # Errors
/// When there is no such process, or /proc can't be read.
pub fn scan(init: u32, options: &Options) -> Result<Findings, WorkloadError> {
    let tree = Tree::read(init)?;
    let mut report = Report::default();
    processes(&tree, &mut report);

    let descriptors = descriptors::read(&tree);
    let mappings = mappings::read(&tree);
    let places = places::read(&tree, &descriptors, &mappings);

    anonymous::check(&tree, &descriptors, &mut report);
    mappings::check(&mappings, &mut report);
    devices::check(&places, &descriptors, options, &mut report);
    ttys::check(&places, &descriptors, &mut report);
    locks::check(&descriptors, options, &mut report);
    namespaces::check(&tree, &descriptors, &places, options, &mut report);
    let there = deleted::check(&tree, &places, options, &mut report);

    let sorted = sockets::sort(&descriptors, &mut report);
    let established = tcp::check(&sorted.tcp, options, &mut report);
    let unix = unix::read(sorted.unix, &mut report);
    let pipes = pipes::wanted(&descriptors, options);
    let outside = outside::Outside::find(&tree, &pipes, &unix.wanted());
    unix.check(&outside, &mut report);
    pipes::check(&descriptors, &outside, options, &mut report);

    let files = files::of(&there);
    if files.len() > files::MAX_FILES {
        report.add(
            "too-many-files",
            format!("it uses {} files, and at most {} are compared", files.len(), files::MAX_FILES),
            "have the program close files, or move it in a VM",
        );
    }
    Ok(Findings {
        problems: report.finish(),
        files,
        processes: tree.processes.len(),
        threads: tree.processes.iter().map(|process| process.threads.len()).sum(),
        resident_bytes: tree.processes.iter().map(|process| process.resident_bytes).sum(),
        established,
    })
}

/// What is wrong with the processes themselves.
fn processes(tree: &Tree, report: &mut Report) {
    for process in &tree.processes {
        if let Some(tracer) = process.tracer {
            report.add(
                "ptraced",
                format!("{process} is traced by process {tracer}, and only one may trace it"),
                "end the debugger or strace",
            );
        }
        if process.zombie && process.threads.len() > 1 {
            report.add(
                "leader-ended",
                format!("the first thread of {process} has ended while others run on"),
                "have the program's main thread wait for the others",
            );
        }
        if process.session_outside && !process.zombie {
            report.add(
                "session-outside",
                format!("the session of {process} was begun outside of the workload"),
                "start it inside of the workload, in a session of its own (setsid)",
            );
        }
    }
}
