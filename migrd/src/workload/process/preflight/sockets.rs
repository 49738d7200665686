//! Which families of sockets CRIU carries, from its `sockets.c` and `sk-inet.c`.

use std::collections::HashSet;
use std::os::fd::{OwnedFd, RawFd};

use super::descriptors::{Descriptor, Kind};
use super::report::Report;
use crate::sys::process::PidFd;
use crate::sys::sockets::{option, protocol};

/// `TCP_ULP_NAME_MAX` of the kernel's `include/net/tcp.h`.
const ULP_NAME_BYTES: usize = 16;

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
            "TCP" | "TCPv6" => {
                refuse_above(descriptor, report);
                sorted.tcp.push((inode, descriptor));
            }
            "UDP" | "UDPv6" | "UDP-Lite" | "UDPLITE" | "UDPLITEv6" | "RAW" | "RAWv6" | "PING"
            | "PINGv6" | "PACKET" | "NETLINK" => {}
            _ => refuse(descriptor, &protocol, report),
        }
    }
    sorted
}

/// CRIU makes a plain connection of one with another protocol of the kernel's above it, which
/// would go on without that: not encrypted, if that was TLS.
fn refuse_above(descriptor: &Descriptor<'_>, report: &mut Report) {
    let number = RawFd::try_from(descriptor.fd).unwrap_or(-1);
    let socket = PidFd::open(descriptor.process.pid).and_then(|p| p.descriptor(number));
    // One that has gone meanwhile has none.
    let above = socket.ok().and_then(above);
    let Some(above) = above else { return };
    report.add(
        "tcp-ulp",
        format!(
            "{descriptor} is a TCP connection with {above} above it in the kernel (TCP_ULP), which \
             CRIU does not carry"
        ),
        "have the program do that itself (for TLS: without kTLS)",
    );
}

/// The name of the upper layer protocol of a TCP socket, if it has one.
fn above(socket: OwnedFd) -> Option<String> {
    let mut name = [0; ULP_NAME_BYTES];
    let length = option(&socket, libc::IPPROTO_TCP, libc::TCP_ULP, &mut name).ok()?;
    let name = name.get(..length)?.split(|byte| *byte == 0).next()?;
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
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
