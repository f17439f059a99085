"""Policy losses: pure functions on tensors, one per algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """A loss and what it saw."""

    loss: Tensor
    """Scalar to differentiate."""
    clipped_tokens: Tensor
    """Tokens whose gradient the clip removed (no gradient)."""


def clipped_policy_loss(
    logprobs_N_T: Tensor,
    old_logprobs_N_T: Tensor,
    advantages_N: Tensor,
    mask_N_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights_N: Tensor,
) -> PolicyLoss:
    """GRPO's clipped surrogate without KL (arXiv 2402.03300, eq. 3): mean over each completion's tokens, then a
    weighted sum over completions.

    With `weights_N = 1/N` over the whole mini-batch, summing this loss over any split of the batch into micro-batches
    and ranks gives the same value and gradient as the batch at once. A completion without tokens contributes 0.
    """
    ratio_N_T = torch.exp(logprobs_N_T - old_logprobs_N_T)
    advantages_N_1 = advantages_N[:, None]
    free_N_T = ratio_N_T * advantages_N_1
    bounded_N_T = ratio_N_T.clamp(1 - clip_low, 1 + clip_high) * advantages_N_1
    mask = mask_N_T.to(logprobs_N_T.dtype)
    token_loss_N_T = -torch.minimum(free_N_T, bounded_N_T) * mask
    loss_N = token_loss_N_T.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    clipped = ((bounded_N_T < free_N_T) & (mask_N_T > 0)).sum()
    return PolicyLoss(loss=(loss_N * weights_N).sum(), clipped_tokens=clipped.detach())


def k3_divergence(logprobs_N_T: Tensor, other_logprobs_N_T: Tensor, mask_N_T: Tensor) -> Tensor:
    """Sum over unmasked tokens of the estimator `r - ln r - 1`, `r = p_other / p` (k3 in Schulman's "Approximating KL
    divergence"), of KL(p || other) when the tokens were sampled from p. Non-negative; divide by the token count."""
    log_ratio_N_T = other_logprobs_N_T - logprobs_N_T
    return ((torch.expm1(log_ratio_N_T) - log_ratio_N_T) * mask_N_T.to(log_ratio_N_T.dtype)).sum()
