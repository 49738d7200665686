//! What CRIU takes, so that nothing is said of it.

use std::time::{Duration, Instant};

use crate::harness::Tree;

fn carried(program: &str) {
    let tree = Tree::start(program);
    tree.is_carried(&tree.options(), &[]);
}

#[test]
fn descriptors_of_the_kernels_are_carried() {
    carried(
        "
import select, signal
e = check(libc.eventfd(0, 0)); p = select.epoll(); p.register(e)
t = check(libc.timerfd_create(1, 0)); i = check(libc.inotify_init())
check(libc.inotify_add_watch(i, b'/etc', 2))
s = check(libc.signalfd(-1, ctypes.create_string_buffer(128), 0))
f = os.pidfd_open(os.getpid()); n = os.open('/proc/self/ns/net', 0)",
    );
}

#[test]
fn sockets_are_carried() {
    carried(
        "
a = socket.socketpair(); b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); c.connect(('127.0.0.1', 9))
d = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
e = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
f = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); f.bind((0, 0))
g = socket.create_server(('127.0.0.1', 0)); h = socket.socket()",
    );
}

#[test]
fn devices_without_a_device_behind_them_are_carried() {
    carried("f = [os.open('/dev/' + n, 0) for n in ('null', 'zero', 'full', 'urandom', 'random')]");
}

#[test]
fn terminals_and_pipes_within_the_tree_are_carried() {
    carried("m = pty.openpty(); p = os.pipe(); child(lambda: 0)");
    // Hung up, and at its end.
    carried("m, s = pty.openpty(); os.close(m); r, w = os.pipe(); os.close(w)");
}

#[test]
fn memory_of_every_kind_is_carried() {
    carried(
        "
a = os.memfd_create('a'); os.ftruncate(a, 4096); m = mmap.mmap(a, 4096)
b = mmap.mmap(-1, 4096); f = tempfile.TemporaryFile(); f.write(b'x'); f.flush()
d = mmap.mmap(f.fileno(), 1)
c = ctypes.c_ulong(0); check(libc.syscall(206, 8, ctypes.byref(c)))",
    );
}

#[test]
fn a_mount_namespace_below_the_trees_own_is_carried() {
    carried("child(lambda: check(libc.unshare(0x20000)))");
}

#[test]
fn a_child_that_ended_is_carried() {
    carried("p = os.fork()\nif p == 0: os._exit(0)\ntime.sleep(0.2)");
}

#[test]
fn a_large_tree_is_looked_at_quickly() {
    let tree = Tree::start(
        "
def threads():
    for _ in range(3): threading.Thread(target=time.sleep, args=(100000,)).start()
for _ in range(49): child(threads)",
    );
    let options = tree.options();
    let took = (0..3).map(|_| {
        let start = Instant::now();
        let found = tree.scan(&options);
        assert_eq!((found.processes, found.threads), (50, 49 * 4 + 1));
        assert!(found.resident_bytes > 50 << 20, "{}", found.resident_bytes);
        assert!(found.problems.is_empty(), "{:?}", found.problems);
        start.elapsed()
    });
    let best = took.min().unwrap();
    println!("50 processes and 197 threads: {} ms", best.as_millis());
    assert!(best < Duration::from_secs(1), "{best:?}");
}
