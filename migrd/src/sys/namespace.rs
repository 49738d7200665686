//! A process that begins as the init of namespaces of its own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

/// Above every number that is handed over, so that moving one descriptor into
/// place cannot overwrite the next.
const ABOVE: RawFd = 64;
/// How many descriptors can be handed over.
const HANDED: usize = 8;

/// What is run as an init.
#[derive(Debug)]
pub struct Init<'a> {
    /// Path of the program.
    pub program: CString,
    /// Its arguments, the name first.
    pub arguments: Vec<CString>,
    /// Each of these is open in it under the number beside it, and no other.
    pub fds: Vec<(BorrowedFd<'a>, RawFd)>,
    /// The cgroup v2 directory that it is in from its first instruction on.
    pub cgroup: BorrowedFd<'a>,
}

/// Starts `init` in new PID, mount and IPC namespaces (clone(2), `clone3`), with
/// an empty environment; its process id here.
///
/// # Errors
/// What clone3 says. That the program can't be run is said by its exit status,
/// 127.
pub fn start(init: &Init<'_>) -> io::Result<u32> {
    let mut words: Vec<_> = init.arguments.iter().map(|word| word.as_ptr()).collect();
    words.push(std::ptr::null());
    let environment = [std::ptr::null::<libc::c_char>()];
    if init.fds.len() > HANDED {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let handed: Vec<(RawFd, RawFd)> =
        init.fds.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect();
    // SAFETY: all zero is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let spaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC;
    let into_cgroup = 0x2_0000_0000_u64;
    args.flags = u64::from(spaces.cast_unsigned()) | into_cgroup;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    args.cgroup = u64::from(init.cgroup.as_raw_fd().cast_unsigned());
    // SAFETY: `args` is of the size that is told. Without CLONE_VM the child has
    // memory of its own, and until its exec only makes system calls.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut args, std::mem::size_of::<libc::clone_args>())
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: as said above: this is the child, and it never returns.
        unsafe {
            place(&handed);
            libc::execve(init.program.as_ptr(), words.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
    }
    u32::try_from(pid).map_err(io::Error::other)
}

/// Puts descriptors under their numbers and has all others closed by the exec.
///
/// # Safety
/// For a process that is about to exec.
unsafe fn place(handed: &[(RawFd, RawFd)]) {
    let mut lifted = [-1; HANDED];
    for ((fd, _), slot) in handed.iter().zip(&mut lifted) {
        // SAFETY: plain system calls on numbers.
        *slot = unsafe { libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, ABOVE) };
    }
    // SAFETY: as above.
    let closed =
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    for ((_, number), up) in handed.iter().zip(lifted) {
        // SAFETY: as above.
        if closed < 0 || up < 0 || unsafe { libc::dup2(up, *number) } < 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(127) };
        }
    }
}

/// Signals as a program finds them that was started by a shell: none blocked,
/// none ignored.
///
/// # Errors
/// What sigprocmask(2) says.
pub fn default_signals() -> io::Result<()> {
    SigSet::empty().thread_set_mask()?;
    for each in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: the default action runs no code of this process.
        unsafe { signal(each, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// Enters the network namespace of `fd`.
///
/// # Errors
/// What setns(2) says.
pub fn enter_network(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setns(fd, CloneFlags::CLONE_NEWNET)?)
}
