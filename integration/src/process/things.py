# Has one of everything that a process can have, and knows how to tell whether it is
# still what it was. Asked with a line on its standard input, it answers with a line:
# "ANSWER LINE NAME=right NAME=REASON…".
#
# Arguments: a directory for its files, and the things that it is to have, by default all.
import array
import ctypes
import fcntl
import mmap
import os
import pty
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time

here = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
things = {}
# Before there are threads, which would be told instead.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGWINCH])


def thing(name):
    """A function that makes something and returns what checks it."""

    def add(make):
        if len(sys.argv) < 3 or name in sys.argv[2:]:
            things[name] = make()

    return add


def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def path(name):
    return os.path.join(here, name)


def in_child(prepare):
    """Has a child prepare something and get what checks that; asks it each time."""
    down, up = os.pipe(), os.pipe()
    if os.fork() == 0:
        # The ends that are its parent's, so that it ends with it.
        os.close(down[1]), os.close(up[0])
        check = prepare()
        while os.read(down[0], 1):
            os.write(up[1], b"y" if check() else b"n")
        os._exit(0)
    os.close(down[0]), os.close(up[1])

    def ask():
        os.write(down[1], b"?")
        return os.read(up[0], 1) == b"y"

    return ask


@thing("memory")
def _():
    data = bytearray(os.urandom(1 << 20))
    copy = bytes(data)
    return lambda: data == copy


@thing("threads")
def _():
    ask, answer = os.eventfd(0), os.eventfd(0)

    def work():
        while True:
            os.eventfd_write(answer, os.eventfd_read(ask) * 2)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    number = thread.native_id

    def check():
        os.eventfd_write(ask, 21)
        return os.eventfd_read(answer) == 42 and str(number) in os.listdir("/proc/self/task")

    return check


@thing("process ids")
def _():
    parent = os.getpid()

    def prepare():
        was = os.getpid(), parent, os.getsid(0)
        return lambda: (os.getpid(), os.getppid(), os.getsid(0)) == was

    child = in_child(prepare)
    return lambda: child() and os.getpid() == parent


@thing("zombies")
def _():
    child = os.fork()
    if child == 0:
        os._exit(7)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    check = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT).si_status == 7
    return check


@thing("signals")
def _():
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGUSR2)

    def check():
        before = len(seen)
        os.kill(os.getpid(), signal.SIGUSR1)
        return (
            len(seen) == before + 1
            and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            and signal.SIGUSR2 in signal.sigpending()
        )

    return check


@thing("interval timers")
def _():
    signal.setitimer(signal.ITIMER_VIRTUAL, 3600, 5)

    def check():
        left, every = signal.getitimer(signal.ITIMER_VIRTUAL)
        return 0 < left < 3601 and every == 5

    return check


@thing("POSIX timers")
def _():
    class Event(ctypes.Structure):
        _fields_ = [("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int)]
        _fields_ += [("rest", ctypes.c_char * 48)]

    timer = ctypes.c_void_p()
    # SIGEV_NONE: it counts, and nobody hears of it.
    must(libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(Event(None, 0, 1)), ctypes.byref(timer)))
    spec = (ctypes.c_long * 4)(7, 0, 3600, 0)
    must(libc.timer_settime(timer, 0, spec, None))

    def check():
        now = (ctypes.c_long * 4)()
        must(libc.timer_gettime(timer, now))
        return now[0] == 7 and 0 < now[2] <= 3600

    return check


@thing("monotonic clock")
def _():
    last = [time.monotonic()]

    def check():
        before, last[0] = last[0], time.monotonic()
        return before <= last[0] < before + 600

    return check


@thing("pipes")
def _():
    out, into = os.pipe()
    os.write(into, b"not read yet")

    def check():
        found = os.read(out, 100)
        os.write(into, b"not read yet")
        return found == b"not read yet"

    return check


@thing("socket pairs")
def _():
    one, two = socket.socketpair()
    one.send(b"not read yet")

    def check():
        found = two.recv(100)
        one.send(b"not read yet")
        return found == b"not read yet"

    return check


@thing("Unix sockets")
def _():
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0things")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("\0things")
    served = server.accept()[0]

    def check():
        client.send(b"hello")
        another = socket.socket(socket.AF_UNIX)
        another.connect("\0things")
        accepted = server.accept()[0]
        accepted.close(), another.close()
        return served.recv(10) == b"hello"

    return check


@thing("eventfd")
def _():
    event = os.eventfd(5, os.EFD_NONBLOCK)

    def check():
        taken = os.eventfd_read(event)
        os.eventfd_write(event, 5)
        return taken == 5

    return check


@thing("epoll")
def _():
    event, poll = os.eventfd(0), select.epoll()
    poll.register(event, select.EPOLLIN)

    def check():
        quiet = poll.poll(0)
        os.eventfd_write(event, 1)
        ready = poll.poll(0)
        os.eventfd_read(event)
        return quiet == [] and ready == [(event, select.EPOLLIN)]

    return check


@thing("signalfd")
def _():
    mask = (ctypes.c_ulong * 16)(1 << (signal.SIGWINCH - 1))
    fd = must(libc.signalfd(-1, mask, 0))

    def check():
        os.kill(os.getpid(), signal.SIGWINCH)
        return struct.unpack_from("I", os.read(fd, 128))[0] == signal.SIGWINCH

    return check


@thing("timerfd")
def _():
    fd = must(libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK))
    must(libc.timerfd_settime(fd, 0, struct.pack("<4q", 9, 0, 3600, 0), None))

    def check():
        now = ctypes.create_string_buffer(32)
        must(libc.timerfd_gettime(fd, now))
        every, _, left, _ = struct.unpack("<4q", now.raw)
        return every == 9 and 0 < left <= 3600

    return check


@thing("inotify")
def _():
    os.mkdir(path("watched"))
    fd = must(libc.inotify_init1(os.O_NONBLOCK))
    must(libc.inotify_add_watch(fd, path("watched").encode(), 0x100))

    def check():
        open(path("watched/new"), "w").close()
        os.unlink(path("watched/new"))
        return b"new" in os.read(fd, 4096)

    return check


@thing("fanotify")
def _():
    name = path("marked")
    open(name, "w").close()
    fd = must(libc.fanotify_init(2, os.O_RDONLY))  # FAN_NONBLOCK
    libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_int, ctypes.c_char_p]
    must(libc.fanotify_mark(fd, 1, 0x20, -100, name.encode()))  # FAN_MARK_ADD, FAN_OPEN

    def check():
        open(name).close()
        event = os.read(fd, 24)
        os.close(struct.unpack_from("i", event, 16)[0])
        return struct.unpack_from("Q", event, 8)[0] == 0x20

    return check


@thing("memfd")
def _():
    fd = os.memfd_create("things", os.MFD_ALLOW_SEALING)
    os.write(fd, b"content")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return lambda: os.pread(fd, 9, 0) == b"content" and fcntl.fcntl(fd, fcntl.F_GET_SEALS) == sealed


@thing("terminals")
def _():
    import termios

    ours, theirs = pty.openpty()
    modes = termios.tcgetattr(theirs)
    modes[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))

    def check():
        size = fcntl.ioctl(ours, termios.TIOCGWINSZ, bytes(8))
        os.write(ours, b"typed")
        return struct.unpack("4H", size)[:2] == (33, 77) and os.read(theirs, 9) == b"typed"

    return check


@thing("listening TCP sockets")
def _():
    server = socket.create_server(("127.0.0.1", 0))

    def check():
        with socket.create_connection(server.getsockname()) as client:
            accepted = server.accept()[0]
            client.send(b"hello")
            found = accepted.recv(9)
            accepted.close()
        return found == b"hello"

    return check


@thing("TCP connections within the tree")
def _():
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    served = server.accept()[0]
    server.close()
    client.send(b"not read yet")

    def check():
        found = served.recv(100)
        served.send(b"back")
        answer = client.recv(9)
        client.send(b"not read yet")
        nodelay = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        return found == b"not read yet" and answer == b"back" and nodelay == 1

    return check


@thing("options of TCP sockets")
def _():
    ip, ipv6, of_socket, tcp = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET, socket.IPPROTO_TCP
    # Level, number, value; the numbers that Python has no name for are Linux's.
    carried_by_criu = [
        (of_socket, socket.SO_LINGER, struct.pack("ii", 1, 77)),
        (of_socket, socket.SO_OOBINLINE, 1),
        (of_socket, socket.SO_KEEPALIVE, 1),
        (of_socket, socket.SO_RCVLOWAT, 2),
        (of_socket, socket.SO_SNDTIMEO, struct.pack("ll", 50, 0)),
        (tcp, socket.TCP_NODELAY, 1),
        (tcp, socket.TCP_KEEPCNT, 4),
        (tcp, socket.TCP_KEEPIDLE, 555),
        (tcp, socket.TCP_KEEPINTVL, 66),
    ]
    every = carried_by_criu + [
        (of_socket, 47, struct.pack("L", 5_000_000)),  # SO_MAX_PACING_RATE
        (of_socket, 60, 1),  # SO_ZEROCOPY
        (of_socket, 35, 1),  # SO_TIMESTAMPNS
        (tcp, socket.TCP_CONGESTION, b"reno"),
        (tcp, socket.TCP_USER_TIMEOUT, 34567),
        (tcp, socket.TCP_NOTSENT_LOWAT, 16384),
        (tcp, socket.TCP_SYNCNT, 3),
        (tcp, socket.TCP_LINGER2, 19),
        (tcp, 16, 1),  # TCP_THIN_LINEAR_TIMEOUTS
        (tcp, 36, 1),  # TCP_INQ
        (ip, 10, 0),  # IP_MTU_DISCOVER
        (ip, 21, 1),  # IP_MINTTL
        (ip, 11, 1),  # IP_RECVERR
        (ip, socket.IP_TOS, 16),
        (ip, socket.IP_TTL, 33),
        # After IP_TOS, which sets it.
        (of_socket, socket.SO_PRIORITY, 5),
    ]
    listening = [
        (tcp, socket.TCP_MAXSEG, 1000),
        (tcp, socket.TCP_WINDOW_CLAMP, 40000),
        (tcp, socket.TCP_DEFER_ACCEPT, 7),
        (tcp, socket.TCP_FASTOPEN, 5),
        (tcp, 34, 1),  # TCP_FASTOPEN_NO_COOKIE
        (tcp, 27, 1),  # TCP_SAVE_SYN
    ]
    of_ipv6 = [
        (ipv6, socket.IPV6_TCLASS, 32),
        (ipv6, socket.IPV6_UNICAST_HOPS, 44),
        (ipv6, 23, 0),  # IPV6_MTU_DISCOVER
        (ipv6, 73, 1),  # IPV6_MINHOPCOUNT
        (ipv6, 25, 1),  # IPV6_RECVERR
    ]
    switches = [(of_socket, socket.SO_REUSEADDR, 1), (of_socket, socket.SO_REUSEPORT, 1)]

    def values(of, options):
        return {(level, number): of.getsockopt(level, number, 16) for level, number, _ in options}

    def connect(server):
        client = socket.create_connection(server.getsockname()[:2])
        # With TCP_DEFER_ACCEPT there is nothing to accept before.
        client.send(b"data")
        return client, server.accept()[0]

    def made(family, address, options):
        """Sockets with all of them, and with none of them; what each is to have."""
        expected = []
        for own in (options, []):
            server = socket.socket(family)
            for option in own and own + listening:
                server.setsockopt(*option)
            server.bind((address, 0))
            server.listen()
            client, served = connect(server)
            inherited = values(served, options)
            for of in (client, served):
                for option in own:
                    of.setsockopt(*option)
            expected.append((server, values(server, options + listening), inherited))
            expected += [(of, values(of, options), None) for of in (client, served)]
        return expected

    expected = made(socket.AF_INET, "127.0.0.1", every + switches)
    expected += made(socket.AF_INET6, "::1", every + of_ipv6 + switches)

    def check():
        wrong = []
        for index, (of, wanted, inherited) in enumerate(expected):
            found = {(level, number): of.getsockopt(level, number, 16) for level, number in wanted}
            wrong += [(index, option) for option in wanted if found[option] != wanted[option]]
            if inherited:
                client, served = connect(of)
                found = {option: served.getsockopt(*option, 16) for option in inherited}
                wrong += [(index, "inherited", option) for option in found if found[option] != inherited[option]]
                client.close(), served.close()
        if wrong:
            raise ValueError(wrong)
        return True

    return check


@thing("UDP sockets")
def _():
    one, two = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    one.bind(("127.0.0.1", 0))
    two.connect(one.getsockname())

    def check():
        two.send(b"datagram")
        return one.recv(99) == b"datagram"

    return check


@thing("raw sockets")
def _():
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    raw.settimeout(20)

    def check():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"look here", ("127.0.0.1", 9))
        for _ in range(20):
            if raw.recv(99).endswith(b"look here"):
                return True
        return False

    return check


@thing("packet sockets")
def _():
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    packets.bind(("lo", 0))
    packets.settimeout(20)

    def check():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"see this", ("127.0.0.1", 9))
        # It hears of every other socket's packets, too.
        for _ in range(5000):
            if packets.recv(2000).endswith(b"see this"):
                return True
        return False

    return check


@thing("netlink sockets")
def _():
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    netlink.bind((0, 0))
    netlink.settimeout(20)

    def check():
        # RTM_GETLINK, of all interfaces.
        netlink.send(struct.pack("<IHHIIB15x", 32, 18, 0x301, 1, 0, 0))
        answer = netlink.recv(1 << 16)
        while b"lo\0" not in answer:
            answer = netlink.recv(1 << 16)
        while struct.unpack_from("<IH", answer)[1] != 3:
            answer = netlink.recv(1 << 16)
        return True

    return check


@thing("POSIX shared memory")
def _():
    name = f"/dev/shm/migr-things-{os.urandom(4).hex()}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink(name)
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    memory[:6] = b"shared"
    return lambda: memory[:6] == b"shared" and os.pread(fd, 6, 0) == b"shared"


@thing("anonymous shared memory")
def _():
    memory = mmap.mmap(-1, 8192)
    memory[:6] = b"shared"

    def check():
        child = os.fork()
        if child == 0:
            memory[4096:4101] = b"child"
            os._exit(0)
        os.waitpid(child, 0)
        return memory[:6] == b"shared" and memory[4096:4101] == b"child"

    return check


@thing("System V shared memory")
def _():
    libc.shmat.restype = ctypes.c_void_p
    segment = must(libc.shmget(0x6D696772, 4096, 0o1600))
    at = libc.shmat(segment, None, 0)
    ctypes.memmove(at, b"segment", 7)
    return lambda: ctypes.string_at(at, 7) == b"segment" and libc.shmget(0x6D696772, 0, 0) == segment


@thing("System V semaphores")
def _():
    semaphores = must(libc.semget(0x6D696773, 2, 0o1600))
    must(libc.semctl(semaphores, 1, 16, 4))  # SETVAL
    return lambda: libc.semctl(semaphores, 1, 12) == 4  # GETVAL


@thing("System V message queues")
def _():
    queue = must(libc.msgget(0x6D696774, 0o1600))
    message = struct.pack("q", 1) + b"queued"
    must(libc.msgsnd(queue, message, 6, 0))

    def check():
        found = ctypes.create_string_buffer(32)
        must(libc.msgrcv(queue, found, 20, 0, os.O_NONBLOCK))
        must(libc.msgsnd(queue, message, 6, 0))
        return found.raw[8:14] == b"queued"

    return check


@thing("open files")
def _():
    fd = os.open(path("open"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"0123456789")
    os.lseek(fd, 4, os.SEEK_SET)

    def check():
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        return os.lseek(fd, 0, os.SEEK_CUR) == 4 and bool(flags & os.O_APPEND)

    return check


@thing("duplicated descriptors")
def _():
    one = os.open(path("open"), os.O_RDONLY)
    two = os.dup2(one, 200)
    os.set_inheritable(two, True)

    def check():
        os.lseek(one, 3, os.SEEK_SET)
        together = os.lseek(two, 0, os.SEEK_CUR) == 3
        return together and os.get_inheritable(two) and not os.get_inheritable(one)

    return check


@thing("mapped files")
def _():
    with open(path("mapped"), "w+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        shared = mmap.mmap(file.fileno(), 8192)
        private = mmap.mmap(file.fileno(), 8192, mmap.MAP_PRIVATE)
    private[:5] = b"other"

    def check():
        shared[4096:4099] = b"new"
        with open(path("mapped"), "rb") as file:
            content = file.read()
        return content[4096:4099] == b"new" and private[:5] == b"other" and content[:5] == b"x" * 5

    return check


@thing("directories")
def _():
    fd = os.open(here, os.O_DIRECTORY)
    os.chdir(here)
    return lambda: "open" in os.listdir(fd) and os.getcwd() == here


@thing("deleted files")
def _():
    fd = os.open(path("deleted"), os.O_RDWR | os.O_CREAT)
    os.write(fd, b"only here")
    os.unlink(path("deleted"))
    return lambda: os.pread(fd, 99, 0) == b"only here" and not os.path.exists(path("deleted"))


def is_locked(name, test):
    """Asked by another process: locks are nothing to their owner."""
    child = os.fork()
    if child == 0:
        fd = os.open(path(name), os.O_RDWR)
        try:
            test(fd)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0


@thing("locks by flock")
def _():
    fd = os.open(path("flock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return lambda: is_locked("flock", lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))


@thing("POSIX locks")
def _():
    fd = os.open(path("posix"), os.O_RDWR | os.O_CREAT)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)

    def check():
        lock = lambda start: lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start)
        return is_locked("posix", lock(7)) and not is_locked("posix", lock(50))

    return check


@thing("working directory, umask, environment")
def _():
    os.umask(0o027)
    os.environ["THINGS"] = "environment"

    def check():
        was = os.umask(0o027)
        return was == 0o027 and os.environ["THINGS"] == "environment" and os.getcwd() == here

    return check


@thing("limits")
def _():
    resource.setrlimit(resource.RLIMIT_NOFILE, (333, 444))
    return lambda: resource.getrlimit(resource.RLIMIT_NOFILE) == (333, 444)


@thing("priority and scheduling")
def _():
    def prepare():
        os.setpriority(os.PRIO_PROCESS, 0, 7)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return lambda: os.getpriority(os.PRIO_PROCESS, 0) == 7 and os.sched_getscheduler(0) == os.SCHED_BATCH

    return in_child(prepare)


@thing("names, capabilities, no_new_privs")
def _():
    wanted = ("Name:", "CapBnd:", "NoNewPrivs:", "Groups:", "Uid:")

    def status():
        with open("/proc/self/status") as file:
            lines = [line for line in file if line.startswith(wanted)]
        reaper = ctypes.c_int()
        must(libc.prctl(37, ctypes.byref(reaper), 0, 0, 0))
        return lines, reaper.value

    def prepare():
        must(libc.prctl(15, b"renamed", 0, 0, 0))  # PR_SET_NAME
        must(libc.prctl(24, 21, 0, 0, 0))  # PR_CAPBSET_DROP, CAP_SYS_ADMIN
        must(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
        must(libc.prctl(36, 1, 0, 0, 0))  # PR_SET_CHILD_SUBREAPER
        was = status()
        return lambda: status() == was

    return in_child(prepare)


@thing("seccomp filters")
def _():
    def prepare():
        must(libc.prctl(38, 1, 0, 0, 0))
        # getppid(2) fails with EPERM, everything else is allowed.
        rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 110), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
        program = b"".join(struct.pack("HBBI", *rule) for rule in rules)
        buffer = ctypes.create_string_buffer(program)
        filter = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(buffer))
        must(libc.prctl(22, 2, filter, 0, 0))
        return lambda: libc.getppid() == -1

    return in_child(prepare)


@thing("process groups and sessions")
def _():
    def prepare():
        os.setsid()
        other = os.fork()
        if other == 0:
            must(libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG
            os.setpgid(0, 0)
            while True:
                signal.pause()
        groups = lambda: (os.getsid(0), os.getpgid(0), os.getsid(other), os.getpgid(other))
        while os.getpgid(other) != other:
            time.sleep(0.01)
        was = groups()
        return lambda: groups() == was

    return in_child(prepare)


def state(check):
    try:
        return "right" if check() else "wrong"
    except Exception as error:
        return repr(error).replace(" ", "_")


print("ready", flush=True)
for line in sys.stdin:
    answers = [f"{name.replace(' ', '_')}={state(check)}" for name, check in things.items()]
    print("ANSWER", line.strip(), *answers, flush=True)
