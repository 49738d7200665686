//! Open and mapped devices. Which ones CRIU carries is in its `files.c`,
//! `tty.c` and `proc_parse.c`.

use nix::sys::stat::{SFlag, major, minor};

use super::Options;
use super::descriptors::Descriptor;
use super::places::{Place, Role};
use super::report::Report;

/// `/dev/zero`, the only device whose mappings are carried.
const ZERO: (u64, u64) = (1, 5);
/// `/dev/net/tun`.
const TUN: (u64, u64) = (10, 200);

pub(super) fn check(
    places: &[Place<'_>],
    descriptors: &[Descriptor<'_>],
    options: &Options,
    report: &mut Report,
) {
    for place in places {
        match place.role {
            Role::Descriptor(fd) => {
                let same = |d: &&Descriptor<'_>| d.fd == fd && d.process.pid == place.process.pid;
                let interface =
                    descriptors.iter().find(same).and_then(|d| d.info.interface.clone());
                open(place, interface.as_deref(), options, report);
            }
            Role::Mapping => mapped(place, report),
            Role::Executable | Role::WorkingDirectory | Role::RootDirectory => {}
        }
    }
}

fn open(place: &Place<'_>, interface: Option<&str>, options: &Options, report: &mut Report) {
    let rdev = place.probe.stat.st_rdev;
    let number = (major(rdev), minor(rdev));
    let format = place.probe.format();
    if format == SFlag::S_IFCHR && number == TUN {
        tun(place, interface, options, report);
        return;
    }
    if format == SFlag::S_IFBLK || (format == SFlag::S_IFCHR && !is_carried(number)) {
        report.add(
            "device",
            format!(
                "{place} is the device {} ({}:{}), which CRIU does not carry",
                place.path.display(),
                number.0,
                number.1
            ),
            "have the program close it; what needs a device of this host can't move",
        );
    }
}

fn is_carried((major, minor): (u64, u64)) -> bool {
    match major {
        // null, zero, full, random, urandom, kmsg …: by its path.
        1 => true,
        // Virtual terminals.
        4 => (1..=63).contains(&minor),
        // tty, console, ptmx.
        5 => minor <= 2,
        // autofs.
        10 => minor == 235,
        // Pseudoterminals: masters, and slaves of the first 2^20.
        128..=136 => true,
        // Serial lines.
        188 | 204 => true,
        _ => false,
    }
}

fn tun(place: &Place<'_>, interface: Option<&str>, options: &Options, report: &mut Report) {
    if options.own_network && interface.is_none() {
        return;
    }
    let which = interface.map_or_else(String::new, |name| format!(" of the interface {name}"));
    report.add(
        "device",
        format!("{place} is a tun device{which}, which does not move"),
        "have the program close it; a VPN or a VM with a tap can't move as a process",
    );
}

fn mapped(place: &Place<'_>, report: &mut Report) {
    let rdev = place.probe.stat.st_rdev;
    let format = place.probe.format();
    let zero = format == SFlag::S_IFCHR && (major(rdev), minor(rdev)) == ZERO;
    if format != SFlag::S_IFREG && !zero {
        report.add(
            "device",
            format!("{place} is of {}, which CRIU does not carry", place.path.display()),
            "start the program without what maps it; device memory can't move",
        );
    }
}
