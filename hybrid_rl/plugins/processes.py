"""The calling side: worker processes, each call with a limit of time and memory.

A worker that exceeds a limit is killed with all it started and replaced by one that has the plugins imported already.
Its answers are JSON; what it prints is read and dropped, but for the last of it, which a failure quotes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import queue
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from hybrid_rl.plugins.resolve import load_plugin
from hybrid_rl.plugins.tree import descendants, kill_tree, memory
from hybrid_rl.plugins.worker import LONGEST_MESSAGE

logger = logging.getLogger(__name__)
START_SECONDS = 120.0
"""Longest that importing a plugin may take."""
GIVE_UP_AFTER = 8
"""Failures in a row after which a plugin that has not answered at all is taken for broken."""
GRACE_SECONDS = 0.25
"""Beyond the limit that a call has, in which a plugin that keeps to it by itself can still answer."""
MOST_PROCESSES = 64
"""That one worker may have at a time."""
_END_SECONDS = 1.0
"""That a worker has to close what it opened."""
_WATCH_SECONDS = 0.05
_KEPT_OUTPUT = 2000
_STUCK = struct.pack("ll", 10, 0)
"""Seconds and microseconds that a message may halt in its middle."""


@dataclass(frozen=True)
class Failure:
    """Why a call has no result."""

    kind: str
    """`timeout`, `error` or `crash`."""
    detail: str


@dataclass(frozen=True)
class Answer:
    """What a call gave."""

    values: list[Any]
    """Those that came before the failure, if there is one."""
    failure: Failure | None


class PluginProcesses:
    """Worker processes that call plugins."""

    def __init__(
        self,
        *,
        workers: int,
        timeout: float,
        memory_mib: int,
        modules: Collection[str] = (),
        paths: Collection[str] = (),
    ) -> None:
        """`timeout`: seconds to each next value of a call, `reward.timeout`. `memory_mib`: of one worker and all that
        it started, `reward.memory_mib`. `modules`: what every worker has imported from the start. `paths`: where else
        modules are looked for."""
        self._timeout, self._count = timeout, workers
        self._nursery = _Nursery(modules, paths)
        self._watch = _Watch(memory_mib)
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # the last used one has its class set up
        for _ in range(workers):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="plugins")
        self._first: list[tuple[Any, ...]] = []
        self._closed = False
        self._out: set[_Worker] = set()
        self._lock = threading.Lock()

    def check(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Any:
        """The one value of a call, which may import a plugin. Raises `ValueError` with the reason if there is none."""
        answer = self.run(function, *arguments, seconds=START_SECONDS)
        if answer.failure is not None:
            raise ValueError(answer.failure.detail)
        return answer.values[0]

    def preload(self, spec: str, group: str | None = None, first: tuple[Any, ...] = ()) -> None:
        """Have all further workers start with a plugin imported, one that `check` has seen to be harmless; `first` is a
        function with its arguments that each calls when it starts."""
        if first:
            self._first.append(first)
        for worker in self._take_all():
            if worker is not None:
                worker.end(_END_SECONDS)
            self._idle.put(None)
        self._nursery.load(load_plugin.__module__, load_plugin.__name__, spec, group)

    def schedule(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Future[Answer]:
        """`run` in the background; at most as many calls are under way as there are workers."""
        if self._closed:
            raise RuntimeError("the plugin processes were stopped")
        return self._threads.submit(self.run, function, *arguments)

    def run(self, function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float | None = None) -> Answer:
        """Call a generator function in a worker, once one is free. The arguments are pickled; values come back as JSON
        has them."""
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive():
                worker = self._start(worker)
            answer = self._call(worker, function, arguments, self._timeout if seconds is None else seconds)
            if (answer.failure is not None and answer.failure.kind != "error") or worker.worn:
                self._kill(worker)
                worker = None
            return answer
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Calls under way end as failed; none can be begun any more."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            left = list(self._out)
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for _ in idle:
            self._idle.put(None)  # for a call that is just beginning, which then fails
        until = time.monotonic() + _END_SECONDS
        for worker in idle:
            if worker is not None:
                worker.connection.close()  # all at once, then wait for each
        for worker in left:
            worker.end(max(0.0, until - time.monotonic()) if worker in idle else 0.0)
        self._nursery.close()
        self._watch.close()
        self._threads.shutdown(wait=True)

    def _take_all(self) -> list[_Worker | None]:
        return [self._idle.get() for _ in range(self._count)]

    def _start(self, dead: _Worker | None) -> _Worker:
        if dead is not None:
            logger.warning("a plugin process died while idle; starting a new one")
            self._kill(dead)
        worker = self._nursery.fork()
        with self._lock:
            self._out.add(worker)
        self._watch.add(worker)
        if self._closed:
            self._kill(worker)
        for what in self._first:  # if it fails, so will the call, and say so
            self._call(worker, what[0], what[1:], START_SECONDS)
        return worker

    def _kill(self, worker: _Worker) -> None:
        worker.end(0.0)
        self._watch.remove(worker)
        with self._lock:
            self._out.discard(worker)

    def _call(self, worker: _Worker, function: Any, arguments: tuple[Any, ...], seconds: float) -> Answer:
        values: list[Any] = []
        worker.busy = True
        try:
            worker.connection.send_bytes(pickle.dumps((function, arguments)))
            until = time.monotonic() + seconds + GRACE_SECONDS
            while True:
                if not worker.connection.poll(max(0.0, until - time.monotonic())):
                    detail = f"took more than reward.timeout={seconds:g} s"
                    return Answer(values, Failure("timeout", detail))
                message = json.loads(worker.connection.recv_bytes(LONGEST_MESSAGE))
                if "value" in message:
                    values.append(message["value"])
                    until = time.monotonic() + seconds + GRACE_SECONDS
                    continue
                worker.worn = bool(message["worn"])
                failed = message["end"] is not None
                return Answer(values, Failure("error", str(message["end"])) if failed else None)
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            return Answer(values, Failure("crash", self._why(worker, error)))
        finally:
            worker.busy = False

    def _why(self, worker: _Worker, error: Exception) -> str:
        """What became of a worker that answered no more, or in no way that can be read."""
        if worker.verdict:
            return worker.verdict
        if self._closed:
            return "was stopped"
        status = self._nursery.status(worker.pid)
        self._watch.drain(worker)
        what = f"its process ended with status {status}" if status is not None else f"gave no answer ({error})"
        output = worker.last_output()
        return what + (f"; it printed last: {output}" if output else "")


@dataclass(eq=False)
class _Worker:
    """A process that calls, seen from here."""

    pid: int
    connection: Connection
    output: int
    """What it prints can be read here."""
    busy: bool = False
    worn: bool = False
    """Whether it should not be called again."""
    verdict: str = ""
    """Why the watch killed it."""
    printed: bytearray = field(default_factory=bytearray)

    def alive(self) -> bool:
        with contextlib.suppress(OSError, EOFError):
            return not self.connection.poll(0)  # an idle worker says nothing until it ends
        return False

    def end(self, seconds: float) -> None:
        """Let it end within so many seconds, or kill it."""
        self.connection.close()
        until = time.monotonic() + seconds
        while time.monotonic() < until and os.path.exists(f"/proc/{self.pid}"):
            time.sleep(0.01)
        kill_tree(self.pid)

    def last_output(self) -> str:
        text = bytes(self.printed).decode(errors="replace").strip()
        return " / ".join(line.strip() for line in text.splitlines()[:6])


class _Nursery:
    """The process that workers are forked from; `worker.nursery` is its other side."""

    def __init__(self, modules: Collection[str], paths: Collection[str]) -> None:
        self._paths = list(paths)
        self._loads: list[tuple[Any, ...]] = [("importlib", "import_module", module) for module in modules]
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def fork(self) -> _Worker:
        """A new worker."""
        with self._lock:
            for attempt in (1, 2):
                mine, its = socket.socketpair()
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a message that stops in the middle
                    mine.setsockopt(socket.SOL_SOCKET, option, _STUCK)
                read, write = os.pipe()
                try:
                    self._ensure()
                    socket.send_fds(self._socket, [json.dumps(["fork"]).encode()], [its.fileno(), write])
                    pid = self._read("forked")
                    os.set_blocking(read, False)
                    return _Worker(pid, Connection(mine.detach()), read)
                except (OSError, EOFError):
                    mine.close()
                    os.close(read)
                    self._give_up()
                    if attempt == 2 or self._closed:
                        raise RuntimeError("plugin processes cannot be started") from None
                    logger.warning("the process that plugin processes are forked from died; starting a new one")
                finally:
                    its.close()
                    os.close(write)
            raise AssertionError

    def load(self, *what: Any) -> None:
        """Import something, now and in every nursery to come."""
        with self._lock:
            self._ensure()
            self._load(what)

    def status(self, pid: int, seconds: float = 1.0) -> int | None:
        """How a worker ended: exit status, or minus the signal."""
        until = time.monotonic() + seconds
        with self._lock:
            with contextlib.suppress(OSError, EOFError):
                while pid not in self._ended and time.monotonic() < until:
                    self._socket.settimeout(max(0.01, until - time.monotonic()))
                    self._take()
            return self._ended.pop(pid, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._give_up()

    def _ensure(self) -> None:
        if self._process is not None:
            return
        self._socket, its = socket.socketpair()
        self._buffer = b""
        paths = [*sys.path, "", *self._paths]
        begin = f"import sys; sys.path[:] = {paths!r}; from hybrid_rl.plugins.worker import nursery; "
        begin += f"nursery({its.fileno()})"
        # Threads of mathematical libraries are of no use to small calls, and would be lost in the fork.
        threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", begin],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **threads},
        )
        its.close()
        self._read("ready")
        loads, self._loads = self._loads, []
        for what in loads:
            self._load(what)

    def _load(self, what: tuple[Any, ...]) -> None:
        try:
            self._socket.sendall(json.dumps(["load", *what]).encode())
            failed = self._read("loaded")
        except (OSError, EOFError):  # what a worker could import ends or hangs this process
            logger.warning("%s cannot be imported ahead; each worker does it by itself", what[2])
            self._give_up()
            self._ensure()
            return
        if failed is None:
            self._loads.append(what)
        else:
            logger.warning("%s cannot be imported ahead (%s); each worker does it by itself", what[2], failed)

    def _read(self, name: str) -> Any:
        """The next message with `name`. Raises `EOFError` or `OSError` if there is none."""
        self._socket.settimeout(START_SECONDS)
        while name not in (message := self._take()):
            pass
        return message[name]

    def _take(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            received = self._socket.recv(1 << 16)
            if not received:
                raise EOFError
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if "ended" in message:
            self._ended[message["ended"]] = message["status"]
        return message

    def _give_up(self) -> None:
        if self._process is not None:
            self._socket.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)  # it ends its workers
            if self._process.poll() is None:
                kill_tree(self._process.pid)
            self._process.wait()
            self._process = None


class _Watch:
    """A thread that reads what workers print, and kills those that take too much memory or start too many processes."""

    def __init__(self, memory_mib: int) -> None:
        self._memory = memory_mib
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._selector = selectors.DefaultSelector()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.add(worker)
            self._selector.register(worker.output, selectors.EVENT_READ, worker)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="plugin-watch", daemon=True)
                self._thread.start()

    def remove(self, worker: _Worker) -> None:
        with self._lock:
            if worker in self._workers:
                self._workers.discard(worker)
                self._selector.unregister(worker.output)
                os.close(worker.output)

    def close(self) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.join()
        for worker in list(self._workers):
            self.remove(worker)
        self._selector.close()

    def _run(self) -> None:
        looked = 0.0
        while not self._closed:
            time.sleep(_WATCH_SECONDS / 5)  # lets a flood of output fill the pipe: fewer and larger reads
            with self._lock:
                ready = self._selector.select(0)
                for key, _ in ready:
                    self.drain(key.data)
                busy = [w for w in self._workers if w.busy]
            if time.monotonic() - looked >= _WATCH_SECONDS:
                looked = time.monotonic()
                for worker in busy:
                    self._judge(worker)
            if not ready and not busy:
                time.sleep(_WATCH_SECONDS)

    def drain(self, worker: _Worker) -> None:
        """Read what it printed, as far as a pipe holds."""
        with contextlib.suppress(BlockingIOError):
            worker.printed += os.read(worker.output, 1 << 16)
            del worker.printed[:-_KEPT_OUTPUT]

    def _judge(self, worker: _Worker) -> None:
        tree = [worker.pid, *descendants(worker.pid)]
        used = sum(memory(pid) for pid in tree) >> 20
        if len(tree) > MOST_PROCESSES:
            worker.verdict = f"started more than {MOST_PROCESSES - 1} processes"
        elif used > self._memory:
            worker.verdict = f"used more than reward.memory_mib={self._memory} MiB"
        if worker.verdict:
            kill_tree(worker.pid)
