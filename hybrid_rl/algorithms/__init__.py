"""The mathematics of policy optimisation: pure functions on tensors, no I/O, no state."""

from hybrid_rl.algorithms.advantages import group_normalised, has_signal
from hybrid_rl.algorithms.losses import PolicyLoss, clipped_policy_loss, k3_divergence

__all__ = ["PolicyLoss", "clipped_policy_loss", "group_normalised", "has_signal", "k3_divergence"]
