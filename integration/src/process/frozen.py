# Fills memory with what does not compress, and writes down every time that it stood
# still, in ms. Asked to end, it says whether its memory is as it was.
#
# Arguments: MiB of memory, the file to write to.
import os
import signal
import sys
import time
import zlib

LONG = 0.02
out = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
memory = bytearray(int(sys.argv[1]) << 20)
for start in range(0, len(memory), 1 << 20):
    memory[start : start + (1 << 20)] = os.urandom(1 << 20)
checksum = zlib.crc32(memory)


def end(*_):
    os.write(out, b"right\n" if zlib.crc32(memory) == checksum else b"wrong\n")
    os._exit(0)


signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, end)
os.write(out, b"ready\n")
last = time.time()
while True:
    time.sleep(0.001)
    now = time.time()
    if now - last > LONG:
        os.write(out, f"{(now - last) * 1000:.1f}\n".encode())
    last = now
