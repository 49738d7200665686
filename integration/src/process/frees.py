# Has much memory and more that it gives back, moves and copies when it is told to, while
# memory of it may still be on its way. Says "right" when it was asked and all that it
# keeps is as it was.
import mmap
import os
import sys
import threading
import time

MIB = 1 << 20
ZEROS = bytes(MIB)


def piece(number):
    made = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.write(bytes([number % 255 + 1]) * MIB)
    return made


def is_right(number, made):
    return made[:MIB] == bytes([number % 255 + 1]) * MIB


kept = [piece(number) for number in range(int(sys.argv[1]))]
freed = [piece(number) for number in range(100)]
emptied = [piece(number) for number in range(20)]
moved = [piece(number) for number in range(20)]


def change():
    for number in range(100):
        freed[number].close()
        if number % 5 == 0:
            emptied[number // 5].madvise(mmap.MADV_DONTNEED)
            moved[number // 5].resize(2 * MIB)
        if number == 50:
            child()
        time.sleep(0.001)


children = []


def child():
    number = os.fork()
    if number == 0:
        right = all(is_right(*pair) for pair in enumerate(kept))
        os._exit(0 if right else 1)
    children.append(number)


print("ready", flush=True)
changing = None
for line in sys.stdin:
    word = line.strip()
    if word == "change":
        changing = threading.Thread(target=change)
        changing.start()
        continue
    changing.join()
    wrong = [number for number, made in enumerate(kept) if not is_right(number, made)]
    wrong += [f"moved {number}" for number, made in enumerate(moved) if not is_right(number, made)]
    wrong += [f"emptied {number}" for number, made in enumerate(emptied) if made[:] != ZEROS]
    wrong += [f"child: {how}" for how in [os.waitpid(pid, 0)[1] for pid in children] if how]
    print(word, f"wrong: {wrong}" if wrong else "right", flush=True)
    break
time.sleep(100000)
