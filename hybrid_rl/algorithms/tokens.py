"""What a loss sees of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The T completion tokens of N sequences, one sequence after another; none is split between micro-batches."""

    logprobs_T: Tensor
    """Of the policy in training, at the sampling temperature; carries the gradient."""
    old_logprobs_T: Tensor
    """Denominators of the importance ratio."""
    rollout_logprobs_T: Tensor
    """The rollout engine's."""
    advantages_T: Tensor
    """Each token's: its sequence's advantage, repeated."""
    weights_T: Tensor
    """Factor of each token's loss (`token_weights`)."""
    sequence_T: Tensor
    """Which sequence each token belongs to, 0 to N - 1, never decreasing; int64."""
    sequences: int
    """N. Some may have no token."""
    reference_logprobs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    """Of the policy in training; carries a gradient where `algo.entropy_coef` is above 0."""

    def sum_N(self, x_T: Tensor) -> Tensor:
        """Sum over each sequence's tokens."""
        return x_T.new_zeros(self.sequences).index_add(0, self.sequence_T, x_T)

    def mean_N(self, x_T: Tensor) -> Tensor:
        """Mean over each sequence's tokens; 0 where it has none."""
        return self.sum_N(x_T) / self.sum_N(torch.ones_like(x_T)).clamp(min=1)

    def spread_T(self, x_N: Tensor) -> Tensor:
        """Each sequence's value on its tokens."""
        return x_N[self.sequence_T]
