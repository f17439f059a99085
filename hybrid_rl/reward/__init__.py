"""The runtime that calls reward plugins in processes of their own."""

from hybrid_rl.reward.combine import Scored
from hybrid_rl.reward.host import RewardHost
from hybrid_rl.reward.pool import RewardPool, Verdicts

__all__ = ["RewardHost", "RewardPool", "Scored", "Verdicts"]
