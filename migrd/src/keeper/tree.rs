//! The processes of a tree: how they start, and how their init ends.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use migr_proto::v1 as proto;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use prost::Message;

use super::cgroup::Cgroup;
use super::init::number;
use super::stdio::Stdio;
use crate::sys::namespace::{self, Init};
use crate::sys::process::PidFd;

/// Starts the command of `config` as the init of a new tree; its process id.
///
/// # Errors
/// When the system refuses, or the command can't be run, with the reason.
pub fn start(
    config: &proto::ProcessConfig,
    cgroup: &Cgroup,
    stdio: &Stdio,
    network: Option<BorrowedFd<'_>>,
) -> io::Result<u32> {
    let (stdin, stdout) =
        stdio.theirs().ok_or_else(|| io::Error::other("its input and output are in use"))?;
    start_with(config, cgroup, (stdin, stdout), network)
}

/// Starts the first process of a tree that is to be adopted; its process id.
///
/// # Errors
/// When the system refuses, with the reason.
pub fn start_reaper(config: &proto::ProcessConfig, cgroup: &Cgroup) -> io::Result<u32> {
    // By its path: as the file that the keeper runs it would be on a mount of the
    // keeper's.
    let program = std::env::current_exe()?.to_string_lossy().into_owned();
    let config = proto::ProcessConfig {
        argv: vec![program, "process-reaper".to_owned(), config.adopted.to_string()],
        cwd: "/".to_owned(),
        ..config.clone()
    };
    let null = File::options().read(true).write(true).open("/dev/null")?;
    start_with(&config, cgroup, (null.as_fd(), null.as_fd()), None)
}

fn start_with(
    config: &proto::ProcessConfig,
    cgroup: &Cgroup,
    (stdin, stdout): (BorrowedFd<'_>, BorrowedFd<'_>),
    network: Option<BorrowedFd<'_>>,
) -> io::Result<u32> {
    let (mut trouble, said) = io::pipe()?;
    let mut handed_config = File::from(memfd_create(c"config", MFdFlags::MFD_CLOEXEC)?);
    handed_config.write_all(&config.encode_to_vec())?;
    handed_config.seek(SeekFrom::Start(0))?;
    let mut fds = vec![
        (stdin, 0),
        (stdout, 1),
        (stdout, 2),
        (said.as_fd(), number::TROUBLE),
        (handed_config.as_fd(), number::CONFIG),
    ];
    fds.extend(network.map(|fd| (fd, number::NETWORK)));
    let directory = cgroup.directory()?;
    let pid = namespace::start(&Init {
        // The running binary, even if its file was replaced since.
        program: CString::from(c"/proc/self/exe"),
        arguments: vec![CString::from(c"migrd"), CString::from(c"process-init")],
        fds,
        cgroup: directory.as_fd(),
    })?;
    drop(said);
    let mut why = String::new();
    trouble.read_to_string(&mut why)?;
    if why.is_empty() {
        return Ok(pid);
    }
    // It says nothing but its last word, and ends.
    wait(pid);
    Err(io::Error::other(why))
}

/// Waits for the end of a child of this process.
pub fn wait(pid: u32) -> Option<ExitStatus> {
    loop {
        return match waitpid(as_pid(pid)?, None) {
            Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::from_raw(code << 8)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::from_raw(signal as i32)),
            Err(nix::Error::EINTR) | Ok(_) => continue,
            Err(_) => None,
        };
    }
}

fn as_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().filter(|pid| *pid > 0).map(Pid::from_raw)
}

/// Asks the init `process`, whose number is `pid`, to end.
///
/// # Errors
/// When it does not handle SIGTERM: the kernel does not deliver it to the init of
/// a PID namespace then (pid_namespaces(7)).
pub fn terminate(process: &PidFd, pid: u32) -> io::Result<()> {
    let gone = || io::Error::other("it has ended");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|_| gone())?;
    let mask = |name: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix(name));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    };
    // One that it blocks waits for its sigwait(3) or signalfd(2), and while it is in
    // sigwait the kernel does not show what is blocked.
    let heard = mask("SigCgt:") | mask("SigBlk:");
    let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let call = call.split_whitespace().next().and_then(|number| number.parse().ok());
    let waits = call == Some(libc::SYS_rt_sigtimedwait);
    if heard & (1 << (Signal::SIGTERM as u32 - 1)) == 0 && !waits {
        return Err(io::Error::other(
            "its first process does not handle SIGTERM, which as the init of its PID namespace it \
             would have to: end it with `migctl stop --force`",
        ));
    }
    // By now another process may have the number.
    process.signal(libc::SIGTERM).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => gone(),
        _ => error,
    })
}
