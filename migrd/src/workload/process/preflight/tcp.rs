//! TCP connections. CRIU takes each; whether it lives elsewhere depends on its
//! addresses.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Options;
use super::descriptors::Descriptor;
use super::places::namespace;
use super::procfs;
use super::report::Report;

/// States of `include/net/tcp_states.h`.
const LISTENING: u8 = 10;
/// Those in which there is a peer: established, SYN sent, the ways of closing.
const CONNECTED: [u8; 7] = [1, 2, 4, 5, 8, 9, 11];

/// A connection of the tree's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// A process that has it.
    pub pid: u32,
    /// What that process calls itself.
    pub command: String,
    /// Its descriptor there.
    pub fd: u32,
    /// The tree's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

impl std::fmt::Display for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pid, command, fd, local, remote } = self;
        write!(f, "fd {fd} of {command} ({pid}), from {local} to {remote}")
    }
}

/// A line of `/proc/PID/net/tcp`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    /// Of one that listens: how many wait to be accepted.
    receive_queue: u64,
    inode: u64,
}

/// The connections that leave the tree, or that moving it closes.
pub(super) fn check(
    sockets: &[(u64, &Descriptor<'_>)],
    options: &Options,
    report: &mut Report,
) -> Vec<Connection> {
    let lines = read(sockets);
    let mine: Vec<_> = sockets
        .iter()
        .filter_map(|(inode, descriptor)| Some((lines.get(inode)?, *descriptor)))
        .collect();
    let ends: HashSet<_> = mine.iter().map(|(line, _)| (line.local, line.remote)).collect();
    let mut leave = Vec::new();
    for (line, descriptor) in mine {
        if line.state == LISTENING && line.receive_queue > 0 {
            report.add(
                "tcp-not-accepted",
                format!(
                    "{descriptor} listens at {} and has {} connections that it has not accepted, \
                     which CRIU does not carry",
                    line.local, line.receive_queue
                ),
                "try again; if it stays so, the program does not take its connections",
            );
        }
        let inside = line.local.ip().is_loopback()
            && line.remote.ip().is_loopback()
            && ends.contains(&(line.remote, line.local));
        if !CONNECTED.contains(&line.state) || (inside && !options.drop_connections) {
            continue;
        }
        let connection = Connection {
            pid: descriptor.process.pid,
            command: descriptor.process.command.clone(),
            fd: descriptor.fd,
            local: line.local,
            remote: line.remote,
        };
        if !options.own_network && !options.drop_connections {
            report.add(
                "established-tcp",
                format!("{connection} is a TCP connection that ends with this host's address"),
                "say --drop-connections, and the program sees it closed; or give the workload a \
                 network of its own (--net), whose address moves with it",
            );
        }
        leave.push(connection);
    }
    leave
}

/// What every network that one of the processes is in knows of TCP, by inode.
fn read(sockets: &[(u64, &Descriptor<'_>)]) -> HashMap<u64, Line> {
    let mut networks = BTreeMap::new();
    for (_, descriptor) in sockets {
        let pid = descriptor.process.pid;
        if let Some(network) = namespace(pid, "net") {
            networks.entry(network).or_insert(pid);
        }
    }
    let mut lines = HashMap::new();
    for pid in networks.into_values() {
        for table in ["net/tcp", "net/tcp6"] {
            let text = procfs::read(pid, table).unwrap_or_default();
            let parsed = text.lines().filter_map(Line::parse);
            lines.extend(parsed.filter(|line| line.inode != 0).map(|line| (line.inode, line)));
        }
    }
    lines
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (_sent, received) = fields.get(4)?.split_once(':')?;
        Some(Self {
            local: address(fields.get(1)?)?,
            remote: address(fields.get(2)?)?,
            state: u8::from_str_radix(fields.get(3)?, 16).ok()?,
            receive_queue: u64::from_str_radix(received, 16).ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    }
}

/// `0100007F:0016`: the address as 32-bit words of this machine, the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?.to_ne_bytes())),
        32 => {
            let mut octets = [0; 16];
            for (index, four) in octets.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(index * 8)?.to_ne_bytes());
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_families_are_read() {
        let four = "   1: 0100007F:0016 00000000:0000 0A 00000000:00000003 00:00000000 00000000 \
                    0        0 12345 1 000000 100 0 0 10 0";
        let line = Line::parse(four).unwrap();
        assert_eq!(line.local, "127.0.0.1:22".parse().unwrap());
        assert_eq!((line.state, line.receive_queue, line.inode), (LISTENING, 3, 12345));
        let six = "   0: 0000000000000000FFFF00000100007F:1F90 \
                   00000000000000000000000001000000:0050 01 00000000:00000000 00:00000000 \
                   00000000 0 0 77 1";
        let line = Line::parse(six).unwrap();
        assert_eq!(line.local, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(line.remote, "[::1]:80".parse().unwrap());
        assert_eq!(Line::parse("  sl  local_address rem_address   st tx_queue rx_queue"), None);
        assert_eq!(address("0100007:0016"), None);
        assert_eq!(address("é100007F:0016"), None);
    }
}
