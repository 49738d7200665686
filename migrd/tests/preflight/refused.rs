//! What CRIU refuses.

use migrd::workload::process::preflight::Options;

use crate::harness::Tree;

#[test]
fn an_io_uring_is_refused() {
    let program = "check(libc.syscall(425, 4, ctypes.create_string_buffer(120)))";
    Tree::start(program).is_refused("io-uring", "send_fds failed");
}

#[test]
fn a_userfaultfd_is_refused() {
    Tree::start("check(libc.syscall(323, 0))").is_refused("userfaultfd", "userfaultfd");
}

#[test]
fn a_performance_counter_is_refused() {
    let program = "
attributes = ctypes.create_string_buffer(128)
attributes[0:8] = b'\\1\\0\\0\\0\\x80\\0\\0\\0'
check(libc.syscall(298, attributes, 0, -1, -1, 0))";
    Tree::start(program).is_refused("perf", "perf_event");
}

#[test]
fn a_map_of_bpf_is_refused() {
    let program = "
import struct
map = ctypes.create_string_buffer(struct.pack('IIII', 2, 4, 4, 1) + bytes(56))
check(libc.syscall(321, 0, map, 72))";
    Tree::start(program).is_refused("bpf", "bpf-map");
}

#[test]
fn a_vsock_is_refused() {
    Tree::start("s = socket.socket(socket.AF_VSOCK)").is_refused("vsock", "family 40");
}

#[test]
fn multipath_tcp_is_refused() {
    let program = "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)";
    Tree::start(program).is_refused("socket-family", "Unsupported proto 262");
}

#[test]
fn a_pipe_in_packet_mode_is_refused() {
    Tree::start("p = os.pipe2(os.O_DIRECT)").is_refused("packet-pipe", "packetized");
}

#[test]
fn a_device_is_refused() {
    Tree::start("f = os.open('/dev/fuse', os.O_RDWR)").is_refused("device", "(chr 10:229)");
}

#[test]
fn a_tun_device_is_refused() {
    let tree = Tree::start("f = os.open('/dev/net/tun', os.O_RDWR)");
    tree.is_refused("device", "Net namespace is required");
}

#[test]
fn a_lock_on_a_file_is_refused_unless_locks_are_carried() {
    let lock = "f = tempfile.NamedTemporaryFile(); fcntl.flock(f, fcntl.LOCK_EX)";
    let range = "f = tempfile.NamedTemporaryFile(); fcntl.lockf(f, fcntl.LOCK_EX)";
    for program in [lock, range] {
        let tree = Tree::start(program);
        tree.is_refused("file-lock", "file locks are hold");
        let carried = Options { file_locks: true, ..tree.options() };
        tree.is_carried(&carried, &["--file-locks"]);
    }
}

#[test]
fn a_traced_process_is_refused() {
    let tree = Tree::start("child(lambda: check(libc.ptrace(0, 0, 0, 0)))");
    tree.is_refused("ptraced", "Unseizable");
}

#[test]
fn a_large_deleted_file_is_refused_unless_the_limit_allows_it() {
    let open = "f = tempfile.TemporaryFile(); f.write(bytes(2 << 20)); f.flush()";
    let mapped = "
f = tempfile.TemporaryFile(); f.write(bytes(2 << 20)); f.flush()
m = mmap.mmap(f.fileno(), 0); f.close()";
    for program in [open, mapped] {
        let tree = Tree::start(program);
        tree.is_refused("deleted-file", "increase limit");
        let carried = Options { ghost_limit_bytes: 4 << 20, ..tree.options() };
        tree.is_carried(&carried, &["--ghost-limit", "4194304"]);
    }
}

#[test]
fn a_file_that_lost_its_name_and_has_another_is_refused_unless_it_gets_a_new_one() {
    let directory = tempfile::tempdir().unwrap();
    let program = format!(
        "d = {:?}; f = open(d + '/a', 'w'); os.link(d + '/a', d + '/b'); os.unlink(d + '/a')",
        directory.path()
    );
    let tree = Tree::start(&program);
    tree.is_refused("deleted-file", "Can't create link remap");
    let carried = Options { link_remap: true, ..tree.options() };
    tree.is_carried(&carried, &["--link-remap"]);
}

#[test]
fn a_file_below_a_mount_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let program = format!(
        "d = {:?}; f = open(d + '/a', 'w')
subprocess.check_call(['mount', '-t', 'tmpfs', 'none', d])",
        directory.path()
    );
    let tree = Tree::start(&program);
    tree.is_refused("hidden-file", "Can't create link remap");
    tree.dump(&["--link-remap"]).expect_err("a new name would be in the other file system");
    let tree = Tree::start(&format!("{program}\nopen(d + '/a', 'w').close()"));
    tree.is_refused("hidden-file", "Unaccessible path");
}

#[test]
fn a_file_of_another_mount_namespace_is_refused() {
    let tree = Tree::start_with("", &[], "setsid");
    tree.is_refused("file-outside-mounts", "Can't lookup mount");
}

#[test]
fn namespaces_below_the_trees_own_are_refused() {
    let kinds = [
        ("ipc", 0x0800_0000),
        ("uts", 0x0400_0000),
        ("user", 0x1000_0000),
        ("cgroup", 0x0200_0000),
    ];
    for (kind, flag) in kinds {
        let tree = Tree::start(&format!("child(lambda: check(libc.unshare({flag})))"));
        tree.is_refused("nested-namespace", &format!("nested {kind} namespace"));
    }
    let tree = Tree::start("child(lambda: check(libc.unshare(0x80)))");
    tree.is_refused("nested-namespace", "nested time");
    let tree = Tree::start("check(libc.unshare(0x20000000)); child(lambda: 0)");
    tree.is_refused("nested-namespace", "nested pid namespace");
}

#[test]
fn a_namespace_that_nobody_is_in_is_refused() {
    let program = "
before = os.open('/proc/self/ns/uts', 0)
check(libc.unshare(0x04000000)); f = os.open('/proc/self/ns/uts', 0)
check(libc.setns(before, 0))";
    Tree::start(program).is_refused("namespace-fd", "No NS ID");
}

#[test]
fn system_v_memory_of_the_host_is_refused_and_of_its_own_is_carried() {
    let program = "
i = check(libc.shmget(0, 4096, 0o1600)); libc.shmat.restype = ctypes.c_void_p
libc.shmat(i, 0, 0); check(libc.shmctl(i, 0, 0))";
    Tree::start(program).is_refused("shared-anon-outside", "doesn't live in IPC ns");
    let own = Tree::start_with(program, &["--ipc"], "</dev/null setsid");
    own.is_carried(&own.options(), &[]);
}

#[test]
fn a_message_queue_is_refused() {
    let program = "
f = check(libc.mq_open(b'/migr-preflight', 0o102, 0o600, 0))
check(libc.mq_unlink(b'/migr-preflight'))";
    Tree::start(program).is_refused("shared-anon-outside", "Can't lookup mount");
}

#[test]
fn threads_that_outlive_the_first_one_are_refused() {
    let program = "
if os.fork() == 0:
    threading.Thread(target=time.sleep, args=(100000,)).start()
    libc.syscall(60, 0)
time.sleep(0.5)";
    Tree::start(program).is_refused("leader-ended", "Zombies with threads");
}

#[test]
fn a_session_from_outside_is_refused() {
    let tree = Tree::start_with("", &[], "</dev/null");
    tree.is_refused("session-outside", "session leader");
}

#[test]
fn a_unix_socket_of_another_network_is_refused() {
    let tree = Tree::start("p = socket.socketpair(); check(libc.unshare(0x40000000))");
    let options = Options { own_network: true, ..tree.options() };
    tree.is_a_problem("socket-other-network", &options);
    tree.dump(&[]).expect_err("a false alarm: CRIU takes it");
}

#[test]
fn a_process_of_another_user_is_refused_where_its_limits_may_not_be_read() {
    let tree = Tree::start("os.setgroups([]); os.setgid(65534); os.setuid(65534)");
    if may_read_all_limits() {
        tree.is_carried(&tree.options(), &[]);
    } else {
        tree.is_refused("other-user", "Can't get rlimit");
    }
}

/// Whether this process has `CAP_SYS_RESOURCE` (capability.h: 24).
fn may_read_all_limits() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap() & 1 << 24 != 0
}
