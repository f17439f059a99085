"""How modules are ranked: one definition each."""

from hybrid_rl.scoring.control import random_scores
from hybrid_rl.scoring.gradient import GradientMoments, score_gradients

__all__ = ["GradientMoments", "random_scores", "score_gradients"]
