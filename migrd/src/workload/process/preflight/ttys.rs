//! Pseudoterminals: both ends must be in the tree (CRIU's
//! `tty_verify_active_pairs`).

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;

use nix::sys::stat::{SFlag, major, minor};

use super::descriptors::Descriptor;
use super::places::{Place, Role};
use super::report::Report;

/// First major number of the slaves' side (Documentation/admin-guide/devices.txt).
const SLAVES: u64 = 136;

pub(super) fn check(places: &[Place<'_>], descriptors: &[Descriptor<'_>], report: &mut Report) {
    let masters: HashSet<u64> =
        descriptors.iter().filter_map(|d| d.info.tty_index).map(u64::from).collect();
    for place in places.iter().filter(|place| matches!(place.role, Role::Descriptor(_))) {
        let rdev = place.probe.stat.st_rdev;
        let slave = place.probe.format() == SFlag::S_IFCHR && major(rdev) == SLAVES;
        // Without a master anywhere it is hung up, and carried so.
        let hung_up = place.path.as_os_str().as_bytes().ends_with(b" (deleted)");
        if slave && !hung_up && !masters.contains(&minor(rdev)) {
            report.add(
                "tty-outside",
                format!(
                    "{place} is the terminal {}, which a process outside of the workload holds",
                    place.path.display()
                ),
                "start it without a terminal of yours, or below one of its own (script, tmux, \
                 sshd inside the workload)",
            );
        }
    }
}
