//! What the kernel says of another process's sockets.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Longer than any protocol's name.
const NAME: usize = 64;

/// The protocol of the socket that `path` (`/proc/PID/fd/N`) leads to, as the
/// kernel calls it: `TCP`, `UNIX-STREAM`, `AF_VSOCK`. The socket is not opened
/// for that, nor kept open.
///
/// # Errors
/// What getxattr(2) says; ENODATA or ENOTSUP when it is not a socket.
pub fn protocol(path: &Path) -> io::Result<String> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut name = [0_u8; NAME];
    // SAFETY: both strings end in a NUL, and the kernel writes at most as many
    // bytes as `name` has.
    let length = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"system.sockprotoname".as_ptr(),
            name.as_mut_ptr().cast(),
            name.len(),
        )
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let name = name.get(..length).unwrap_or(&name);
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}
