//! File descriptors that cross a process boundary: inherited at the start of
//! the child, or sent over a local socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How many descriptors [`receive`] takes at most.
const RECEIVE_MAX: usize = 16;

/// Takes over the descriptor that the parent left open as `number`, once.
///
/// # Errors
/// When there is none, or it was taken before.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    let bit = u32::try_from(number).ok().and_then(|n| 1_u64.checked_shl(n)).unwrap_or(0);
    if number < 3 || bit == 0 || TAKEN.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
        return Err(io::Error::other(format!("descriptor {number} is not there to be taken")));
    }
    // SAFETY: F_GETFD only looks, and says so if the descriptor is not open.
    fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_GETFD)?;
    // SAFETY: open, and nothing else in this process owns it: it was inherited
    // by a number that both sides agreed on, and is handed out once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Owns a descriptor that a system call has just returned as a number.
#[must_use]
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: see above; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The descriptor of an eventfd, to wait for.
#[must_use]
pub fn of_event(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: open as long as `event`, which is borrowed as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Lets tokio wait until `fd` can be read.
///
/// # Errors
/// When it is not of a kind that can be waited for.
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays the same open descriptor until it is dropped,
    // which the AsyncFd does last.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? })
}

/// Closes every descriptor from `first` on. For the start of a process, when
/// nothing in it owns one of them.
///
/// # Errors
/// What `close_range(2)` says.
pub fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: called before anything but the inherited descriptors is open.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many bytes wait in a pipe (ioctl(2), `FIONREAD`).
///
/// # Errors
/// When it is not one.
pub fn unread(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the kernel writes one int, and `count` outlives the call.
    if unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(count).map_err(io::Error::other)
}

/// Sends `bytes` with `fds` beside the first of them.
///
/// # Errors
/// What sendmsg(2) says, or when not all bytes went at once.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let beside = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent =
        sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], beside, flags, None)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives bytes into `into` and the descriptors that came beside them.
///
/// # Errors
/// What recvmsg(2) says, or when more descriptors came than are taken.
pub fn receive(socket: impl AsFd, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; RECEIVE_MAX]);
    let mut parts = [IoSliceMut::new(into)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for beside in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = beside {
            // SAFETY: the kernel has just made these for us, and nobody else
            // knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}
