"""The process that workers are forked from, and the workers, seen from the calling side."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hybrid_rl.plugins.lines import Lines
from hybrid_rl.plugins.tree import born, kill_tree

logger = logging.getLogger(__name__)
START_SECONDS = 120.0
"""Longest that importing a plugin may take."""
END_SECONDS = 1.0
"""That a process has to close what it opened."""
PIPE_BYTES = 1 << 20
"""That a worker can print between two looks of the watch."""
_FORK_SECONDS = 15.0


@dataclass(eq=False)
class Worker:
    """A process that calls, seen from here."""

    pid: int
    socket: socket.socket
    output: int
    """What it prints can be read here."""
    used: bool = False
    worn: bool = False
    """Whether it should not be called again."""
    nursery: int = 0
    """The process that it was forked from."""
    ready: set[bytes] = field(default_factory=set)
    """Calls that made it ready for others."""
    verdict: str = ""
    """Why the watch killed it."""
    outgrown: bool = False
    """Whether that was for its memory, which earlier calls may have filled."""
    processes: int = 1
    """That it was, with what it had started, when the watch looked last."""
    printed: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.lines = Lines(self.socket)
        self._born, self._nursery_born = born(self.pid), born(self.nursery)

    @property
    def doubtful(self) -> bool:
        """Whether an earlier call may be why it ended."""
        return not self.verdict or self.outgrown

    def orphaned(self) -> bool:
        """Whether its nursery is gone, at which it is killed."""
        return born(self.nursery) != self._nursery_born

    def waits(self) -> bool:
        """Whether it can be called; an idle worker says nothing until it ends."""
        return not self.verdict and self.lines.silent()

    def send(self, call: bytes, until: float) -> None:
        self.socket.settimeout(max(1e-3, until - time.monotonic()))
        self.socket.sendall(call)

    def ended(self, seconds: float = 0.2) -> bool:
        """Whether it ends within so many seconds."""
        until = time.monotonic() + seconds
        while born(self.pid) == self._born != 0:
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        if born(self.pid) == self._born != 0:  # the number may be another's by now
            kill_tree(self.pid)

    def end(self, seconds: float) -> None:
        """Let it end within so many seconds, or kill it."""
        self.socket.close()
        if seconds <= 0 or not self.ended(seconds):
            self.kill()


class Nursery:
    """Starts workers; `worker.nursery` is its other side."""

    def __init__(self, modules: Collection[str], paths: Collection[str]) -> None:
        self._paths = list(paths)
        self._loads: list[tuple[Any, ...]] = [("importlib", "import_module", module) for module in modules]
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def fork(self) -> Worker:
        """A new worker. Raises `RuntimeError` if there cannot be one, and `BlockingIOError` if the system has no
        place for one now."""
        with self._lock:
            for again in (True, False):
                try:
                    self._ensure()
                    return self._fork()
                except BlockingIOError:
                    raise
                except (OSError, EOFError, ValueError) as error:
                    self._give_up()
                    if self._closed or not again:
                        raise RuntimeError(f"plugin processes cannot be started: {error}") from None
                    logger.warning("the process that plugin processes are forked from died; starting a new one")
        raise AssertionError

    def load(self, *what: Any) -> None:
        """Import something, now and in every nursery to come. Raises `RuntimeError` as `fork` does."""
        with self._lock:
            try:
                self._ensure()
                self._load(what)
            except (OSError, EOFError, ValueError) as error:
                self._give_up()
                raise RuntimeError(f"plugin processes cannot be started: {error}") from None

    def status(self, pid: int) -> int | None:
        """How a worker that has ended did so: exit status, or minus the signal. `None` if it is not known."""
        until = time.monotonic() + END_SECONDS
        with self._lock:
            with contextlib.suppress(OSError, EOFError, ValueError):
                while pid not in self._ended:
                    self._take(until)
            return self._ended.pop(pid, None)

    def close(self) -> None:
        self._closed = True
        if not self._lock.acquire(timeout=END_SECONDS):  # an import takes long
            if (process := self._process) is not None:
                kill_tree(process.pid)
            self._lock.acquire()
        self._give_up()
        self._lock.release()

    def _fork(self) -> Worker:
        mine, its = socket.socketpair()
        read, write = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(["fork"]).encode()], [its.fileno(), write])
            message = self._read("forked", _FORK_SECONDS)
            if (pid := message["forked"]) is None:
                raise BlockingIOError(message["why"])
        except BaseException:
            mine.close()
            os.close(read)
            raise
        finally:
            its.close()
            os.close(write)
        self._ended.pop(pid, None)  # one that had its number before
        os.set_blocking(read, False)
        with contextlib.suppress(OSError):  # the system has its limits
            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        assert self._process is not None
        return Worker(pid, mine, read, nursery=self._process.pid)

    def _ensure(self) -> None:
        """Raises `OSError`, `EOFError` or `ValueError` if it does not start."""
        if self._closed:
            raise EOFError("they were stopped")
        if self._process is not None:
            return
        self._socket, its = socket.socketpair()
        self._lines = Lines(self._socket)
        paths = [*sys.path, os.getcwd(), *self._paths]
        begin = f"import sys; sys.path[:] = {paths!r}; from hybrid_rl.plugins.worker import nursery; "
        begin += f"nursery({its.fileno()})"
        # Threads of mathematical libraries are of no use to small calls, and would be lost in the fork.
        threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-c", begin],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **threads},
            )
        self._read("ready")
        loads, self._loads = self._loads, []
        for what in loads:
            self._load(what)

    def _load(self, what: tuple[Any, ...]) -> None:
        try:
            self._socket.sendall(json.dumps(["load", *what]).encode())
            failed = self._read("loaded")["loaded"]
        except (OSError, EOFError, ValueError):  # what a worker could import ends or hangs this process
            failed = "it ends the process, or takes too long"
        if failed is None:
            self._loads.append(what)
            return
        logger.warning("%s cannot be imported ahead (%s); each worker does it by itself", what[2], failed)
        self._give_up()
        self._ensure()

    def _read(self, name: str, seconds: float | None = None) -> dict[str, Any]:
        """The next message with `name`. Raises `EOFError`, `OSError` or `ValueError` if there is none."""
        until = time.monotonic() + (START_SECONDS if seconds is None else seconds)
        while name not in (message := self._take(until)):
            pass
        return message

    def _take(self, until: float) -> dict[str, Any]:
        message = self._lines.take(until)
        if "ended" in message:
            self._ended[message["ended"]] = message["status"]
        return message

    def _give_up(self) -> None:
        if self._process is not None:
            self._socket.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)  # it ends its workers
            if self._process.poll() is None:
                kill_tree(self._process.pid)
            self._process.wait()
            self._process = None
