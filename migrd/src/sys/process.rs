//! Starting, watching and killing a child process, by pidfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

use nix::sched::{CloneFlags, setns};

/// Above every number that a child inherits, so that moving one descriptor
/// into place cannot overwrite the next.
const ABOVE: RawFd = 64;

/// How many descriptors [`isolate`] hands over at most.
pub const CROSSING_MAX: usize = 16;

/// Makes `command` run in a session of its own, with each of `fds` open under
/// the number beside it, and no other that is not meant to cross an exec. Past
/// the first [`CROSSING_MAX`] of them there is no room.
pub fn isolate(command: &mut Command, fds: Vec<(OwnedFd, RawFd)>) {
    let hook = move || {
        nix::unistd::setsid()?;
        let mut lifted = [(-1, -1); CROSSING_MAX];
        for ((fd, number), slot) in fds.iter().zip(&mut lifted) {
            // SAFETY: duplicates an open descriptor of ours.
            let up = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, ABOVE) };
            if up < 0 {
                return Err(io::Error::last_os_error());
            }
            *slot = (up, *number);
        }
        // What some library or our own parent left open must not be found in
        // the child, least of all under one of the numbers.
        // SAFETY: only marks descriptors to be closed by the exec.
        let rest =
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        if rest < 0 {
            return Err(io::Error::last_os_error());
        }
        for (up, number) in lifted.iter().take(fds.len()) {
            // SAFETY: what stood under `number` was lifted above, or is a
            // descriptor that the exec would close anyway.
            if unsafe { libc::dup2(*up, *number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the hook only makes system calls; it takes
    // no lock and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

/// Makes `command` run in the cgroup whose `cgroup.procs` is open for writing as
/// `procs`, from before its first instruction (cgroups(7)).
pub fn join_cgroup(command: &mut Command, procs: OwnedFd) {
    // "0" is the process that writes.
    let hook = move || nix::unistd::write(&procs, b"0").map(drop).map_err(io::Error::from);
    // SAFETY: between fork and exec the hook only makes a system call; it takes
    // no lock and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

/// Makes `command` run in each of these namespaces, of the kind beside it (setns(2)).
/// One of PIDs is not entered like this: it holds for children.
pub fn enter(command: &mut Command, namespaces: Vec<(OwnedFd, CloneFlags)>) {
    if namespaces.is_empty() {
        return;
    }
    let hook = move || {
        for (namespace, kind) in &namespaces {
            setns(namespace, *kind)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the hook only makes system calls; it takes no lock
    // and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

/// When the process that has `pid` now was started, in clock ticks since the host was
/// (`starttime` of proc_pid_stat(5)): with its number, that names it for good.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The command may have blanks and parentheses in it.
    let stat = String::from_utf8_lossy(&stat);
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(19)?.parse().ok()
}

/// Whether this process may read the limits of another one: `prlimit(2)` asks for
/// `CAP_SYS_RESOURCE`, unless that one runs as the same user and group in every way.
///
/// # Errors
/// What the kernel says instead.
pub fn may_read_limits(pid: u32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: sets nothing, and writes one limit, which lives here.
    let read = unsafe { libc::prlimit(pid, libc::RLIMIT_CPU, std::ptr::null(), &raw mut limit) };
    if read == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A process, named so that its number being used again does no harm.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Of the process that has `pid` now.
    ///
    /// # Errors
    /// What `pidfd_open(2)` says.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: a plain system call that returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Its descriptor `number`, as one of ours.
    ///
    /// # Errors
    /// What `pidfd_getfd(2)` says.
    pub fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        let (call, fd) = (libc::SYS_pidfd_getfd, self.0.as_raw_fd());
        // SAFETY: a plain system call that returns a new descriptor.
        let taken = unsafe { libc::syscall(call, fd, number, 0) };
        let taken = RawFd::try_from(taken).map_err(io::Error::other)?;
        if taken < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(taken) })
    }

    /// Kills it. Not an error when it is gone already.
    ///
    /// # Errors
    /// What `pidfd_send_signal(2)` says.
    pub fn kill(&self) -> io::Result<()> {
        match self.signal(libc::SIGKILL) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// What `pidfd_send_signal(2)` says; `ESRCH` when it is gone.
    pub fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        let (call, fd) = (libc::SYS_pidfd_send_signal, self.0.as_raw_fd());
        // SAFETY: a plain system call; a null siginfo means the usual one.
        if unsafe { libc::syscall(call, fd, signal, none, 0) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    /// Whether it is a child of ours that has ended otherwise than well. It is not reaped.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.ended(libc::WNOWAIT).is_some_and(|status| !status.success())
    }

    /// Takes the exit status of a child of ours that has ended, so that no
    /// zombie stays; `None` when it is not our child or has not ended.
    #[must_use]
    pub fn reap(&self) -> Option<ExitStatus> {
        self.ended(0)
    }

    fn ended(&self, how: libc::c_int) -> Option<ExitStatus> {
        // SAFETY: all zero is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let id = libc::id_t::try_from(self.0.as_raw_fd()).ok()?;
        let flags = libc::WEXITED | libc::WNOHANG | how;
        // SAFETY: `info` outlives the call.
        let result = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, flags) };
        // SAFETY: after a successful waitid these fields are set, or zero.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        if result != 0 || pid == 0 {
            return None;
        }
        let exited = info.si_code == libc::CLD_EXITED;
        Some(ExitStatus::from_raw(if exited { status << 8 } else { status & 0x7f }))
    }
}

impl PidFd {
    /// Another name for the same process.
    ///
    /// # Errors
    /// When there is no room for another descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// A descriptor that becomes readable when the process ends.
    ///
    /// # Errors
    /// When there is no room for another descriptor.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
