"""What a cluster does, and the environment its workers start in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.types import Resources, WorkerHandle
from hybrid_rl.weight_sync import Collective, Directory, Transport


class Cluster(Protocol):
    has_gpus: bool

    def reserve(self, places: Sequence[Resources]) -> None:
        """Reserve places for workers, in order. Raises `ConfigError` if the cluster has not got what they need."""
        ...

    def start(self, place: int, worker: type, *args: Any, name: str, takes: Resources) -> WorkerHandle:
        """Construct `worker(*args)` in place number `place`, of which it takes a share or all; it may still be starting
        when this returns."""
        ...

    def nodes(self) -> list[str]:
        """Names of the machines there are."""
        ...

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> WorkerHandle:
        """Construct `worker(*args)` on one of them, beside the places that are reserved. It takes `at_once` calls at a
        time, which must be safe for threads."""
        ...

    def endpoint(self, handle: WorkerHandle) -> tuple[str, int]:
        """Address and free port on the machine where a worker lives."""
        ...

    def share(self, value: Any) -> Any:
        """Something that, as an argument of `submit`, reaches any worker as `value` without being sent each time."""
        ...

    def transport(self, config: Config) -> Transport:
        """What weight updates travel by, as `sync.transport` says; closed with the cluster. Raises `ConfigError` if it
        does not work here."""
        ...

    def close(self) -> None: ...


def check_directory(config: Config) -> Path:
    """`sync.directory`. Raises `ConfigError` if it cannot be written to."""
    root = Path(config.sync.directory or "")
    if not os.access(root, os.W_OK | os.X_OK) or not root.is_dir():
        raise ConfigError(f"sync.directory={config.sync.directory!r} is no directory that can be written to; make it")
    return root


def make_transport(config: Config, cluster: Cluster, memory: Transport) -> Transport:
    """`Cluster.transport`; `memory` is what the cluster has as its `object_store`."""
    sync = config.sync
    if sync.transport == "directory":
        return Directory(check_directory(config), sync.timeout)
    if sync.transport == "nccl":
        if config.cluster.backend == "inline":
            raise ConfigError(
                "sync.transport=nccl is between processes, and cluster.backend=inline has one; use "
                "sync.transport=object_store"
            )
        if cluster.has_gpus and config.cluster.placement == "colocate":
            raise ConfigError(
                "sync.transport=nccl is between GPUs, and with cluster.placement=colocate learner and engine share "
                "one; use sync.transport=object_store"
            )
        return Collective(sync.timeout, "cuda" if cluster.has_gpus else "cpu")
    return memory


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
