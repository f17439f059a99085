"""The calling side: worker processes, each call with a limit of time and memory.

A worker that exceeds a limit is killed with all it started and replaced by one that has the plugins imported already.
Its answers are JSON; what it prints is read and dropped, but for the last of it, which a failure quotes.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from hybrid_rl.plugins import nursery
from hybrid_rl.plugins.nursery import END_SECONDS, Nursery, Worker
from hybrid_rl.plugins.resolve import load_plugin
from hybrid_rl.plugins.watch import Watch
from hybrid_rl.plugins.worker import MUTE

logger = logging.getLogger(__name__)
GIVE_UP_AFTER = 8
"""Failures in a row after which a plugin that has not answered at all is taken for broken."""
_BEGIN_SECONDS = 5.0
"""In which a worker that was called before takes up the next call."""


@dataclass(frozen=True)
class Failure:
    """Why a call has no result."""

    kind: str
    """`timeout`, `error` or `crash`."""
    detail: str

    @property
    def said(self) -> str:
        """What it did, to follow its name."""
        return f"raised {self.detail}" if self.kind == "error" else self.detail


@dataclass(frozen=True)
class Answer:
    """What a call gave."""

    values: list[Any]
    """Those that came before the failure, if there is one."""
    failure: Failure | None
    doubtful: bool = False
    """Whether the process ended in a way that an earlier call, or the end of its nursery, may have brought about."""


def late(seconds: float) -> str:
    """Why a call has no result that took longer than `reward.timeout`."""
    return f"took more than reward.timeout={seconds:g} s"


_STOPPED = Answer([], Failure("crash", "was stopped"))


class PluginProcesses:
    """Worker processes that call plugins. Safe for threads, but for `preload`, which one may call at a time."""

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
        self._nursery = Nursery(modules, paths)
        self._watch = Watch(memory_mib)
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # the last used one has its class set up
        for _ in range(workers):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="plugins")
        self._closed = False
        self._out: set[Worker] = set()
        self._lock = threading.Lock()

    def check(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Any:
        """The one value of a call, which may import a plugin and start processes that stay. Raises `ValueError` with
        the reason if there is none."""
        answer = self._run(pickle.dumps((function, arguments, True)), nursery.START_SECONDS)
        if answer.failure is not None:
            raise ValueError(answer.failure.detail)
        return answer.values[0]

    def preload(self, spec: str, group: str | None = None) -> None:
        """Have all further workers start with a plugin imported, one that `check` has seen to be harmless. Waits for
        calls under way."""
        taken = [self._idle.get() for _ in range(self._count)]
        try:
            for worker in taken:
                if worker is not None:
                    self._retire(worker, END_SECONDS)
            self._nursery.load(load_plugin.__module__, load_plugin.__name__, spec, group)
        finally:
            for _ in taken:
                self._idle.put(None)

    def schedule(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Future[Answer]:
        """`run` in the background; at most as many calls are under way as there are workers."""
        if self._closed:
            raise RuntimeError("the plugin processes were stopped")
        return self._threads.submit(self.run, function, *arguments)

    def run(self, function: Callable[..., Iterator[Any]], *arguments: Any, first: tuple[Any, ...] = ()) -> Answer:
        """Call a generator function in a worker, once one is free. The arguments are pickled; values come back as JSON
        has them. `first` is a function with its arguments that a worker calls before the first call that names it, with
        as long as importing may take. Raises `RuntimeError` if no process can be started."""
        ready = pickle.dumps((first[0], first[1:], True)) if first else None
        return self._run(pickle.dumps((function, arguments, False)), self._timeout, ready)

    def close(self) -> None:
        """Calls under way end as failed, and so do later ones."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        idle: list[Worker | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for worker in idle:
            if worker is not None:
                worker.socket.close()  # all at once, then wait for each
        with self._lock:
            busy = self._out.difference(idle)
        for worker in busy:
            worker.kill()  # its call sees it
        until = time.monotonic() + END_SECONDS
        for worker in idle:
            if worker is not None:
                self._retire(worker, until - time.monotonic())
            self._idle.put(None)
        self._nursery.close()
        for _ in range(self._count):  # until no call is under way
            self._idle.get()
        self._watch.close()
        for _ in range(self._count):  # for calls to come, which fail
            self._idle.put(None)
        self._threads.shutdown(wait=True)

    def _run(self, call: bytes, seconds: float, first: bytes | None = None) -> Answer:
        worker = self._idle.get()
        try:
            if worker is not None and not worker.waits():
                logger.warning("a plugin process died while idle; starting a new one")
                worker = self._retire(worker)
            worker, answer = self._ask(worker, call, seconds, first)
            if answer.doubtful and not answer.values:
                worker, answer = self._ask(None, call, seconds, first)
            return answer
        finally:
            self._idle.put(worker)

    def _ask(
        self, worker: Worker | None, call: bytes, seconds: float, first: bytes | None
    ) -> tuple[Worker | None, Answer]:
        """The answer, and a worker that can be asked again."""
        ready = worker or self._start()
        if isinstance(ready, Answer):
            return None, ready
        answer = self._make_ready(ready, first) or self._call(ready, call, seconds)
        doubtful = answer.doubtful and (worker is not None or bool(answer.values) or ready.orphaned())
        answer = replace(answer, doubtful=doubtful)
        if answer.failure is not None and answer.failure.kind != "error":
            return self._retire(ready), answer
        return self._retire(ready, END_SECONDS) if ready.worn else ready, answer

    def _start(self) -> Worker | Answer:
        """A new worker, or why there is none."""
        try:
            worker = self._nursery.fork()
        except BlockingIOError as error:
            return Answer([], Failure("crash", f"could be given no process: {error}"))
        except RuntimeError:
            if self._closed:
                return _STOPPED
            raise
        with self._lock:
            self._out.add(worker)
        self._watch.add(worker)
        if not self._closed:
            return worker
        self._retire(worker)  # `close` may not have seen it
        return _STOPPED

    def _make_ready(self, worker: Worker, first: bytes | None) -> Answer | None:
        """Why it cannot be called, if so. An error is no reason: the call itself will meet it again, and say so."""
        if first is None or first in worker.ready:
            return None
        answer = self._call(worker, first, nursery.START_SECONDS)
        worker.ready.add(first)
        failed = answer.failure is not None and answer.failure.kind != "error"
        return replace(answer, values=[]) if failed else None

    def _retire(self, worker: Worker, seconds: float = 0.0) -> None:
        worker.end(seconds)
        self._watch.remove(worker)
        with self._lock:
            self._out.discard(worker)

    def _call(self, worker: Worker, call: bytes, seconds: float) -> Answer:
        values: list[Any] = []
        self._watch.forget(worker)
        try:
            until = time.monotonic() + (_BEGIN_SECONDS if worker.used else nursery.START_SECONDS)
            worker.used = True
            worker.send(call, until)
            if "begun" not in worker.lines.take(until):
                raise ValueError("out of turn")
        except (OSError, EOFError, ValueError) as error:
            return Answer(values, Failure("crash", self._why(worker, error)), worker.doubtful)
        try:
            while True:
                message = worker.lines.take(time.monotonic() + seconds)
                if message["number"] != len(values):  # what a plugin wrote there is none of ours
                    raise ValueError("out of turn")
                if "value" not in message:
                    break
                values.append(message["value"])
            worker.worn = bool(message["worn"])
            end = message["end"]
            return Answer(values, Failure("error", str(end)) if end is not None else None)
        except TimeoutError:
            if worker.verdict:  # it is being killed, which takes its time
                return Answer(values, Failure("crash", worker.verdict), worker.doubtful)
            detail = late(seconds) if seconds == self._timeout else f"took more than {seconds:g} s to start"
            return Answer(values, Failure("timeout", detail))
        except (OSError, EOFError, ValueError, KeyError) as error:
            return Answer(values, Failure("crash", self._why(worker, error)), worker.doubtful)

    def _why(self, worker: Worker, error: Exception) -> str:
        """What became of a worker that answered no more, or in no way that can be read."""
        if self._closed:
            return "was stopped"
        if worker.verdict:
            return worker.verdict
        status = self._nursery.status(worker.pid) if worker.ended() else None
        if status is None or status == MUTE:
            what = "wrote over what its process answers through, or closed it"
            what = f"{what} ({error})" if status is None else what
        else:
            what = f"ended its process with status {status}"
        output = self._watch.last_output(worker)
        return what + (f"; it printed last: {output}" if output else "")
