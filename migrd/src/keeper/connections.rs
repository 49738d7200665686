//! TCP connections of a tree that CRIU has left in its hand.
//!
//! CRIU reads a connection in a mode (`TCP_REPAIR`, `tcp(7)` does not have it) in
//! which the kernel sends nothing of it, and ends that mode when it lets the tree go.
//! A CRIU that was killed does not: the connections of a tree that runs on would be
//! silent for ever.

use std::fs;
use std::io;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::cgroup::Cgroup;
use crate::sys::process::PidFd;

/// Has every connection of the cgroup's processes work as usual. The processes may
/// stand still; one that ends meanwhile needs nothing. How many did not work.
///
/// # Errors
/// When a process or a connection can't be looked at.
pub fn release(cgroup: &Cgroup) -> io::Result<usize> {
    let mut released = 0;
    for pid in cgroup.processes()? {
        match release_of(pid) {
            Ok(count) => released += count,
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(released)
}

fn release_of(pid: u32) -> io::Result<usize> {
    let process = PidFd::open(pid)?;
    let mut released = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        let to = fs::read_link(entry.path()).unwrap_or_default();
        let (Some(number), true) = (number, to.to_string_lossy().starts_with("socket:")) else {
            continue;
        };
        let socket = match process.descriptor(number) {
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue,
            other => other?,
        };
        // Of sockets of other kinds there is nothing to ask.
        if getsockopt(&socket, sockopt::TcpRepair).is_ok_and(|mode| mode != 0) {
            setsockopt(&socket, sockopt::TcpRepair, &0)?;
            released += 1;
        }
    }
    Ok(released)
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_that_was_left_silent_speaks_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _far = listener.accept().unwrap();
        setsockopt(&near, sockopt::TcpRepair, &1).expect("run the tests as root");
        assert!(release_of(std::process::id()).unwrap() >= 1);
        assert_eq!(getsockopt(&near, sockopt::TcpRepair).unwrap(), 0);
    }
}
