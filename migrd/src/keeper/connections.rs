//! TCP connections of a tree: those that CRIU has left in its hand, and those that have
//! stood still.
//!
//! CRIU reads a connection in a mode (`TCP_REPAIR`, `tcp(7)` does not have it) in
//! which the kernel sends nothing of it, and ends that mode when it lets the tree go.
//! A CRIU that was killed does not: the connections of a tree that runs on would be
//! silent for ever.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::fcntl::readlinkat;
use nix::sys::socket::{SockaddrStorage, getpeername, getsockopt, setsockopt, sockopt};

use super::cgroup::Cgroup;
use crate::sys::process::PidFd;

/// Has every connection of the cgroup's processes work as usual. The processes may
/// stand still; one that ends meanwhile needs nothing. How many did not work.
///
/// # Errors
/// When a process or a connection can't be looked at.
pub fn release(cgroup: &Cgroup) -> io::Result<usize> {
    of_all(cgroup, speak)
}

fn speak(socket: &OwnedFd) -> io::Result<bool> {
    // Of sockets of other kinds there is nothing to ask.
    let silent = getsockopt(socket, sockopt::TcpRepair).is_ok_and(|mode| mode != 0);
    if silent {
        setsockopt(socket, sockopt::TcpRepair, &0)?;
    }
    Ok(silent)
}

/// Has the kernel ask the other end of every connection of the cgroup's processes, which
/// stand still, how much it has got, as it does when TCP_REPAIR ends. A connection that was
/// made anew knows no round trip, so that it sends again what was lost only after a second
/// (RFC 8985, 7.2) or three (RFC 6298, 5.7), and nothing new before what it had sent is
/// acknowledged. How many were asked.
///
/// # Errors
/// When a process or a connection can't be looked at.
pub fn probe(cgroup: &Cgroup) -> io::Result<usize> {
    of_all(cgroup, ask)
}

fn ask(socket: &OwnedFd) -> io::Result<bool> {
    let connected = getsockopt(socket, sockopt::TcpRepair).is_ok_and(|mode| mode == 0)
        && getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok();
    // The end of the mode resets this option.
    let reuse = getsockopt(socket, sockopt::ReuseAddr).unwrap_or_default();
    // A connection whose end has begun can't, and needs nothing.
    if !connected || setsockopt(socket, sockopt::TcpRepair, &1).is_err() {
        return Ok(false);
    }
    setsockopt(socket, sockopt::TcpRepair, &0)?;
    setsockopt(socket, sockopt::ReuseAddr, &reuse)?;
    Ok(true)
}

/// Does it to every socket of the cgroup's processes. For how many it says that it did.
fn of_all(cgroup: &Cgroup, act: impl Fn(&OwnedFd) -> io::Result<bool>) -> io::Result<usize> {
    let mut done = 0;
    for pid in cgroup.processes()? {
        match of_process(pid, &act) {
            Ok(count) => done += count,
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn of_process(pid: u32, act: &impl Fn(&OwnedFd) -> io::Result<bool>) -> io::Result<usize> {
    let process = PidFd::open(pid)?;
    let mut done = 0;
    for (number, _) in sockets_of(pid)? {
        let socket = match process.descriptor(number) {
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue,
            other => other?,
        };
        done += usize::from(act(&socket)?);
    }
    Ok(done)
}

/// The descriptors of a process that are sockets, each with the socket's inode.
///
/// # Errors
/// When it is gone, or may not be looked into.
pub(super) fn sockets_of(pid: u32) -> io::Result<Vec<(RawFd, u64)>> {
    let directory = File::open(format!("/proc/{pid}/fd"))?;
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        let to = readlinkat(&directory, name.as_os_str()).unwrap_or_default();
        let inode = to.to_str().and_then(|to| to.strip_prefix("socket:[")?.strip_suffix(']'));
        let inode = inode.and_then(|inode| inode.parse().ok());
        sockets.extend(number.zip(inode));
    }
    Ok(sockets)
}

pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_connection_that_was_left_silent_speaks_again() {
        let (near, _far) = connection();
        setsockopt(&near, sockopt::TcpRepair, &1).expect("run the tests as root");
        assert!(of_process(std::process::id(), &speak).unwrap() >= 1);
        assert_eq!(getsockopt(&near, sockopt::TcpRepair).unwrap(), 0);
    }

    /// How many of the kernel's questions for a window this network namespace has seen.
    fn window_probes() -> u64 {
        let text = fs::read_to_string("/proc/self/net/netstat").unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let names = lines.next().unwrap().split(' ');
        let mut values = names.zip(lines.next().unwrap().split(' '));
        values.find(|(name, _)| *name == "TCPWinProbe").unwrap().1.parse().unwrap()
    }

    #[test]
    fn a_connection_is_asked_after_and_is_as_it_was() {
        let (near, far) = connection();
        let idle = TcpListener::bind("127.0.0.1:0").unwrap();
        for reuse in [true, false] {
            setsockopt(&near, sockopt::ReuseAddr, &reuse).unwrap();
            let before = window_probes();
            let asked = of_process(std::process::id(), &ask).expect("run the tests as root");
            assert!(asked >= 2 && window_probes() >= before + 2, "{asked}");
            for socket in [near.as_fd(), far.as_fd(), idle.as_fd()] {
                assert_eq!(getsockopt(&socket, sockopt::TcpRepair).unwrap(), 0);
            }
            assert_eq!(getsockopt(&near, sockopt::ReuseAddr).unwrap(), reuse);
        }
    }
}
