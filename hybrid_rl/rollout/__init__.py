"""Rollout engines and the pool that keeps them working. Import engines from their modules: they are heavy."""

from hybrid_rl.rollout.engine import LARGEST_ADAPTER_RANK, EngineSettings, RolloutEngine, run_requests, sampling_from
from hybrid_rl.rollout.episodes import Episodes
from hybrid_rl.rollout.pool import RolloutPool

__all__ = [
    "LARGEST_ADAPTER_RANK",
    "EngineSettings",
    "Episodes",
    "RolloutEngine",
    "RolloutPool",
    "run_requests",
    "sampling_from",
]
