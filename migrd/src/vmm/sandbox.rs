//! What the child may still ask of the kernel once it is ready. Everything
//! else kills it: a guest that breaks out finds neither files nor network.

use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// The one thing that may be asked of a descriptor (`F_GETFD`).
const F_GETFD: u64 = 1;

/// Descriptors that the child may have open: its own few and one a vCPU.
const MAX_FDS: u64 = 1024;

/// The child could not be confined, so it does not run.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The filter is wrong, or the kernel refuses it.
    #[error("cannot confine the VMM: the kernel needs CONFIG_SECCOMP_FILTER")]
    Seccomp(#[from] seccompiler::Error),
    /// A rule is wrong.
    #[error("cannot confine the VMM: a rule does not compile")]
    Rule(#[from] seccompiler::BackendError),
    /// A limit could not be set.
    #[error("cannot limit the VMM")]
    Limit(#[from] nix::Error),
}

/// What every thread needs: its memory, its locks, its eventfds, its end.
const EVERY_THREAD: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// The control thread reads kernels, closes disks and talks to the daemon.
const CONTROL: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
];

/// The console thread appends to the log.
const CONSOLE: &[i64] = &[
    libc::SYS_close,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_statx,
];

/// A device's thread uses the files behind devices and waits for them.
const DEVICE: &[i64] = &[
    libc::SYS_close,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
];

/// No more privileges, no core dumps, no tracing by others, few descriptors.
///
/// # Errors
/// When the kernel refuses.
pub fn limit_process() -> Result<(), SandboxError> {
    nix::sys::prctl::set_no_new_privs()?;
    nix::sys::prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FDS, MAX_FDS)?;
    Ok(())
}

/// Confines the calling thread to what a vCPU needs.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_vcpu() -> Result<(), SandboxError> {
    confine(&[], true)
}

/// Confines the calling thread to what the control thread needs.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_control() -> Result<(), SandboxError> {
    confine(CONTROL, true)
}

/// Confines the calling thread to what a device's thread needs.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_device() -> Result<(), SandboxError> {
    confine(DEVICE, false)
}

/// Confines the calling thread to what the console thread needs.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_console() -> Result<(), SandboxError> {
    confine(CONSOLE, false)
}

fn confine(more: &[i64], kvm: bool) -> Result<(), SandboxError> {
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        EVERY_THREAD.iter().chain(more).map(|call| (*call, Vec::new())).collect();
    // std looks at a descriptor before it closes it, to find double closes.
    rules.insert(libc::SYS_fcntl, vec![only(1, SeccompCmpOp::Eq, F_GETFD)?]);
    if kvm {
        // Of all ioctls only KVM's, which share one type byte.
        let of_kvm = u64::from(kvm_bindings::KVMIO) << 8;
        let rule = only(1, SeccompCmpOp::MaskedEq(0xff00), of_kvm)?;
        rules.insert(libc::SYS_ioctl, vec![rule]);
    }
    let (otherwise, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

/// Allows a call when its argument `index` compares to `value` like that.
fn only(index: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, how, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}
