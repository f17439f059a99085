"""All workers in this process: no Ray, no parallelism, any debugger."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from hybrid_rl.cluster.base import make_transport, worker_environment
from hybrid_rl.config import Config
from hybrid_rl.types import Pending, Resources, WorkerDied, WorkerHandle
from hybrid_rl.weight_sync import SyncTimeout, Transport


class ThisProcess:
    """The one node that needs no cluster."""

    def nodes(self) -> list[str]:
        return ["this machine"]

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> WorkerHandle:
        return _ThreadedHandle(name, worker(*args), at_once)


class InlineCluster(ThisProcess):
    def __init__(self, config: Config) -> None:
        import torch

        self.has_gpus = torch.cuda.is_available()
        self._transport: Transport | None = None
        os.environ.update(worker_environment(config, gpus=self.has_gpus))

    def reserve(self, places: Sequence[Resources]) -> None:
        """Nothing to reserve: one process runs one worker at a time."""

    def start(self, place: int, worker: type, *args: Any, name: str, takes: Resources) -> WorkerHandle:
        return _InlineHandle(name, worker(*args))

    def endpoint(self, handle: WorkerHandle) -> tuple[str, int]:
        return "127.0.0.1", free_port()

    def share(self, value: Any) -> Any:
        return value

    def transport(self, config: Config) -> Transport:
        self._transport = make_transport(config, self, Memory())
        return self._transport

    def close(self) -> None:
        """Torch's process group stays: DeepSpeed holds on to it, and the next run in this process uses it again."""
        if self._transport is not None:
            self._transport.close()


class Memory(Transport):
    """This process's memory."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._payloads: dict[int, bytes] = {}

    def put(self, payload: bytes, what: str) -> int:
        number = next(self._numbers)
        self._payloads[number] = payload
        return number

    def get(self, ticket: int, what: str) -> bytes:
        try:
            return self._payloads[ticket]
        except KeyError:
            raise SyncTimeout(f"{what}: nothing is there, and nothing will come within one process") from None

    def drop(self, ticket: int) -> None:
        self._payloads.pop(ticket, None)


class _InlineHandle:
    def __init__(self, name: str, worker: Any) -> None:
        self.name = name
        self._worker = worker

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending:
        return _Done(self.name, getattr(self._worker, method)(*args, **kwargs))

    def kill(self) -> None:
        self._worker = None


class _ThreadedHandle:
    """A worker that takes several calls at a time."""

    def __init__(self, name: str, worker: Any, at_once: int) -> None:
        self.name = name
        self._worker = worker
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix=name)

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending:
        return _Later(self.name, self._threads.submit(getattr(self._worker, method), *args, **kwargs))

    def kill(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Later:
    def __init__(self, name: str, future: Future[Any]) -> None:
        self.name = name
        self._future = future

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except FutureTimeout:
            if self._future.done():  # its own
                raise
            raise WorkerDied(f"{self.name} did not answer within {timeout:g} s", self.name) from None

    def ready(self, timeout: float) -> bool:
        return bool(wait([self._future], timeout).done)


class _Done:
    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self._value = value

    def result(self, timeout: float | None = None) -> Any:
        return self._value

    def ready(self, timeout: float) -> bool:
        return True


def free_port() -> int:
    """A port on this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
