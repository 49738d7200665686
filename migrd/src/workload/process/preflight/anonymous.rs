//! Descriptors of the kernel's own making: which kinds CRIU carries, from its
//! `files.c`.

use super::descriptors::{Descriptor, Kind};
use super::report::Report;
use super::tree::Tree;

/// Of a pidfd that is of a thread (`PIDFD_THREAD`).
const OF_A_THREAD: i32 = libc::O_EXCL;

pub(super) fn check(tree: &Tree, descriptors: &[Descriptor<'_>], report: &mut Report) {
    for descriptor in descriptors {
        match &descriptor.kind {
            Kind::Anonymous(_) if descriptor.info.semaphore => report.add(
                "eventfd-semaphore",
                format!("{descriptor} is an eventfd that CRIU would make a counter of"),
                "have the program use an eventfd without EFD_SEMAPHORE, or a pipe",
            ),
            Kind::Anonymous(name) => anonymous(descriptor, name, report),
            Kind::PidFd => pid_fd(tree, descriptor, report),
            Kind::Other(what) => report.add(
                "anonymous-file",
                format!("{descriptor} is {what}, which CRIU does not carry"),
                "have the program close it, or start it without what uses it",
            ),
            Kind::Socket(_) | Kind::Pipe(_) | Kind::Namespace(_) | Kind::Path(_) => {}
        }
    }
}

fn anonymous(descriptor: &Descriptor<'_>, name: &str, report: &mut Report) {
    // With and without brackets: the kernel is not consistent.
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    let (code, what, remedy) = match bare {
        "eventfd" | "eventpoll" | "inotify" | "fanotify" | "signalfd" | "timerfd" => return,
        "io_uring" => (
            "io-uring",
            "an io_uring",
            "start the program with its option for epoll or threads instead of io_uring (for \
             libuv: UV_USE_IO_URING=0)",
        ),
        "userfaultfd" => (
            "userfaultfd",
            "a userfaultfd",
            "start the program without what uses it (post-copy memory, some garbage collectors)",
        ),
        "perf_event" => ("perf", "a performance counter", "end the profiling"),
        "bpf-map" | "bpf-prog" | "bpf_link" | "bpf_iter" | "btf" | "bpf-stats" | "bpf-token" => (
            "bpf",
            "an object of BPF",
            "end the program that uses BPF, or keep it outside of what is moved",
        ),
        _ => (
            "anonymous-file",
            "of a kind that CRIU does not know",
            "have the program close it, or start it without what uses it",
        ),
    };
    let message = format!("{descriptor} is {what} ({name}), which CRIU does not carry");
    report.add(code, message, remedy);
}

fn pid_fd(tree: &Tree, descriptor: &Descriptor<'_>, report: &mut Report) {
    if descriptor.info.flags & OF_A_THREAD != 0 {
        report.add(
            "pidfd",
            format!("{descriptor} is a pidfd of a thread, which CRIU does not carry"),
            "start the program without what uses PIDFD_THREAD",
        );
    }
    // Of a process that is gone it is carried.
    let outside = descriptor
        .info
        .pid
        .and_then(|pid| u32::try_from(pid).ok())
        .filter(|pid| tree.get(*pid).is_none());
    if let Some(pid) = outside {
        let whose = if pid == 0 {
            "a process that can't be seen from here".to_owned()
        } else {
            format!("process {pid}")
        };
        report.add(
            "pidfd",
            format!("{descriptor} is a pidfd of {whose}, which does not move with it"),
            "have the program close it, or start both together as one workload",
        );
    }
}
