"""Many connections at once, each with one checksummed message under way, until the
standard input ends. Says the number of each answer, counted over all of them, and how
many ms its connection had waited for it."""

import hashlib
import os
import selectors
import socket
import struct
import sys
import time

HEADER = 52


class Connection:
    def __init__(self, address, number):
        self.socket = socket.create_connection(address)
        self.number = number
        self.sent = 0
        self.told = hashlib.sha256()
        self.server = None
        self.heard = bytearray()

    def ask(self):
        self.data = hashlib.sha256(struct.pack(">IQ", self.number, self.sent)).digest()
        self.told.update(self.data)
        header = struct.pack(">QI", self.sent, len(self.data))
        self.socket.sendall(header + hashlib.sha256(self.data).digest() + self.data)
        self.asked = time.monotonic()

    def hear(self):
        """Whether the answer is complete."""
        part = self.socket.recv(4096)
        if not part:
            wrong(f"connection {self.number} has ended")
        self.heard += part
        if len(self.heard) < HEADER + len(self.data):
            return False
        self.server = self.server or bytes(self.heard[12:20])
        header = struct.pack(">QI", self.sent, len(self.data)) + self.server + self.told.digest()
        if self.heard != header + self.data[::-1]:
            wrong(f"answer {self.sent} of connection {self.number} is damaged")
        self.heard.clear()
        self.sent += 1
        return True


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def wrong(text):
    say("WRONG: " + text)
    os._exit(1)


try:
    address = (sys.argv[1], int(sys.argv[2]))
    everyone = [Connection(address, number) for number in range(int(sys.argv[3]))]
    selector = selectors.DefaultSelector()
    for one in everyone:
        selector.register(one.socket, selectors.EVENT_READ, one)
        one.ask()
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    answers = 0
    under_way = len(everyone)
    enough = False
    while under_way:
        for key, _ in selector.select():
            one = key.data
            if one is None:
                selector.unregister(sys.stdin)
                enough = True
            elif one.hear():
                answers += 1
                say(f"ok {answers} {(time.monotonic() - one.asked) * 1000:.1f}")
                if enough:
                    under_way -= 1
                else:
                    one.ask()
    for one in everyone:
        one.socket.close()
    say("done")
except Exception as error:
    wrong(repr(error))
