"""What a cluster does, and the environment its workers start in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from hybrid_rl.config import Config
from hybrid_rl.types import Resources, WorkerHandle


class Cluster(Protocol):
    has_gpus: bool

    def reserve(self, workers: Sequence[Resources]) -> None:
        """Reserve places for workers, in order. Raises `ConfigError` if the cluster has not got what they need."""
        ...

    def start(self, place: int, worker: type, *args: Any, name: str) -> WorkerHandle:
        """Construct `worker(*args)` in place number `place`; it may still be starting when this returns."""
        ...

    def endpoint(self, handle: WorkerHandle) -> tuple[str, int]:
        """Address and free port on the machine where a worker lives."""
        ...

    def share(self, value: Any) -> Any:
        """Something that, as an argument of `submit`, reaches any worker as `value` without being sent each time."""
        ...

    def close(self) -> None: ...


def worker_environment(config: Config, *, gpus: bool) -> dict[str, str]:
    """Environment variables of every worker. What the user's environment sets already is kept."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in its actor's own process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpus:
        wanted |= {
            "OMP_NUM_THREADS": "1",  # OpenMP's spinning barriers stall when workers share cores
            "DS_ACCELERATOR": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}
