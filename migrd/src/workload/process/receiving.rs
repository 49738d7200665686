//! Memory that CRIU hands over while it writes a tree.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::failed;
use super::images::ImagesError;
use super::images::page_server::PageServer;
use super::streams::TreeStreams;
use crate::keeper::cgroup::Cgroup;
use crate::workload::WorkloadError;

/// It is being received.
pub(super) struct Receiving {
    socket: UnixStream,
    over: JoinHandle<Result<(), ImagesError>>,
}

impl Receiving {
    /// Receives memory of the processes of `cgroup` into the images of `chunks`; the
    /// other end is CRIU's.
    pub(super) fn start(
        chunks: &Arc<TreeStreams>,
        cgroup: &Path,
    ) -> Result<(Self, OwnedFd), WorkloadError> {
        let (socket, criu) = UnixStream::pair().map_err(failed("make a socket for memory"))?;
        let served = socket.try_clone().map_err(failed("make a socket for memory"))?;
        let (chunks, cgroup) = (Arc::clone(chunks), Cgroup::at(cgroup));
        let over = tokio::task::spawn_blocking(move || {
            let process = |number| process(&cgroup, number);
            PageServer::new(chunks.images(), served, process)?.serve()
        });
        Ok((Self { socket, over }, criu.into()))
    }

    /// Has CRIU fail that sends it.
    pub(super) fn abort(&self) {
        // It may have ended already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Waits until all of it is there; why it will not be, if the reason is here and
    /// not that CRIU has ended.
    pub(super) async fn end(self) -> Result<(), Option<ImagesError>> {
        // CRIU may have failed before it sent anything.
        drop(self.socket);
        match self.over.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(ImagesError::System { source, .. })) if is_the_end(&source) => Err(None),
            Ok(Err(error)) => Err(Some(error)),
            Err(error) => Err(Some(ImagesError::Odd(format!("memory was not received: {error}")))),
        }
    }
}

fn is_the_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

/// The process of a tree that has a number in the innermost namespace that it is in, which is
/// that of its tree (proc(5), `NSpid`).
pub(super) fn process(cgroup: &Cgroup, number: u32) -> io::Result<u32> {
    for pid in cgroup.processes()? {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        if innermost(&status) == Some(number) {
            return Ok(pid);
        }
    }
    Err(io::Error::other(format!("process {number} of the tree is gone")))
}

fn innermost(status: &str) -> Option<u32> {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_of_a_process_is_that_of_its_own_namespace() {
        assert_eq!(innermost("Name:\tx\nNSpid:\t4711\t12\t3\nNSpgid:\t1\n"), Some(3));
        assert_eq!(innermost("NSpid:\t4711\n"), Some(4711));
        assert_eq!(innermost("Name:\tx\n"), None);
    }
}
