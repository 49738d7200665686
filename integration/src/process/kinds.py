# Has memory of every kind, filled with what it can be checked by later. Asked with a
# line on its standard input, says whether all of it is as it was.
#
# Arguments: MiB of ordinary memory, how many children to fork that have it in common.
import ctypes
import hashlib
import mmap
import os
import sys

PAGE = 4096
READ, WRITE, EXEC = 1, 2, 4
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Area:
    def __init__(self, name, pages, flags=mmap.MAP_PRIVATE, final=READ | WRITE):
        self.name, self.length, self.final = name, pages * PAGE, final
        flags |= mmap.MAP_ANONYMOUS
        self.at = libc.mmap(None, self.length, READ | WRITE, flags, -1, 0)
        assert self.at not in (None, 2**64 - 1), name
        # Every third page was never touched, and has to stay like that.
        for start in range(0, self.length, PAGE):
            if start // PAGE % 3 != 2:
                ctypes.memmove(self.at + start, os.urandom(PAGE), PAGE)
        self.protect(final)
        self.sum = self.hash()

    def protect(self, how):
        assert libc.mprotect(self.at, self.length, how) == 0, self.name

    def hash(self):
        self.protect(self.final | READ)
        found = hashlib.sha256(ctypes.string_at(self.at, self.length)).hexdigest()
        self.protect(self.final)
        return found


mib, children = int(sys.argv[1]), int(sys.argv[2])
areas = [
    Area("ordinary", mib * 256),
    Area("not accessible", 300, final=0),
    Area("executable", 300, final=READ | WRITE | EXEC),
    Area("read only", 300, final=READ),
    Area("shared", 300, flags=mmap.MAP_SHARED),
    Area("one page", 1),
]
binary = open(sys.executable, "rb")
length = min(64 * PAGE, os.path.getsize(sys.executable))
copied = mmap.mmap(binary.fileno(), length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
copied[PAGE // 2 : PAGE // 2 + 5] = b"other"
copied_sum = hashlib.sha256(copied[:]).hexdigest()


def wrong():
    found = [area.name for area in areas if area.hash() != area.sum]
    if hashlib.sha256(copied[:]).hexdigest() != copied_sum:
        found.append("of a file")
    return found


pipes = []
for number in range(children):
    down, up = os.pipe(), os.pipe()
    if os.fork() == 0:
        # What is the child's own from now on.
        own = Area("a child's own", 50)
        areas.append(own)
        while os.read(down[0], 1):
            os.write(up[1], (",".join(wrong()) or "right").encode())
        os._exit(0)
    os.close(down[0]), os.close(up[1])
    pipes.append((down[1], up[0]))

print("ready", flush=True)
for line in sys.stdin:
    answers = [",".join(wrong()) or "right"]
    for down, up in pipes:
        os.write(down, b"?")
        answers.append(os.read(up, 1000).decode())
    print(line.strip(), " ".join(answers), flush=True)
