"""What every rollout engine does, whatever computes its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hybrid_rl.config import Config
from hybrid_rl.types import Completion, Progress, Receipt, Request, Sampling, WeightUpdate
from hybrid_rl.weight_sync import Meeting, Transport

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM reserves space for."""
LARGEST_ADAPTER_RANK = ADAPTER_RANKS[-1]


@dataclass(frozen=True)
class EngineSettings:
    """Everything an engine needs to start."""

    name: str
    model_path: str
    dtype: str
    trust_remote_code: bool
    max_length: int
    """Longest prompt plus completion, in tokens."""
    adapter_rank: int
    """Largest LoRA rank that updates may carry; 0 if they carry no adapter."""
    max_concurrent: int
    gpu_memory_utilization: float
    seed: int
    transport: Transport
    """By which updates arrive."""
    adapter: str = "auto"
    """`sync.adapter`."""
    lora_modules: tuple[str, ...] = ()
    """Modules that updates may carry LoRA factors of."""
    full_names: tuple[str, ...] = ()
    """Weights that updates may carry whole, by parameter name."""
    tensor_parallel: int = 1
    sleeps: bool = False
    """Whether `sleep` will be called: `cluster.placement=colocate`."""


class RolloutEngine(Protocol):
    """An engine starts with the base model at weight version 0.

    It works only while one of its methods runs, so that an update meets no computation under way. After an update that
    failed half-way it answers nothing but another update that begins with an anchor.
    """

    def advance(self, requests: Sequence[Request], cancelled: Sequence[str], seconds: float) -> Progress:
        """Take on `requests`, forget those named in `cancelled` (unknown ids too), and work for about `seconds`, or
        until nothing is left to do. Returns what was finished; what was not goes on in the next call."""
        ...

    def apply_updates(self, updates: Sequence[WeightUpdate], in_flight: str = "keep") -> Receipt:
        """Hold exactly what the last of `updates` describes, and report it; requests under way go on as `in_flight`
        (`keep`, `recompute`) says.

        Raises `UpdateRefused`, with the engine as it was, if they do not lead there from what it holds, or arrived
        damaged.
        """
        ...

    def join(self, meeting: Meeting, rank: int) -> None:
        """Meet the learner as member `rank`, where the transport sends. Raises `SyncTimeout`."""
        ...

    def sleep(self) -> None:
        """Release memory until `wake`. Requests under way are computed anew."""
        ...

    def wake(self) -> None: ...

    def info(self) -> dict[str, Any]:
        """`pid`, `version`, `engine`, `adapter`: where it runs and what it holds."""
        ...


def sampling_from(config: Config, *, n: int, temperature: float, seed: int | None = None) -> Sampling:
    """The configuration's sampling, for `n` completions at `temperature`; `seed` defaults to the run's."""
    s = config.sampling
    seed = config.seed if seed is None else seed
    return Sampling(n, temperature, s.top_p, s.max_completion_length, tuple(s.stop), seed, s.max_seconds)


def run_requests(engine: RolloutEngine, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
    """All of `requests` on one engine, in order."""
    finished: dict[str, tuple[Completion, ...]] = {}
    finished |= engine.advance(requests, (), 1.0).finished
    while len(finished) < len(requests):
        finished |= engine.advance((), (), 1.0).finished
    return [finished[r.id] for r in requests]
