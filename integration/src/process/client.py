"""Sends checksummed messages over one connection, many at a time, and verifies the
answers, until its standard input ends. Says the number of each answer and how many ms
it came after the one before."""

import hashlib
import os
import random
import socket
import struct
import sys
import threading
import time

OUTSTANDING = 64
LARGEST = 6000

window = threading.Semaphore(OUTSTANDING)
sent = 0
enough = threading.Event()


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def wrong(text):
    say("WRONG: " + text)
    os._exit(1)


def payload(number):
    source = random.Random(number)
    return source.randbytes(source.randint(1, LARGEST))


def send():
    global sent
    while not enough.is_set():
        window.acquire()
        data = payload(sent)
        connection.sendall(struct.pack(">QI", sent, len(data)) + hashlib.sha256(data).digest() + data)
        sent += 1
        time.sleep(0.002)
    connection.shutdown(socket.SHUT_WR)


def exactly(count):
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            if data:
                wrong("the connection ended in the middle of an answer")
            return None
        data += part
    return bytes(data)


def receive():
    told = hashlib.sha256()
    server = None
    number = 0
    last = time.monotonic()
    while (header := exactly(52)) is not None:
        answered, length = struct.unpack(">QI", header[:12])
        server = server or header[12:20]
        if header[12:20] != server:
            wrong("another server answered")
        data = payload(number)
        told.update(data)
        if (answered, length) != (number, len(data)):
            wrong(f"answer {answered} instead of {number}")
        if header[20:] != told.digest() or exactly(length) != data[::-1]:
            wrong(f"answer {number} is damaged")
        number += 1
        window.release()
        now = time.monotonic()
        say(f"ok {number} {(now - last) * 1000:.1f}")
        last = now
    return number


try:
    connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    threading.Thread(target=lambda: (sys.stdin.read(), enough.set()), daemon=True).start()
    sender = threading.Thread(target=lambda: send() or None, daemon=True)
    sender.start()
    answered = receive()
    sender.join()
    if answered != sent:
        wrong(f"{answered} answers to {sent} messages")
    say("done")
except Exception as error:
    wrong(repr(error))
