//! Which families of sockets CRIU carries, from its `sockets.c` and `sk-inet.c`.

use std::collections::HashSet;

use super::descriptors::{Descriptor, Kind};
use super::report::Report;
use crate::sys::sockets::protocol;

/// The Unix sockets and the TCP sockets of the tree, by inode; what is of
/// another kind that CRIU does not carry is a problem.
#[derive(Debug, Default)]
pub(super) struct Sorted<'a, 'b> {
    pub(super) unix: Vec<(u64, &'b Descriptor<'a>)>,
    pub(super) tcp: Vec<(u64, &'b Descriptor<'a>)>,
}

pub(super) fn sort<'a, 'b>(
    descriptors: &'b [Descriptor<'a>],
    report: &mut Report,
) -> Sorted<'a, 'b> {
    let mut sorted = Sorted::default();
    let mut seen = HashSet::new();
    for descriptor in descriptors {
        let Kind::Socket(inode) = descriptor.kind else { continue };
        if !seen.insert(inode) {
            continue;
        }
        let Ok(protocol) = protocol(&descriptor.path()) else { continue };
        match protocol.as_str() {
            "UNIX" | "UNIX-STREAM" => sorted.unix.push((inode, descriptor)),
            "TCP" | "TCPv6" => sorted.tcp.push((inode, descriptor)),
            "UDP" | "UDPv6" | "UDP-Lite" | "UDPLITE" | "UDPLITEv6" | "RAW" | "RAWv6" | "PING"
            | "PINGv6" | "PACKET" | "NETLINK" => {}
            _ => refuse(descriptor, &protocol, report),
        }
    }
    sorted
}

fn refuse(descriptor: &Descriptor<'_>, protocol: &str, report: &mut Report) {
    let (code, remedy) = match protocol {
        "AF_VSOCK" => ("vsock", "have the program use TCP or a Unix socket instead"),
        "MPTCP" => (
            "socket-family",
            "start the program without multipath TCP (for Go: GODEBUG=multipathtcp=0)",
        ),
        _ => ("socket-family", "start the program without what uses it"),
    };
    report.add(
        code,
        format!("{descriptor} is a socket of {protocol}, which CRIU does not carry"),
        remedy,
    );
}
