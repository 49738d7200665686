//! Options of TCP sockets that CRIU (4.2) does not carry: the kernel would give the
//! connections and listening sockets of a tree its defaults.
//!
//! They are read while CRIU writes a tree, which stands still, put into a file beside CRIU's
//! images ([`image`]), and set again when a tree is complete and none of it has run. An option
//! with the value of a new socket in the same network namespace is not written: at the
//! destination it has the default of that host. [`table`] has which they are, and reads and
//! sets one.

mod image;
mod table;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, getsockopt, setsockopt, socket, sockopt,
};

use self::image::{ImageError, Saved, Socket, Value};
use self::table::{ALL, Known, REUSEPORT, Shape};
use super::cgroup::Cgroup;
use super::connections::{is_gone, sockets_of};
use super::criu::Failure;
use crate::sys::netns;
use crate::sys::process::PidFd;

/// How many failures the log gets of one tree.
const LOGGED: usize = 16;

/// Options of the sockets of a tree.
#[derive(Debug)]
pub struct TcpOptions(Saved);

impl TcpOptions {
    /// Those of the tree of `init`, whose processes are in the cgroup and stand still. Of a
    /// socket that can't be looked at the log says so, and there are none.
    #[must_use]
    pub fn read(cgroup: &Cgroup, init: u32) -> Self {
        let (mut failures, mut defaults) = (Failures::default(), Defaults::default());
        let (mut sockets, mut seen) = (Vec::new(), HashSet::new());
        let members = members(cgroup, init);
        let members = members.inspect_err(|error| failures.add(|| error.to_string()));
        for (process, number) in members.unwrap_or_default() {
            match of_process(process, number, &mut defaults, &mut seen) {
                Ok(found) => sockets.extend(found),
                Err(error) if is_gone(&error) => {}
                Err(error) => failures.add(|| format!("process {number}: {error}")),
            }
        }
        let (saved, all) = image::fitting(sockets);
        if !all {
            failures.add(|| format!("only those of {} sockets fit", saved.sockets.len()));
        }
        Self(saved)
    }

    /// Writes them into the directory of a tree's images.
    ///
    /// # Errors
    /// When they can't be written to their end.
    pub fn write(&self, images: &OwnedFd) -> io::Result<()> {
        image::write(images, &self.0)
    }

    /// Those that were written there; none if the file is not there.
    ///
    /// # Errors
    /// When it is not as it must be.
    pub fn load(images: &OwnedFd) -> Result<Self, Failure> {
        image::read(images).map(Self).map_err(|error: ImageError| Failure {
            code: "images",
            message: error.to_string(),
            remedy: "use the same version of migr on both hosts, or another snapshot",
        })
    }

    /// Sets them in the tree of `init`, whose processes are in the cgroup, complete, and
    /// stand still. What the kernel refuses stays its default, and the log says so.
    pub fn apply(&self, cgroup: &Cgroup, init: u32) {
        if self.0.sockets.is_empty() {
            return;
        }
        let mut failures = Failures::default();
        match members(cgroup, init) {
            Ok(members) => self.apply_to(members, &mut failures),
            Err(error) => failures.add(|| error.to_string()),
        }
    }

    fn apply_to(&self, members: Vec<(u32, u32)>, failures: &mut Failures) {
        let mut of_processes: BTreeMap<u32, Vec<&Socket>> = BTreeMap::new();
        for socket in &self.0.sockets {
            of_processes.entry(socket.process).or_default().push(socket);
        }
        for (process, number) in members {
            let Some(sockets) = of_processes.remove(&number) else { continue };
            match PidFd::open(process) {
                Ok(process) => sockets.into_iter().for_each(|socket| {
                    set_all(&process, socket, failures);
                }),
                Err(error) => failures.add(|| format!("process {number}: {error}")),
            }
        }
        for number in of_processes.keys() {
            failures.add(|| format!("there is no process {number}"));
        }
    }
}

fn set_all(process: &PidFd, of: &Socket, failures: &mut Failures) {
    let Socket { process: number, descriptor, options } = of;
    let at = || format!("process {number}, descriptor {descriptor}");
    let socket = match process.descriptor(*descriptor) {
        Ok(socket) => socket,
        Err(error) => return failures.add(|| format!("{}: {error}", at())),
    };
    for option in options {
        let Some(known) = option.known() else { continue };
        let set = if known.changes_priority() {
            keeping_priority(&socket, || known.set(&socket, &option.value))
        } else {
            known.set(&socket, &option.value)
        };
        if let Err(error) = set {
            failures.add(|| format!("{}: {}: {error}", at(), known.display(&option.value)));
        }
    }
}

/// Puts back SO_PRIORITY, which CRIU carries, when `set` was done.
fn keeping_priority(socket: &OwnedFd, set: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let priority = getsockopt(socket, sockopt::Priority)?;
    set()?;
    Ok(setsockopt(socket, sockopt::Priority, &priority)?)
}

/// What goes to the keeper's log, which must not be filled by one tree.
#[derive(Default)]
struct Failures(usize);

impl Failures {
    fn add(&mut self, what: impl FnOnce() -> String) {
        self.0 += 1;
        if self.0 <= LOGGED {
            eprintln!("options of TCP sockets are lost: {}", what());
        }
    }
}

/// The processes of the cgroup that are of the tree of `init`: the number here and the one
/// inside. CRIU and what it has started are in the cgroup, too.
fn members(cgroup: &Cgroup, init: u32) -> io::Result<Vec<(u32, u32)>> {
    let space = |process: u32| fs::read_link(format!("/proc/{process}/ns/pid"));
    let inside = space(init)?;
    let of_tree = |process: &u32| space(*process).is_ok_and(|space| space == inside);
    let all = cgroup.processes()?.into_iter().filter(of_tree);
    Ok(all.filter_map(|process| Some((process, number_inside(process)?))).collect())
}

/// The number of a process in its own PID namespace (`NSpid` of proc_pid_status(5)).
fn number_inside(process: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_whitespace().last()?.parse().ok()
}

/// The options of a process' sockets that are not `seen` yet.
fn of_process(
    process: u32,
    number: u32,
    defaults: &mut Defaults,
    seen: &mut HashSet<u64>,
) -> io::Result<Vec<Socket>> {
    let sockets = sockets_of(process)?;
    if sockets.is_empty() {
        return Ok(Vec::new());
    }
    let (handle, network) = (PidFd::open(process)?, netns::of_process(process)?);
    let mut found = Vec::new();
    for (descriptor, inode) in sockets {
        // A socket that is shared is met more than once.
        if !seen.insert(inode) {
            continue;
        }
        let socket = match handle.descriptor(descriptor) {
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue,
            other => other?,
        };
        let options = of_socket(&socket, |shape| defaults.of(&network, shape))?;
        if !options.is_empty() {
            found.push(Socket { process: number, descriptor, options });
        }
    }
    Ok(found)
}

/// The options of one socket that are not those of a new one; none if it is not TCP's.
fn of_socket<'a>(
    socket: &OwnedFd,
    defaults: impl FnOnce(Shape) -> io::Result<&'a [Option<Vec<u8>>]>,
) -> io::Result<Vec<Value>> {
    let Some(shape) = Shape::of(socket) else { return Ok(Vec::new()) };
    let options = ALL.iter().zip(defaults(shape)?).enumerate();
    let options = options.filter_map(|(index, (known, default))| {
        // What a new socket does not have, this kernel does not know.
        let default = default.as_ref()?;
        let value = known.read(socket, shape)?;
        let Known { level, number, .. } = *known;
        (index == REUSEPORT || value != *default).then_some(Value { level, number, value })
    });
    Ok(options.collect())
}

/// The options of new sockets, by network namespace and family, in the order of [`ALL`].
#[derive(Default)]
struct Defaults(BTreeMap<(u64, i32), Vec<Option<Vec<u8>>>>);

impl Defaults {
    fn of(&mut self, network: &OwnedFd, shape: Shape) -> io::Result<&[Option<Vec<u8>>]> {
        use std::collections::btree_map::Entry;
        let key = (netns::inode(network)?, shape.family);
        Ok(match self.0.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(of_new(network, shape.family)?),
        })
    }
}

fn of_new(network: &OwnedFd, family: i32) -> io::Result<Vec<Option<Vec<u8>>>> {
    let address = if family == libc::AF_INET6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let made = || socket(address, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let new = netns::within(network.as_fd(), made)??;
    // One that is to listen has the defaults of one that does.
    let shape = Shape { listens: true, family };
    Ok(ALL.iter().map(|known| known.read(&new, shape)).collect())
}

#[cfg(test)]
mod tests;
