//! What runc takes for CRIU.
//!
//! runc starts `criu swrk N` and speaks to it by the descriptor N. This stands in for
//! it: of a restore it gives the keeper runc's end of the socket, gets another one in
//! exchange, and becomes CRIU. So the keeper is between the two, and CRIU still is the
//! child of runc that runc takes it for, in the container's cgroup.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{MsgFlags, recv};
use prost::Message;

use crate::keeper::criu::rpc::{Request, RequestType};
use crate::sys::fds;
use crate::sys::sockets::Address;

/// The longest request that is looked at (bytes).
pub(super) const REQUEST_BYTES: usize = 64 << 10;

/// How it is started.
#[derive(Clone, Debug, clap::Args)]
pub struct ShimArgs {
    /// Where the keeper listens
    #[arg(long)]
    pub socket: PathBuf,
    /// CRIU
    #[arg(long)]
    pub criu: PathBuf,
    /// What CRIU makes sees its cgroup as the root of all
    #[arg(long)]
    pub cgroup_namespace: bool,
    /// What runc wants of CRIU
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<OsString>,
}

/// Becomes CRIU. Returns only when it can't.
///
/// # Errors
/// Why it can't.
pub fn shim(args: &ShimArgs) -> io::Result<()> {
    if let Some(number) = socket_number(&args.words) {
        let mut socket = fds::inherited(number)?;
        if is_restore(&socket)? {
            hand_over(&mut socket, args)?;
        }
        // It stays open under its number for what this becomes.
        std::mem::forget(socket);
    }
    let mut criu = Command::new(&args.criu);
    Err(criu.arg("--no-default-config").args(&args.words).exec())
}

/// The N of `swrk N`.
fn socket_number(words: &[OsString]) -> Option<RawFd> {
    let [.., verb, number] = words else { return None };
    (verb == "swrk").then(|| number.to_str()?.parse().ok()).flatten()
}

/// Whether the request that comes next is to restore. It stays where it is.
fn is_restore(socket: &OwnedFd) -> io::Result<bool> {
    let mut bytes = vec![0; REQUEST_BYTES];
    let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
    let request = Request::decode(bytes.get(..length).unwrap_or_default());
    let request = request.map_err(|e| io::Error::other(format!("not a request to CRIU: {e}")))?;
    Ok(request.r#type == i32::from(RequestType::Restore))
}

/// Gives the keeper runc's end, and puts what it gets for it in its place.
fn hand_over(socket: &mut OwnedFd, args: &ShimArgs) -> io::Result<()> {
    let keeper = UnixStream::connect(Address::of(&args.socket)?.path())?;
    fds::send(&keeper, &[1], &[socket.as_fd()])?;
    let mut answer = [0];
    // It has put this process where CRIU is to be by now.
    let (length, mut given) = fds::receive(&keeper, &mut answer)?;
    let theirs = given.pop().filter(|_| length == 1);
    let theirs =
        theirs.ok_or_else(|| io::Error::other("the keeper does not want a restore now"))?;
    if args.cgroup_namespace {
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
    }
    nix::unistd::dup2(&theirs, socket)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_the_last_word() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(socket_number(&words(&["swrk", "3"])), Some(3));
        assert_eq!(socket_number(&words(&["--x", "swrk", "11"])), Some(11));
        for other in [&[][..], &["swrk"], &["swrk", "x"], &["--version"], &["check", "3"]] {
            assert_eq!(socket_number(&words(other)), None, "{other:?}");
        }
    }
}
