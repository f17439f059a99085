"""How modules are ranked: a registry of scores, and what gathers the gradients that they look at."""

from hybrid_rl.scoring import control, gradient, weight  # noqa: F401  (registers the scores)
from hybrid_rl.scoring.collect import Collector, sketch_floats
from hybrid_rl.scoring.registry import (
    Evidence,
    Kind,
    Score,
    ScoreContext,
    find_score,
    per_module,
    register_score,
    score_names,
)

__all__ = [
    "Collector",
    "Evidence",
    "Kind",
    "Score",
    "ScoreContext",
    "find_score",
    "per_module",
    "register_score",
    "score_names",
    "sketch_floats",
]
