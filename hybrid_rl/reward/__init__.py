"""The runtime that calls reward plugins in processes of their own."""

from hybrid_rl.reward.runtime import RewardPool, Scored

__all__ = ["RewardPool", "Scored"]
