"""Advantages from rewards: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


def group_normalised(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """GRPO: `(R - mean) / (std + 1e-4)` within each prompt's group (arXiv 2402.03300, eq. 3).

    `valid_P_G` marks the completions that have a reward; the others get advantage 0 and do not enter the statistics.
    The standard deviation is the sample one (divisor n - 1), as in TRL. Returns a tensor of the rewards' shape.
    """
    valid = valid_P_G.to(rewards_P_G.dtype)
    count_P_1 = valid.sum(dim=1, keepdim=True)
    mean_P_1 = (rewards_P_G * valid).sum(dim=1, keepdim=True) / count_P_1.clamp(min=1)
    centred_P_G = (rewards_P_G - mean_P_1) * valid
    variance_P_1 = centred_P_G.square().sum(dim=1, keepdim=True) / (count_P_1 - 1).clamp(min=1)
    return centred_P_G / (variance_P_1.sqrt() + EPSILON)


def has_signal(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """Which groups teach anything: at least two rewards, not all equal. Returns booleans of shape [P]."""
    low_P = rewards_P_G.masked_fill(~valid_P_G, torch.inf).amin(dim=1)
    high_P = rewards_P_G.masked_fill(~valid_P_G, -torch.inf).amax(dim=1)
    return high_P > low_P
