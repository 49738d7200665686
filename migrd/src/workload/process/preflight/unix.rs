//! Unix sockets: whoever one is connected to must be in the tree (CRIU's
//! `sk-unix.c`).

use std::collections::{BTreeMap, HashMap, HashSet};

use super::descriptors::Descriptor;
use super::diag::{UnixSocket, unix_sockets};
use super::outside::Outside;
use super::places::namespace;
use super::report::Report;

const CONNECTED: u8 = 1;
const DATAGRAM: u8 = 2;
const BOTH_WAYS: u8 = 3;

/// The Unix sockets of the tree, with what the kernel says of them.
pub(super) struct Known<'a, 'b> {
    sockets: Vec<(u64, &'b Descriptor<'a>)>,
    all: HashMap<u64, UnixSocket>,
    /// Every network was asked.
    complete: bool,
}

/// Asks the kernel, once for each network that one of the processes is in. The
/// problem when it does not answer is that nothing is known.
pub(super) fn read<'a, 'b>(
    sockets: Vec<(u64, &'b Descriptor<'a>)>,
    report: &mut Report,
) -> Known<'a, 'b> {
    let mut networks = BTreeMap::new();
    for (_, descriptor) in &sockets {
        let pid = descriptor.process.pid;
        if let Some(network) = namespace(pid, "net") {
            networks.entry(network).or_insert(pid);
        }
    }
    let mut all = HashMap::new();
    let mut complete = true;
    for pid in networks.into_values() {
        match unix_sockets(pid) {
            Ok(sockets) => all.extend(sockets),
            // Nothing to know of a process that is gone.
            Err(error) if super::procfs::is_gone(&error) && namespace(pid, "net").is_none() => {}
            Err(error) => {
                complete = false;
                report.add(
                    "no-socket-list",
                    format!("this kernel does not say what Unix sockets are connected to: {error}"),
                    "load the module unix_diag (modprobe unix_diag), which CRIU needs too",
                );
            }
        }
    }
    Known { sockets, all, complete }
}

impl Known<'_, '_> {
    /// The peers outside of the tree, by inode.
    pub(super) fn wanted(&self) -> HashSet<u64> {
        let mine = self.mine();
        let peers = self.sockets.iter().filter_map(|(inode, _)| Some(self.all.get(inode)?.peer));
        peers.filter(|peer| *peer != 0 && !mine.contains(peer)).collect()
    }

    pub(super) fn check(&self, outside: &Outside, report: &mut Report) {
        let mine = self.mine();
        let waiting: HashSet<u64> = self
            .sockets
            .iter()
            .filter_map(|(inode, _)| self.all.get(inode))
            .flat_map(|socket| socket.waiting.iter().copied())
            .collect();
        for (inode, descriptor) in &self.sockets {
            let Some(socket) = self.all.get(inode) else {
                // It may just have been closed; who still has it has one of
                // another network.
                if self.complete && std::fs::symlink_metadata(descriptor.path()).is_ok() {
                    foreign(descriptor, report);
                }
                continue;
            };
            let connected = socket.state == CONNECTED && socket.kind != DATAGRAM;
            if socket.peer != 0 && !mine.contains(&socket.peer) {
                let to = self.describe(socket.peer, outside);
                refuse(descriptor, &to, report);
            } else if socket.peer == 0
                && connected
                && socket.shutdown != BOTH_WAYS
                && !waiting.contains(inode)
            {
                refuse(descriptor, "a process that has not accepted it yet", report);
            }
        }
    }

    /// Where sockets of the tree are bound, if those are paths from the root.
    pub(super) fn bound(&self) -> impl Iterator<Item = &str> {
        let names = self.sockets.iter().filter_map(|(inode, _)| self.all.get(inode)?.name.as_ref());
        names.map(String::as_str).filter(|name| name.starts_with('/'))
    }

    fn mine(&self) -> HashSet<u64> {
        self.sockets.iter().map(|(inode, _)| *inode).collect()
    }

    fn describe(&self, peer: u64, outside: &Outside) -> String {
        let holder = outside
            .sockets
            .get(&peer)
            .map_or_else(|| "something".to_owned(), std::string::ToString::to_string);
        match self.all.get(&peer).and_then(|peer| peer.name.as_ref()) {
            Some(name) => format!("{holder} at {name}"),
            None => holder,
        }
    }
}

fn refuse(descriptor: &Descriptor<'_>, to: &str, report: &mut Report) {
    report.add(
        "unix-peer-outside",
        format!("{descriptor} is a Unix socket connected to {to}, outside of the workload"),
        "have the program close that connection (a log daemon, D-Bus, a database), use TCP, or \
         start both together as one workload",
    );
}

fn foreign(descriptor: &Descriptor<'_>, report: &mut Report) {
    report.add(
        "socket-other-network",
        format!(
            "{descriptor} is a Unix socket of a network that no process of the workload is in: a \
             program outside has connected to it, or it was inherited"
        ),
        "have the program outside close that connection or use TCP, or start both together as one \
         workload; what was inherited the program should make itself",
    );
}
