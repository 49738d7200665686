"""Answers checksummed messages, and mixes each into a memory that it verifies."""

import hashlib
import os
import socket
import struct
import sys
import threading
import zlib

BLOCK = 64 << 10
BLOCKS = int(sys.argv[2])

token = os.urandom(8)
memory = bytearray(os.urandom(BLOCK * BLOCKS))
sums = [zlib.crc32(memory[at * BLOCK:(at + 1) * BLOCK]) for at in range(BLOCKS)]
lock = threading.Lock()
turn = 0


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def wrong(text):
    say("WRONG: " + text)
    os._exit(1)


def mix(payload):
    """Writes into one block, after it was as it was left; and looks at another."""
    global turn
    with lock:
        turn += 1
        for block in (turn % BLOCKS, turn * 31 % BLOCKS):
            start = block * BLOCK
            if zlib.crc32(memory[start:start + BLOCK]) != sums[block]:
                wrong(f"block {block} of the memory has changed")
            memory[start:start + len(payload)] = payload
            sums[block] = zlib.crc32(memory[start:start + BLOCK])


def exactly(connection, count):
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def serve(connection, peer):
    heard = hashlib.sha256()
    expected = 0
    while (header := exactly(connection, 44)) is not None:
        number, length = struct.unpack(">QI", header[:12])
        payload = exactly(connection, length)
        if number != expected:
            wrong(f"message {number} of {peer} instead of {expected}")
        if payload is None or hashlib.sha256(payload).digest() != header[12:]:
            wrong(f"message {number} of {peer} is damaged")
        expected += 1
        heard.update(payload)
        mix(payload)
        connection.sendall(struct.pack(">QI", number, length) + token + heard.digest() + payload[::-1])
    say(f"ended {peer} after {expected}")
    connection.close()


try:
    host = sys.argv[3] if len(sys.argv) > 3 else "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, int(sys.argv[1])), family=family)
    say("listening")
    while True:
        connection, address = listener.accept()
        say(f"accepted {address[0]}")
        threading.Thread(target=serve, args=(connection, address[0]), daemon=True).start()
except Exception as error:
    wrong(repr(error))
