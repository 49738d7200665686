//! A file system in memory that no path leads to: it is there as long as a
//! descriptor of it is.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

// linux/mount.h; libc has no names for them.
const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSCONFIG_CMD_RECONFIGURE: u32 = 7;
const FSPICK_CLOEXEC: u32 = 1;
const FSPICK_EMPTY_PATH: u32 = 8;
const FSMOUNT_CLOEXEC: u32 = 1;
const MOUNT_ATTR_NOSUID: u32 = 2;
const MOUNT_ATTR_NODEV: u32 = 4;

fn made(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes one of at most `size` bytes, which is not 0; its root directory, for its
/// owner alone (fsopen(2), fsmount(2)).
///
/// # Errors
/// When the kernel refuses: it needs to be 5.2 or newer, and this process
/// `CAP_SYS_ADMIN`.
pub fn create(size: u64) -> io::Result<OwnedFd> {
    let size = number(size)?;
    // SAFETY: plain system calls with valid strings.
    let context =
        made(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    for (key, value) in [(c"size", size.as_c_str()), (c"mode", c"0700")] {
        configure(&context, FSCONFIG_SET_STRING, Some((key, value)))?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None)?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
    // SAFETY: a plain system call.
    made(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes)
    })
}

fn number(size: u64) -> io::Result<CString> {
    Ok(CString::new(size.max(1).to_string())?)
}

/// Changes how large one may become, to `size` bytes, which is not 0 (fspick(2)).
/// `directory` is its root.
///
/// # Errors
/// When it is larger than that already, or the kernel refuses.
pub fn resize(directory: impl AsFd, size: u64) -> io::Result<()> {
    let (size, flags) = (number(size)?, FSPICK_CLOEXEC | FSPICK_EMPTY_PATH);
    let directory = directory.as_fd().as_raw_fd();
    // SAFETY: a plain system call with a valid string.
    let context = made(unsafe { libc::syscall(libc::SYS_fspick, directory, c"".as_ptr(), flags) })?;
    configure(&context, FSCONFIG_SET_STRING, Some((c"size", size.as_c_str())))?;
    configure(&context, FSCONFIG_CMD_RECONFIGURE, None)
}

fn configure(context: &OwnedFd, command: u32, option: Option<(&CStr, &CStr)>) -> io::Result<()> {
    let (key, value) = option.map_or((std::ptr::null(), std::ptr::null()), |(key, value)| {
        (key.as_ptr(), value.as_ptr())
    });
    // SAFETY: both strings outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
