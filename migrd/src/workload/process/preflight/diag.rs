//! The kernel's list of Unix sockets (sock_diag(7)): the only place that says
//! who is connected to whom.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::places::namespace;
use super::procfs;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const REQUEST_ALL: u16 = 0x301;
/// `UDIAG_SHOW_NAME | UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS`.
const SHOW: u32 = 0x1 | 0x4 | 0x8;
const NAME: u16 = 0;
const PEER: u16 = 2;
const ICONS: u16 = 3;
const SHUTDOWN: u16 = 6;
/// Of a message, and of what `unix_diag_msg` begins it with, in bytes.
const HEADER: usize = 16;
const FIXED: usize = 16;
/// Larger than any one answer of the kernel's.
const BUFFER: usize = 64 << 10;

/// A Unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct UnixSocket {
    /// `SOCK_STREAM` and its like.
    pub(super) kind: u8,
    /// As for TCP: 1 connected, 10 listening.
    pub(super) state: u8,
    /// Inode of the socket it is connected to; 0: none, or none yet.
    pub(super) peer: u64,
    /// Inodes of those that wait to be accepted.
    pub(super) waiting: Vec<u64>,
    /// 3: neither side sends any more.
    pub(super) shutdown: u8,
    /// Where it is bound, for people.
    pub(super) name: Option<String>,
}

/// All Unix sockets of the network namespace of process `pid`, by inode.
///
/// # Errors
/// When the kernel does not say (the module `unix_diag` is missing), or the
/// process is gone.
pub(super) fn unix_sockets(pid: u32) -> io::Result<HashMap<u64, UnixSocket>> {
    if namespace(pid, "net") == namespace(std::process::id(), "net") {
        return ask();
    }
    // A thread of its own, because it does not come back from there.
    let network = File::open(procfs::path(pid, "ns/net"))?;
    let visitor = std::thread::Builder::new().name("preflight-net".into()).spawn(move || {
        setns(network, CloneFlags::CLONE_NEWNET)?;
        ask()
    })?;
    visitor.join().unwrap_or_else(|_| Err(io::Error::other("the thread that asked is gone")))
}

fn ask() -> io::Result<HashMap<u64, UnixSocket>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    sendto(socket.as_raw_fd(), &request(), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut sockets = HashMap::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC)?;
        let answer = buffer.get(..length).ok_or(io::ErrorKind::InvalidData)?;
        if answer.is_empty() || take(answer, &mut sockets)? {
            return Ok(sockets);
        }
    }
}

fn request() -> Vec<u8> {
    let mut request = Vec::with_capacity(HEADER + 24);
    request.extend_from_slice(&40_u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&REQUEST_ALL.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct unix_diag_req: family, protocol, padding, states, inode, what to
    // show, cookie.
    request.extend_from_slice(&[1, 0, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&SHOW.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request
}

/// Takes the messages of one answer, and says whether it was the last one.
fn take(mut answer: &[u8], sockets: &mut HashMap<u64, UnixSocket>) -> io::Result<bool> {
    while answer.len() >= HEADER {
        let length = word(answer, 0).and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        let (Some(message), Some(kind)) = (answer.get(..length), half(answer, 4)) else { break };
        if length < HEADER {
            break;
        }
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = word(message, HEADER).unwrap_or(0).cast_signed().wrapping_neg();
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => {
                if let Some((inode, socket)) = parse(&message[HEADER..]) {
                    sockets.insert(inode, socket);
                }
            }
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// `struct unix_diag_msg` and its attributes.
fn parse(message: &[u8]) -> Option<(u64, UnixSocket)> {
    let mut socket =
        UnixSocket { kind: *message.get(1)?, state: *message.get(2)?, ..Default::default() };
    let inode = u64::from(word(message, 4)?);
    let mut rest = message.get(FIXED..)?;
    while let (Some(length), Some(kind)) = (half(rest, 0), half(rest, 2)) {
        let length = usize::from(length);
        let Some(value) = rest.get(4..length) else { break };
        match kind {
            NAME => socket.name = Some(name(value)),
            PEER => socket.peer = word(value, 0).unwrap_or(0).into(),
            ICONS => {
                let words = value.chunks_exact(4).filter_map(|chunk| word(chunk, 0));
                socket.waiting = words.map(u64::from).collect();
            }
            SHUTDOWN => socket.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((inode, socket))
}

/// A name that begins with a NUL is not a path, and is written with an @.
fn name(bytes: &[u8]) -> String {
    match bytes.strip_prefix(b"\0") {
        Some(bytes) => format!("@{}", String::from_utf8_lossy(bytes)),
        None => String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned(),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    fn inode(fd: &impl AsRawFd) -> u64 {
        std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino()
    }

    #[test]
    fn the_kernel_says_who_is_connected_to_whom() {
        let (one, other) = UnixStream::pair().unwrap();
        let address = format!("migr-diag-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&address).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let waiting = UnixStream::connect_addr(&address).unwrap();
        let sockets = unix_sockets(std::process::id()).unwrap();
        assert_eq!(sockets[&inode(&one)].peer, inode(&other));
        assert_eq!(sockets[&inode(&other)].peer, inode(&one));
        let listener = &sockets[&inode(&listener)];
        assert_eq!((listener.state, &listener.waiting), (10, &vec![inode(&waiting)]));
        assert!(listener.name.as_ref().unwrap().starts_with("@migr-diag-"));
        assert_eq!(sockets[&inode(&waiting)].peer, 0);
    }

    #[test]
    fn an_answer_that_is_cut_off_gives_what_was_whole() {
        let mut message = 40_u32.to_ne_bytes().to_vec();
        message.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.extend_from_slice(&[0; 10]);
        message.extend_from_slice(&[1, 1, 1, 0, 7, 0, 0, 0]);
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[8, 0, 2, 0, 9, 0, 0, 0]);
        for length in 0..message.len() {
            let mut sockets = HashMap::new();
            assert!(!take(&message[..length], &mut sockets).unwrap());
            assert!(sockets.is_empty(), "{length}");
        }
        let mut sockets = HashMap::new();
        assert!(!take(&message, &mut sockets).unwrap());
        assert_eq!(sockets[&7].peer, 9);
    }
}
