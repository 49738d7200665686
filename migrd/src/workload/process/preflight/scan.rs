//! The whole look at a tree.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use super::files::UsedFile;
use super::places::Probe;
use super::report::Report;
use super::tree::Tree;
use super::{
    Findings, Options, anonymous, deleted, descriptors, devices, files, locks, mappings,
    namespaces, outside, pipes, places, procfs, sockets, tcp, ttys, unix,
};
use crate::keeper::mounts;
use crate::sys::process;
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

    let carried = places::carried(&tree, options);
    let mut files = files::of(there.iter().copied().filter(|place| !place.is_on(&carried)));
    files.extend(elsewhere(&tree, &unix));
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

/// What else it must find: directories of its Unix sockets, and something wherever
/// something is mounted that does not move with it.
fn elsewhere(tree: &Tree, unix: &unix::Known<'_, '_>) -> Vec<UsedFile> {
    let sockets: BTreeSet<_> = unix.bound().map(PathBuf::from).collect();
    let sockets = sockets.into_iter().filter(|path| !mounts::is_own(path));
    let sockets = sockets.map(|path| files::thing(path, files::Kind::Socket, 0));
    let mounted = mounts::of(&tree.init.to_string()).unwrap_or_default();
    let root = procfs::path(tree.init, "root");
    // Of the kernel's own file systems a tree keeps nothing that is mounted on them.
    let points = mounts::external(&mounted)
        .into_iter()
        .filter(|path| !path.starts_with("/proc/") && !path.starts_with("/sys/"));
    let points = points.filter_map(|path| {
        let found = Probe::of(&root.join(path.strip_prefix('/')?))?;
        Some(files::thing(path.into(), files::Kind::MountPoint, found.stat.st_mode))
    });
    sockets.chain(points).collect()
}

/// What is wrong with the processes themselves.
fn processes(tree: &Tree, report: &mut Report) {
    for process in &tree.processes {
        // CRIU runs with this daemon's rights.
        let limits = process::may_read_limits(process.pid);
        if limits.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            report.add(
                "other-user",
                format!(
                    "{process} runs as another user than migrd, and CRIU may not read its limits"
                ),
                "run migrd with CAP_SYS_RESOURCE (in a container: --cap-add SYS_RESOURCE), or \
                 the program as root",
            );
        }
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
