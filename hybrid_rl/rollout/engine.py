"""What every rollout engine does, whatever computes its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hybrid_rl.config import Config
from hybrid_rl.types import Completion, Receipt, Sampling, WeightUpdate

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


class RolloutEngine(Protocol):
    """An engine starts with the base model at weight version 0."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt (token ids). `seeds[i]` decides the randomness of prompt i alone, so
        the same prompt, weights and seed give the same completions on any engine of the same kind."""
        ...

    def apply_update(self, update: WeightUpdate) -> Receipt:
        """Hold exactly the base model with `update` applied, and report it. No request runs meanwhile."""
        ...

    def info(self) -> dict[str, Any]:
        """`pid`, `version`, `engine`: where it runs and what it holds."""
        ...


def sampling_from(config: Config, *, n: int, temperature: float, seed: int | None = None) -> Sampling:
    """The configuration's sampling, for `n` completions at `temperature`; `seed` defaults to the run's."""
    s = config.sampling
    seed = config.seed if seed is None else seed
    return Sampling(n, temperature, s.top_p, s.max_completion_length, tuple(s.stop), seed)
