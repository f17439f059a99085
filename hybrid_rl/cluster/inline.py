"""All workers in this process: no Ray, no parallelism, any debugger."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from hybrid_rl.cluster.base import worker_environment
from hybrid_rl.config import Config
from hybrid_rl.types import Pending, Resources, WorkerHandle


class InlineCluster:
    def __init__(self, config: Config) -> None:
        import torch

        self.has_gpus = torch.cuda.is_available()
        os.environ.update(worker_environment(config, gpus=self.has_gpus))

    def reserve(self, workers: Sequence[Resources]) -> None:
        """Nothing to reserve: one process runs one worker at a time."""

    def start(self, place: int, worker: type, *args: Any, name: str) -> WorkerHandle:
        return _InlineHandle(name, worker(*args))

    def endpoint(self, handle: WorkerHandle) -> tuple[str, int]:
        return "127.0.0.1", free_port()

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        """Torch's process group stays: DeepSpeed holds on to it, and the next run in this process uses it again."""


class _InlineHandle:
    def __init__(self, name: str, worker: Any) -> None:
        self.name = name
        self._worker = worker

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending:
        return _Done(getattr(self._worker, method)(*args, **kwargs))

    def kill(self) -> None:
        self._worker = None


class _Done:
    def __init__(self, value: Any) -> None:
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
