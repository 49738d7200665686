//! Pipes. CRIU takes one whose other end stays behind, and gives the tree one
//! that leads nowhere: so that is said here.

use std::collections::HashSet;

use super::Options;
use super::descriptors::{Descriptor, Kind};
use super::outside::Outside;
use super::report::Report;

/// The pipes whose holders matter.
pub(super) fn wanted(descriptors: &[Descriptor<'_>], options: &Options) -> HashSet<u64> {
    descriptors.iter().filter_map(|d| inode(d, options)).collect()
}

pub(super) fn check(
    descriptors: &[Descriptor<'_>],
    outside: &Outside,
    options: &Options,
    report: &mut Report,
) {
    let mut told = HashSet::new();
    for descriptor in descriptors {
        let Some(inode) = inode(descriptor, options) else { continue };
        if descriptor.info.flags & libc::O_DIRECT != 0 {
            report.add(
                "packet-pipe",
                format!("{descriptor} is a pipe in packet mode, which CRIU does not carry"),
                "start the program without what opens it (O_DIRECT)",
            );
        }
        if let Some(holder) = outside.pipes.get(&inode)
            && told.insert(inode)
        {
            report.add(
                "pipe-outside",
                format!("{descriptor} is a pipe to {holder}, which is not part of the workload"),
                "start both together as one workload (sh -c 'a | b'), or have the program write \
                 to a file",
            );
        }
    }
}

fn inode(descriptor: &Descriptor<'_>, options: &Options) -> Option<u64> {
    match descriptor.kind {
        Kind::Pipe(inode) if !options.kept_pipes.contains(&inode) => Some(inode),
        _ => None,
    }
}
