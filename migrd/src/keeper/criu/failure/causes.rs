//! The causes that are known, by what CRIU says when it meets them (3.17 to 4.2).

/// A cause, and how it shows in a line of the log.
#[derive(Debug)]
pub(super) struct Cause {
    /// Its name.
    pub code: &'static str,
    /// It is the cause when all words of one of these are in the line.
    pub marks: &'static [&'static [&'static str]],
    /// What it means.
    pub says: &'static str,
    /// Whether the line says which file or process, and no more than that.
    pub quoted: bool,
    /// What to do.
    pub remedy: &'static str,
}

impl Cause {
    pub(super) fn is_in(&self, line: &str) -> bool {
        self.marks.iter().any(|words| words.iter().all(|word| line.contains(word)))
    }
}

/// Where two are in one line, the first is meant.
pub(super) const CAUSES: &[Cause] = &[
    Cause {
        code: "connection_tracking",
        marks: &[&["-22 reported by netlink"]],
        says: "the kernel does not tell CRIU which connections of a network it tracks",
        quoted: false,
        remedy: "modprobe nf_conntrack_netlink at the host that it leaves",
    },
    Cause {
        code: "tcp_established",
        marks: &[&["Connected TCP socket"]],
        says: "there is an established TCP connection",
        quoted: false,
        remedy: "close it, give --drop-connections, or run the process in a network of its own",
    },
    Cause {
        code: "file_locks",
        marks: &[&["Some file locks are hold"]],
        says: "the process holds file locks",
        quoted: false,
        remedy: "give --file-locks if everyone who locks these files moves with it",
    },
    Cause {
        code: "ghost_file",
        marks: &[&["Can't dump ghost file"]],
        says: "a deleted file that is still open is too large to be moved along",
        quoted: true,
        remedy: "allow more with --ghost-limit SIZE, or have the process close it",
    },
    Cause {
        code: "link_remap",
        marks: &[&["Can't create link remap"]],
        says: "an open file has lost the name it was opened by and has another one",
        quoted: true,
        remedy: "give --link-remap, which makes a hard link beside it that both hosts must see, \
                 or have the process close it",
    },
    Cause {
        code: "outer_terminal",
        marks: &[
            &["without correspond master peer"],
            &["Only one slave external peer"],
            &["Found dangling tty"],
        ],
        says: "the process has a terminal open that belongs to somebody outside",
        quoted: false,
        remedy: "start it without a terminal, by \"migctl exec-process\"",
    },
    Cause {
        code: "outer_session",
        marks: &[
            &["is not a session leader"],
            &["session leader of", "outside of its pid namespace"],
        ],
        says: "the process belongs to a session that began outside of it",
        quoted: true,
        remedy: "start it by \"migctl exec-process\", which gives it a session of its own",
    },
    Cause {
        code: "outer_unix_socket",
        marks: &[
            &["External socket is used"],
            &["Can't dump half of stream unix connection"],
            &["Can't dump name-less external socket"],
            &["External socket found in image"],
        ],
        says: "the process is connected by a unix socket to a process that does not move with it",
        quoted: false,
        remedy: "have it close the connection (to a system bus or log, for instance), or move both \
                 as one workload",
    },
    Cause {
        code: "io_uring",
        // Rings are the descriptors that the kernel refuses to send (EINVAL).
        marks: &[&["send_fds failed (-22)"]],
        says: "the process uses io_uring, which CRIU cannot save",
        quoted: false,
        remedy: "turn it off in the program, or run it where io_uring is not allowed",
    },
    Cause {
        code: "vsock",
        marks: &[&["Unknown socket collected (family 40)"]],
        says: "the process has a vsock socket, which CRIU cannot save",
        quoted: false,
        remedy: "have the process close it before it moves",
    },
    Cause {
        code: "socket_family",
        marks: &[&["Unknown socket collected"]],
        says: "the process has a socket of a kind that CRIU cannot save",
        quoted: true,
        remedy: "have the process close it before it moves",
    },
    Cause {
        code: "file_type",
        marks: &[&["Can't dump file", "of that type"]],
        says: "the process has a file open of a kind that CRIU cannot save",
        quoted: true,
        remedy: "have the process close it before it moves; devices and the like stay at a host",
    },
    Cause {
        code: "outer_mount",
        marks: &[&["Can't lookup mount"]],
        says: "a file is open on a file system that is not mounted where the process runs",
        quoted: true,
        remedy: "have the process open its files itself, after it is started",
    },
    Cause {
        code: "file_changed",
        marks: &[&["File ", "has bad size"], &["File ", "has bad build-ID"]],
        says: "an open file is not what it was when the process was stopped",
        quoted: true,
        remedy: "files, programs and libraries too, must be the same at both hosts, and nobody \
                 else may write to them meanwhile: share them, or copy this one",
    },
    Cause {
        code: "file_missing",
        marks: &[&["Can't open file", "on restore"], &["Can't open file", "No such file"]],
        says: "an open file cannot be opened where the process is to run",
        quoted: true,
        remedy: "files, programs and libraries too, must be the same at both hosts: share them, \
                 or copy this one",
    },
    Cause {
        code: "pid_taken",
        marks: &[&["Can't fork for", "File exists"]],
        says: "a process id is taken where the process is to run",
        quoted: true,
        remedy: "run the workload in a pid namespace of its own, by \"migctl exec-process\"",
    },
    Cause {
        code: "address_taken",
        marks: &[&["Can't bind inet socket", "Address already in use"]],
        says: "somebody else listens where the process does, on the host where it is to run",
        quoted: true,
        remedy: "end that one, or run the process in a network of its own",
    },
    Cause {
        code: "address_missing",
        marks: &[&["Can't bind inet socket", "Cannot assign requested address"]],
        says: "the host where it is to run does not have an address that the process uses",
        quoted: true,
        remedy: "add the address there, or run the process in a network of its own",
    },
    Cause {
        code: "cpu",
        marks: &[
            &["CPU instruction capabilities do not match"],
            &["CPU capabilities do not match"],
            &["FPU feature required by image"],
            &["CPU xfeatures has unsupported bits"],
            &["CPU xsave", "size mismatch"],
        ],
        says: "the processes may use instructions that the CPU where they are to run does not have",
        quoted: true,
        remedy: "move them to a host whose CPU is the same or newer",
    },
    Cause {
        code: "no_space",
        marks: &[&["No space left on device"]],
        says: "there is no space left for the images",
        quoted: true,
        remedy: "free memory or, for a checkpoint, disk space on this host",
    },
    Cause {
        code: "no_memory",
        marks: &[&["Cannot allocate memory"]],
        says: "there is not enough memory",
        quoted: true,
        remedy: "free memory on this host",
    },
    Cause {
        code: "capability",
        marks: &[&["CAP_CHECKPOINT_RESTORE"]],
        says: "migrd lacks CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, without which CRIU cannot work",
        quoted: false,
        remedy: "run migrd as root, with all capabilities",
    },
    Cause {
        code: "capability_resource",
        marks: &[&["Can't get rlimit"]],
        says: "migrd lacks CAP_SYS_RESOURCE, without which CRIU cannot see the limits of processes \
               of users other than root",
        quoted: false,
        remedy: "run migrd as root, with all capabilities",
    },
    Cause {
        code: "memory_tracking",
        marks: &[&["Tracking memory is not available"]],
        says: "this kernel does not tell which pages of a process change",
        quoted: false,
        remedy: "use --mode stop, or a kernel with CONFIG_MEM_SOFT_DIRTY",
    },
    Cause {
        code: "old_criu",
        marks: &[&["Unexpected rt vDSO area bounds"]],
        says: "this CRIU is too old for this kernel",
        quoted: false,
        remedy: "install a newer one, or name it with --criu PATH",
    },
    Cause {
        code: "traced",
        marks: &[&["Unable to interrupt task", "Operation not permitted"]],
        says: "a debugger or tracer is attached to the process",
        quoted: false,
        remedy: "detach it (gdb, strace and the like)",
    },
    Cause {
        code: "gone",
        marks: &[&["Unable to interrupt task", "No such process"]],
        says: "the process has ended",
        quoted: false,
        remedy: "see its output for the reason",
    },
    Cause {
        code: "slow_stop",
        marks: &[&["Timeout reached. Try to interrupt"], &["Unable to freeze cgroup"]],
        says: "the processes did not stop in time; one may be waiting for a disk or a dead server",
        quoted: false,
        remedy: "see which is in state D, and try again when it is not",
    },
    Cause {
        code: "mounts",
        marks: &[&["No mapping for", "mountpoint"], &["doesn't have a proper root mount"]],
        says: "a mount of the process has no counterpart",
        quoted: true,
        remedy: "mount the same things at both hosts",
    },
    Cause {
        code: "images",
        marks: &[&["Head magic doesn't match"], &["Can't read pages data"], &["Unexpected EOF on"]],
        says: "the images are incomplete or damaged",
        quoted: true,
        remedy: "take them again: what wrote them runs on, or is kept, at the source",
    },
    Cause {
        code: "compat",
        marks: &[&["running in 32-bit mode"], &["with LDT descriptors"]],
        says: "there is a 32-bit process, which this CRIU cannot save",
        quoted: true,
        remedy: "run a 64-bit build of the program",
    },
    Cause {
        code: "refused",
        marks: &[&["RPC client reported script error"]],
        says: "CRIU was told not to go on",
        quoted: false,
        remedy: "nothing is wrong with the process",
    },
];
