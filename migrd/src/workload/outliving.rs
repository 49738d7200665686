//! What a daemon does with any process of its own that outlives it: VMM children
//! and keepers of process trees.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use prost::Message;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::sys::process::PidFd;
use crate::sys::{fds, memfd, sockets};

/// The running binary, even if its file was replaced since.
#[must_use]
pub fn own_program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

/// A listening socket at `path`, in place of the one of a process that is dead.
///
/// # Errors
/// When the path can't have one.
pub fn control_socket(path: &Path) -> io::Result<OwnedFd> {
    sockets::listen_at(path, 16)
}

/// Connects to the one at `path`.
///
/// # Errors
/// When there is none, or nobody listens at it.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = sockets::Address::of(path)?;
    UnixStream::connect(address.path()).await
}

/// A configuration, as it is handed over.
///
/// # Errors
/// When there is no memory for it.
pub fn config_file(config: &impl Message) -> io::Result<OwnedFd> {
    use std::os::unix::fs::FileExt;
    let bytes = config.encode_to_vec();
    let file = memfd::create(c"migr-config", bytes.len() as u64)?;
    file.write_all_at(&bytes, 0)?;
    Ok(file.into())
}

/// Its first byte and what came beside it; no byte when it is gone.
///
/// # Errors
/// When the connection breaks.
pub async fn greeting(socket: &UnixStream) -> io::Result<(Option<u8>, Vec<OwnedFd>)> {
    loop {
        socket.readable().await?;
        let mut first = [0];
        let read = || fds::receive(socket.as_fd(), &mut first);
        match socket.try_io(Interest::READABLE, read) {
            Ok((length, shared)) => return Ok(((length > 0).then_some(first[0]), shared)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// The last line of what it wrote to `log`, for an error message.
#[must_use]
pub fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().last().map_or_else(String::new, |line| format!("; its last words: {line}"))
}

/// Waits for the end of the process and leaves no zombie of it.
pub async fn ended(process: &PidFd) -> Option<std::process::ExitStatus> {
    if let Ok(readable) = process.watch().and_then(fds::readable) {
        let _ = readable.readable().await;
    }
    process.reap()
}

/// Counts how often the bell was rung, from now on.
///
/// # Errors
/// When it can't be waited for.
pub fn watch_bell(bell: OwnedFd) -> io::Result<watch::Receiver<u64>> {
    let rung = fds::readable(bell.try_clone()?)?;
    let mut bell = File::from(bell);
    let (written, watched) = watch::channel(0_u64);
    tokio::spawn(async move {
        while let Ok(mut ready) = tokio::select! {
            ready = rung.readable() => ready,
            () = written.closed() => return,
        } {
            use std::io::Read;
            let mut count = [0; 8];
            let read = bell.read(&mut count);
            ready.clear_ready();
            if read.is_ok() {
                written.send_modify(|n| *n = n.wrapping_add(u64::from_ne_bytes(count)));
            }
        }
    });
    Ok(watched)
}
