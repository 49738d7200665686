//! Network namespaces, and frames sent from inside one.
//!
//! A thread is in one namespace. What works in another one than the caller's
//! has a thread of its own, which ends with it: none that others use is ever
//! left in a strange namespace.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};

/// Makes a network namespace. It is there as long as the descriptor is open, or
/// a process is in it.
///
/// # Errors
/// What unshare(2) says: it needs `CAP_SYS_ADMIN`.
pub fn make() -> io::Result<OwnedFd> {
    in_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        current()
    })?
}

/// The calling thread's network namespace.
///
/// # Errors
/// When /proc is not there.
pub fn current() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// The network namespace of the process that has `pid` now.
///
/// # Errors
/// When there is none, or it may not be looked into.
pub fn of_process(pid: u32) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/ns/net"))?.into())
}

/// The number of a namespace, as in `net:[4026531840]`; no other has it while
/// this one is there.
///
/// # Errors
/// What fstat(2) says.
pub fn inode(namespace: impl AsFd) -> io::Result<u64> {
    let file = File::from(namespace.as_fd().try_clone_to_owned()?);
    Ok(file.metadata()?.ino())
}

/// Does `work` inside `namespace`, in a thread of its own. Sockets that it opens
/// belong to that namespace for good.
///
/// # Errors
/// What setns(2) says; `work` was not done then.
pub fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    in_a_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })?
}

fn in_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let ended = |_| io::Error::other("the thread in the namespace ended early");
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned());
        thread.spawn_scoped(scope, work)?.join().map_err(ended)
    })
}

/// Sends whole Ethernet frames out of one interface, and receives none.
#[derive(Debug)]
pub struct FrameSocket(OwnedFd);

impl FrameSocket {
    /// For the interface of that index in the calling thread's namespace.
    ///
    /// # Errors
    /// What the system says: it needs `CAP_NET_RAW`.
    pub fn open(index: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Without a protocol nothing is received.
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        // SAFETY: a sockaddr_ll is plain data, for which zeros are a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
        address.sll_ifindex = libc::c_int::try_from(index).map_err(io::Error::other)?;
        let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>());
        let length = length.map_err(io::Error::other)?;
        // SAFETY: the address is as long as is said, and outlives the call.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(socket)) }
    }

    /// Sends one frame; its header is part of it. Does not wait.
    ///
    /// # Errors
    /// What the system says: `ENETDOWN` when the interface is off.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = send(self.0.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT)?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}
