"""What the tests have workers do."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from hybrid_rl.plugins.worker import at_end

_kept: list[bytes] = []


def echo(*values: Any) -> Iterator[Any]:
    yield from values


def where() -> Iterator[list[int]]:
    """The worker and its nursery."""
    yield [os.getpid(), os.getppid()]


def sleep(seconds: float) -> Iterator[float]:
    time.sleep(seconds)
    yield seconds


def spread(children: int, seconds: float) -> Iterator[None]:
    """Start children, one of them a daemon, and wait with them."""
    for _ in range(children):
        subprocess.Popen(["sleep", str(seconds)])
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(seconds)
        os._exit(0)
    yield None
    time.sleep(seconds)


def signal_the_nursery(number: int) -> Iterator[None]:
    os.kill(os.getppid(), number)
    time.sleep(60)
    yield None


def share(mib: int, children: int, seconds: float) -> Iterator[None]:
    """Have children that share this process's memory."""
    kept = b"x" * (mib << 20)
    for _ in range(children):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(len(kept))
    time.sleep(seconds)
    yield None


def write_at_end(path: str) -> Iterator[None]:
    def write() -> None:
        with open(path, "a") as file:
            file.write("closed\n")

    at_end(write)
    yield None


def start_helper() -> Iterator[int]:
    """A process that is to stay."""
    yield subprocess.Popen(["sleep", "1000"]).pid


def keep(mib: int, seconds: float) -> Iterator[None]:
    """Memory that stays with the process."""
    _kept.append(b"x" * (mib << 20))
    time.sleep(seconds)
    yield None


def leave_spinning() -> Iterator[None]:
    def spin() -> None:
        while True:
            pass

    threading.Thread(target=spin, daemon=True).start()
    yield None


def kill_the_nursery_at_first(path: str) -> Iterator[int]:
    """As another worker's call might."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    except FileExistsError:
        yield 1


def append(path: str, text: str) -> Iterator[None]:
    with open(path, "a") as file:
        file.write(text)
    yield None


def hang_at_first(path: str) -> Iterator[None]:
    """Hang, but for the first process that calls it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(60)
    yield None


def threads() -> Iterator[int]:
    yield threading.active_count()


def takes(name: str) -> Iterator[float]:
    """Seconds that an import takes."""
    started = time.monotonic()
    __import__(name)
    yield time.monotonic() - started
