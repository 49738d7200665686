# Counts. Each number is printed only when everything that the processes use was as
# they had left it: memory with checksums, a chain of children behind pipes, threads
# behind eventfds and a socketpair, a timerfd that gives the beat.
#
# Arguments: MiB of memory, length of the chain, threads of each process.
import ctypes
import os
import signal
import socket
import struct
import sys
import threading
import zlib

MEMORY, DEPTH, THREADS = (int(word) for word in sys.argv[1:4])
BEAT_NS = 20_000_000
BLOCK = 1 << 16
BLOCKS = MEMORY << 4
libc = ctypes.CDLL(None, use_errno=True)


def say(text):
    os.write(1, f"{text}\n".encode())


def number(fd):
    return int.from_bytes(os.read(fd, 8), sys.byteorder)


def send(fd, value):
    os.write(fd, value.to_bytes(8, sys.byteorder))


def content(block, count):
    return struct.pack("<QQ", block, count) * (BLOCK // 16)


class Threads:
    """Each adds one to what it is told, and says so through one socketpair."""

    def __init__(self, count):
        self.told = [os.eventfd(0) for _ in range(count)]
        self.mine, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for told in self.told:
            threading.Thread(target=self.work, args=[told], daemon=True).start()

    def work(self, told):
        while True:
            send(self.theirs.fileno(), os.eventfd_read(told) + 1)

    def check(self, value):
        for told in self.told:
            os.eventfd_write(told, value)
        for _ in self.told:
            answer = number(self.mine.fileno())
            if answer != value + 1:
                say(f"WRONG thread of {os.getpid()}: {answer} after {value}")


def grow(depth):
    """A child with depth - 1 further ones below: what goes in comes out plus depth."""
    (down, to_child), (from_child, up) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(to_child)
        os.close(from_child)
        below = grow(depth - 1) if depth > 1 else None
        threads = Threads(THREADS)
        while True:
            value = number(down)
            threads.check(value)
            send(up, ask(below, value) + 1)
    os.close(down)
    os.close(up)
    return to_child, from_child


def ask(below, value):
    if below is None:
        return value
    send(below[0], value)
    return number(below[1])


def sleep(fd):
    """One shot: CRIU disarms a periodic timer that expires while its reader is held."""
    libc.timerfd_settime(fd, 0, struct.pack("<qqqq", 0, 0, 0, BEAT_NS), None)
    number(fd)


signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
below = grow(DEPTH) if DEPTH else None
threads = Threads(THREADS)
memory = bytearray(b"".join(content(block, 0) for block in range(BLOCKS)))
sums = [zlib.crc32(memory[at * BLOCK : (at + 1) * BLOCK]) for at in range(BLOCKS)]
beats, count = libc.timerfd_create(1, 0), 0
own = os.getpid()
while True:
    sleep(beats)
    count += 1
    every = count % 64 == 0
    for block in range(BLOCKS) if every else [count % BLOCKS]:
        there = slice(block * BLOCK, (block + 1) * BLOCK)
        if zlib.crc32(memory[there]) != sums[block]:
            say(f"WRONG block {block} at {count}")
    there = slice(count % BLOCKS * BLOCK, (count % BLOCKS + 1) * BLOCK)
    memory[there] = content(count % BLOCKS, count)
    sums[count % BLOCKS] = zlib.crc32(memory[there])
    threads.check(count)
    answer = ask(below, count)
    if answer != count + DEPTH:
        say(f"WRONG chain: {answer} after {count}")
    if os.getpid() != own:
        say(f"WRONG process id {os.getpid()}")
    say(f"count {count}")
