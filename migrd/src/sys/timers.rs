//! Timers of another process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::process::PidFd;

/// Starts the timer that a process has as `fd` (`timerfd_create(2)`): it expires at
/// once, and then again after each `interval`.
///
/// # Errors
/// When there is no such timer, or the kernel is older than 5.6.
pub fn start(process: &PidFd, fd: RawFd, interval: Duration) -> io::Result<()> {
    let process = process.as_fd().as_raw_fd();
    // SAFETY: a plain system call that returns a new descriptor.
    let timer = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, fd, 0) };
    let timer = RawFd::try_from(timer).map_err(io::Error::other)?;
    if timer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just returned to us and owned by nothing else.
    let timer = unsafe { OwnedFd::from_raw_fd(timer) };
    let seconds = i64::try_from(interval.as_secs()).map_err(io::Error::other)?;
    let times = libc::itimerspec {
        it_value: libc::timespec { tv_sec: 0, tv_nsec: 1 },
        it_interval: libc::timespec {
            tv_sec: seconds,
            tv_nsec: i64::from(interval.subsec_nanos()),
        },
    };
    // SAFETY: `times` lives during the call, and no old value is asked for.
    let set = unsafe {
        libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const times, std::ptr::null_mut())
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
