"""What workers print, and what they take."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from itertools import chain, islice

from hybrid_rl.plugins.nursery import PIPE_BYTES, Worker
from hybrid_rl.plugins.tree import descendants, memory

MOST_PROCESSES = 64
"""That one worker may have at a time."""
_WATCH_SECONDS = 0.05
_KEPT_OUTPUT = 2000


class Watch:
    """A thread that reads what workers print, and kills those that take too much memory or start too many processes."""

    def __init__(self, memory_mib: int) -> None:
        self._memory = memory_mib
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._selector = selectors.DefaultSelector()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, worker: Worker) -> None:
        with self._lock:
            self._workers.add(worker)
            self._selector.register(worker.output, selectors.EVENT_READ, worker)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="plugin-watch", daemon=True)
                self._thread.start()

    def remove(self, worker: Worker) -> None:
        with self._lock:
            if worker in self._workers:
                self._workers.discard(worker)
                if worker.output in self._selector.get_map():
                    self._selector.unregister(worker.output)
                os.close(worker.output)

    def forget(self, worker: Worker) -> None:
        """What it printed so far has nothing to do with what comes."""
        with self._lock:
            self._drain(worker)
            worker.printed.clear()

    def last_output(self, worker: Worker) -> str:
        with self._lock:
            self._drain(worker)
            text = bytes(worker.printed).decode(errors="replace").strip()
        return " / ".join(line.strip() for line in text.splitlines()[:6])

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for worker in list(self._workers):
            self.remove(worker)
        self._selector.close()

    def _run(self) -> None:
        looked = 0.0
        while not self._closed.wait(_WATCH_SECONDS / 5):  # lets a flood of output fill the pipe: few and large reads
            with self._lock:
                for key, _ in self._selector.select(0):
                    self._drain(key.data)
                workers = list(self._workers)
            if time.monotonic() - looked >= _WATCH_SECONDS:
                looked = time.monotonic()
                for worker in workers:
                    self._judge(worker)

    def _drain(self, worker: Worker) -> None:
        """Read what it printed, as far as a pipe holds."""
        with contextlib.suppress(BlockingIOError):
            read = os.read(worker.output, PIPE_BYTES)
            worker.printed += read[-_KEPT_OUTPUT:]
            del worker.printed[:-_KEPT_OUTPUT]
            if not read and worker.output in self._selector.get_map():  # it prints no more
                self._selector.unregister(worker.output)

    def _judge(self, worker: Worker) -> None:
        tree = list(islice(chain([worker.pid], descendants(worker.pid)), MOST_PROCESSES + 1))
        most = self._memory << 20
        if len(tree) > MOST_PROCESSES:
            worker.verdict = f"started more than {MOST_PROCESSES - 1} processes"
        elif (  # what is exact takes time, in which those that fork in a rush would get away
            len(tree) <= worker.processes
            and sum(map(memory, tree)) > most
            and sum(memory(pid, exact=True) for pid in tree) > most
        ):
            worker.outgrown = True
            worker.verdict = f"used more than reward.memory_mib={self._memory} MiB"
        worker.processes = len(tree)
        if worker.verdict:
            worker.kill()
