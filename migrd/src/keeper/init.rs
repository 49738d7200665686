//! The first moments of a process tree: its init, before it becomes the command.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use migr_proto::v1 as proto;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::stat::{Mode, umask};
use prost::Message;

use super::mounts;
use crate::sys::{fds, namespace};

/// The numbers under which an init finds its descriptors, beside 0 to 2.
pub mod number {
    use std::os::fd::RawFd;

    /// Where it says why it could not become the command; closed when it has.
    pub const TROUBLE: RawFd = 3;
    /// An encoded `ProcessConfig`.
    pub const CONFIG: RawFd = 4;
    /// The network namespace to enter, if there is one.
    pub const NETWORK: RawFd = 5;
}

/// Where commands are looked for that have no slash, when the environment has no
/// PATH of its own.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The longest configuration (bytes): the longest command line and environment
/// that Linux takes are far below.
const CONFIG_BYTES: u64 = 8 << 20;
/// The exit status of an init that could not become its command.
const FAILED: i32 = 127;

/// Becomes the command. Returns only when that is not possible, which whoever
/// started this has then been told.
pub fn run() -> i32 {
    let Ok(trouble) = fds::inherited(number::TROUBLE) else {
        eprintln!("migrd: process-init is started by migrd, not by hand");
        return FAILED;
    };
    // The command must not have it.
    if let Err(error) = fcntl(&trouble, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        eprintln!("migrd: process-init: {error}");
        return FAILED;
    }
    let error = match become_command() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    // If nobody listens any more, nobody wants to know.
    let _ = File::from(trouble).write_all(error.to_string().as_bytes());
    FAILED
}

fn become_command() -> io::Result<std::convert::Infallible> {
    let mut bytes = Vec::new();
    File::from(fds::inherited(number::CONFIG)?).take(CONFIG_BYTES).read_to_end(&mut bytes)?;
    let config = proto::ProcessConfig::decode(bytes.as_slice()).map_err(io::Error::other)?;
    if let Ok(network) = fds::inherited(number::NETWORK) {
        namespace::enter_network(network.as_fd())?;
    }
    mounts::make()?;
    if config.adopted != 0 {
        no_stdio()?;
    }
    umask(Mode::from_bits_truncate(0o022));
    nix::unistd::setsid()?;
    std::env::set_current_dir(&config.cwd)
        .map_err(|e| io::Error::other(format!("its directory {}: {e}", config.cwd)))?;
    let name = config.argv.first().ok_or_else(|| io::Error::other("it has no command"))?;
    let program = find(name, &config.env)?;
    let words = c_strings(&config.argv)?;
    let environment = c_strings(&config.env)?;
    let path = CString::new(program.as_os_str().as_encoded_bytes())?;
    namespace::default_signals()?;
    nix::unistd::execve(&path, &words, &environment)
        .map_err(|e| io::Error::other(format!("cannot run {}: {e}", program.display())))
}

/// Opens `/dev/null` as standard input and output, among the mounts of the tree: what
/// was handed over is of its keeper's.
fn no_stdio() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(nix::unistd::dup2_stderr(&null)?)
}

fn c_strings(words: &[String]) -> io::Result<Vec<CString>> {
    Ok(words.iter().map(|word| CString::new(word.as_str())).collect::<Result<_, _>>()?)
}

/// The file of a command: as it stands when it has a slash, otherwise the first
/// in PATH that can be run.
fn find(name: &str, environment: &[String]) -> io::Result<PathBuf> {
    if name.contains('/') {
        return Ok(name.into());
    }
    let path = environment.iter().find_map(|entry| entry.strip_prefix("PATH="));
    let path = path.unwrap_or(DEFAULT_PATH);
    let runs = |file: &PathBuf| {
        file.is_file() && nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok()
    };
    let found = path.split(':').map(|directory| Path::new(directory).join(name)).find(runs);
    found.ok_or_else(|| {
        io::Error::other(format!("there is no command {name} in its PATH ({path:?})"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_looked_for_in_its_own_path() {
        assert_eq!(find("sh", &["PATH=/nowhere:/bin".into()]).unwrap(), Path::new("/bin/sh"));
        assert_eq!(find("./x", &[]).unwrap(), Path::new("./x"));
        assert!(find("sh", &["PATH=/nowhere".into()]).is_err());
        assert!(find("sh", &[]).is_ok());
    }
}
