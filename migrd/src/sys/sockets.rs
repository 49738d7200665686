//! Sockets that have a name in the file system, what the kernel says of another
//! process's, and options by number.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};

/// Longer than any protocol's name.
const NAME: usize = 64;

/// A path as a socket's address takes it, which has room for 107 bytes (unix(7)):
/// through a descriptor of the directory, however long that one's path is. Good while
/// this lives.
#[derive(Debug)]
pub struct Address {
    directory: File,
    name: PathBuf,
}

impl Address {
    /// That of `path`, whose directory is there.
    ///
    /// # Errors
    /// When its directory can't be opened.
    pub fn of(path: &Path) -> io::Result<Self> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(ErrorKind::InvalidInput, "a socket's path has no name"));
        };
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
        Ok(Self { directory: options.open(directory)?, name: name.into() })
    }

    /// The path to bind or connect to, in this process.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.directory.as_raw_fd().to_string()).join(&self.name)
    }
}

/// A socket that listens at `path`, in place of one that nobody may listen at any more.
///
/// # Errors
/// When the path can't have one.
pub fn listen_at(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let address = Address::of(path)?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(&address.path())?)?;
    listen(&fd, Backlog::new(backlog)?)?;
    Ok(fd)
}

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

/// Reads an option of a socket (socket(7), tcp(7)); how many bytes of `into` it takes.
///
/// # Errors
/// What getsockopt(2) says; ENOPROTOOPT when the kernel does not know it.
pub fn option(
    socket: impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    into: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(into.len()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes, which `into` has.
    let read =
        unsafe { libc::getsockopt(fd, level, name, into.as_mut_ptr().cast(), &raw mut length) };
    if read < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(length).map_or(into.len(), |length| length.min(into.len())))
}

/// Sets an option of a socket.
///
/// # Errors
/// What setsockopt(2) says.
pub fn set_option(
    socket: impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `length` bytes, which `value` has. Options that hold a
    // pointer are not among those that migr sets, and are the kernel's to check.
    let set = unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), length) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_may_have_a_path_that_is_longer_than_an_address() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("d".repeat(200));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("control.sock");
        assert!(UnixAddr::new(&path).is_err(), "or this shows nothing");
        for _ in 0..2 {
            let listener = UnixListener::from(listen_at(&path, 1).unwrap());
            let address = Address::of(&path).unwrap();
            let mut client = UnixStream::connect(address.path()).unwrap();
            client.write_all(b"hello").unwrap();
            drop(client);
            let mut heard = String::new();
            listener.accept().unwrap().0.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "hello");
        }
        let nobody = UnixStream::connect(Address::of(&path).unwrap().path()).unwrap_err();
        assert_eq!(nobody.kind(), ErrorKind::ConnectionRefused);
        let gone = Address::of(&parent.path().join("gone/control.sock")).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }
}
