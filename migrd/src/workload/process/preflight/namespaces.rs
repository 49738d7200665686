//! Namespaces below the tree's own: which ones CRIU carries is in its
//! `namespaces.c` and `pstree.c`.

use std::collections::HashSet;

use super::Options;
use super::descriptors::{Descriptor, Kind};
use super::places::{Place, namespace};
use super::report::Report;
use super::tree::{Process, Tree};

/// Those that CRIU carries only for the whole tree.
const WHOLE: [&str; 6] = ["pid", "user", "ipc", "uts", "time", "cgroup"];
/// All that a descriptor may be of.
const ALL: [&str; 8] = ["pid", "user", "ipc", "uts", "time", "cgroup", "mnt", "net"];

pub(super) fn check(
    tree: &Tree,
    descriptors: &[Descriptor<'_>],
    places: &[Place<'_>],
    options: &Options,
    report: &mut Report,
) {
    let here = std::process::id();
    let roots = |kind| [namespace(tree.init, kind), namespace(here, kind)];
    for process in &tree.processes {
        for kind in WHOLE {
            nested(process, kind, &roots(kind), report);
        }
        // A network below that of a tree without one of its own can't be made
        // again.
        if !options.own_network {
            nested(process, "net", &roots("net"), report);
        }
        let children = namespace(process.pid, "time_for_children");
        if children.is_some() && children != namespace(process.pid, "time") {
            refuse(process, "time", report);
        }
    }
    open(tree, here, descriptors, report);
    if namespace(tree.init, "ipc") == namespace(here, "ipc") {
        for place in places.iter().filter(|place| place.is_system_v()) {
            let name = place.path.to_string_lossy();
            let key = name.trim_start_matches('/').trim_end_matches(" (deleted)");
            report.add(
                "shared-anon-outside",
                format!(
                    "{} uses the System V shared memory {key}, which is the host's and does not \
                     move",
                    place.process
                ),
                "have the program use POSIX shared memory, or start it below \"unshare --ipc\"",
            );
        }
    }
}

fn nested(process: &Process, kind: &str, roots: &[Option<u64>], report: &mut Report) {
    let mine = namespace(process.pid, kind);
    if mine.is_some() && !roots.contains(&mine) {
        refuse(process, kind, report);
    }
}

fn refuse(process: &Process, kind: &str, report: &mut Report) {
    report.add(
        "nested-namespace",
        format!("{process} is in a {kind} namespace of its own, which CRIU does not carry"),
        "start the program without its sandbox or containers inside of the workload",
    );
}

/// Descriptors of namespaces that nobody in the tree is in.
fn open(tree: &Tree, here: u32, descriptors: &[Descriptor<'_>], report: &mut Report) {
    let open = || descriptors.iter().filter(|d| matches!(d.kind, Kind::Namespace(_)));
    if open().next().is_none() {
        return;
    }
    let pids = tree.processes.iter().map(|process| process.pid).chain([here]);
    let known: HashSet<u64> =
        pids.flat_map(|pid| ALL.iter().filter_map(move |kind| namespace(pid, kind))).collect();
    for descriptor in open() {
        let Kind::Namespace(inode) = descriptor.kind else { continue };
        if !known.contains(&inode) {
            report.add(
                "namespace-fd",
                format!("{descriptor} is a namespace that no process of the workload is in"),
                "have the program close it, or enter it",
            );
        }
    }
}
