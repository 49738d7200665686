# Holds memory, writes a share of it all the time, one page after the other, and beats.
# Every page has content of its own; with each SIGUSR1 all of it is compared with what
# was written.
#
# Arguments: MiB of memory, pages written a second.
import mmap
import os
import signal
import struct
import sys
import time

MIB, RATE = int(sys.argv[1]), int(sys.argv[2])
PAGE, BEAT = 4096, 0.05
PAGES = MIB << 8
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
stamps = [0] * PAGES
FILLS = [bytes([fill]) * (PAGE - 16) for fill in range(1, 256)]


def say(text):
    # A handler of a signal may be in the middle of another line: buffers can't take that.
    os.write(1, (text + "\n").encode())


def stamp(page, value):
    stamps[page] = value
    struct.pack_into("<QQ", memory, page * PAGE, page, value)


def compare(*_):
    for page in range(PAGES):
        at = page * PAGE
        if struct.unpack_from("<QQ", memory, at) != (page, stamps[page]):
            return say(f"WRONG page {page}")
        if memory[at + 16 : at + PAGE] != FILLS[page % 255]:
            return say(f"WRONG content of page {page}")
    say(f"whole after {writes}")


for page in range(PAGES):
    memory[page * PAGE + 16 : (page + 1) * PAGE] = FILLS[page % 255]
    stamp(page, 0)
signal.signal(signal.SIGUSR1, compare)
writes, beats, next_beat = 0, 0, time.monotonic()
say("ready")
while True:
    for _ in range(int(RATE * BEAT)):
        writes += 1
        stamp(writes % PAGES, writes)
    beats += 1
    say(f"beat {beats}")
    # What was missed is not made up for: it would be dirtied all at once.
    next_beat = max(next_beat + BEAT, time.monotonic())
    time.sleep(max(0, next_beat - time.monotonic()))
