"""Rewards to advantages, and how much each token counts: P prompts, G completions of each, N sequences.

`valid_P_G` marks the completions that have a reward; the others get advantage 0 and enter no statistic. So does a group
without signal, except that `batch_normalised` and `reinforce_pp_baseline` count its rewards in the batch's deviation.
Standard deviations are the sample ones (divisor n - 1), as in TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from hybrid_rl.registry import Registry

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""

Advantage = Callable[[Tensor, Tensor], Tensor]
"""(rewards_P_G, valid_P_G) -> advantages_P_G."""
_ADVANTAGES: Registry[Advantage] = Registry("algo.advantage", "hybrid_rl.advantages", ("rewards_P_G", "valid_P_G"))
register_advantage = _ADVANTAGES.register


def find_advantage(name: str) -> Advantage:
    """The function that `algo.advantage` names. It raises `ValueError` unless it returns finite numbers in the
    rewards' shape, and gives completions without a reward 0."""
    function = _ADVANTAGES.find(name)

    @wraps(function)
    def checked(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
        found = function(rewards_P_G, valid_P_G)
        if getattr(found, "shape", None) != rewards_P_G.shape or not found[valid_P_G].isfinite().all():
            shape = getattr(found, "shape", None)
            what = "some that are not" if shape == rewards_P_G.shape else f"{type(found).__name__} of shape {shape}"
            raise ValueError(
                f"algo.advantage={name} must return finite numbers of shape {list(rewards_P_G.shape)}, and gave {what}"
            )
        return found.to(rewards_P_G.dtype).masked_fill(~valid_P_G, 0)

    return checked


def has_signal(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """Which groups have at least two rewards, not all equal. Returns booleans of shape [P]."""
    low_P = rewards_P_G.masked_fill(~valid_P_G, torch.inf).amin(dim=1)
    high_P = rewards_P_G.masked_fill(~valid_P_G, -torch.inf).amax(dim=1)
    return high_P > low_P


@register_advantage("group_normalised")
def group_normalised(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """GRPO: `(R - mean) / (std + 1e-4)` within each group (arXiv 2402.03300, section 4.1.2)."""
    centred_P_G = group_centred(rewards_P_G, valid_P_G)
    others_P_1 = (valid_P_G.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    std_P_1 = (centred_P_G.square().sum(dim=1, keepdim=True) / others_P_1).sqrt()
    return centred_P_G / (std_P_1 + EPSILON)


@register_advantage("group_centred")
def group_centred(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """Dr. GRPO: `R - mean` within each group (arXiv 2503.20783, section 3.2)."""
    present_P_G = rewards_P_G.masked_fill(~valid_P_G, 0)
    mean_P_1 = present_P_G.sum(dim=1, keepdim=True) / valid_P_G.sum(dim=1, keepdim=True).clamp(min=1)
    # Rounding must not give a group of equal rewards an advantage, which a division by its deviation would blow up.
    taught_P_G = valid_P_G & has_signal(rewards_P_G, valid_P_G)[:, None]
    return (present_P_G - mean_P_1).masked_fill(~taught_P_G, 0)


@register_advantage("batch_normalised")
def batch_normalised(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """`R - mean` of the group, over the standard deviation of all rewards of the batch (+ 1e-4) (arXiv 2508.08221;
    TRL's `scale_rewards="batch"`)."""
    return group_centred(rewards_P_G, valid_P_G) / (_std(rewards_P_G[valid_P_G]) + EPSILON)


@register_advantage("rloo")
def rloo(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """RLOO: the reward less the mean of the group's others (arXiv 2402.14740), which is `n / (n - 1) (R - mean)`."""
    count_P_1 = valid_P_G.sum(dim=1, keepdim=True)
    return group_centred(rewards_P_G, valid_P_G) * count_P_1 / (count_P_1 - 1).clamp(min=1)


@register_advantage("reinforce_pp_baseline")
def reinforce_pp_baseline(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """REINFORCE++-baseline: `R - mean` of the group, then normalised over the batch (arXiv 2501.03262).

    Over completions, not tokens. The batch's mean need not be taken off: every group's is 0 already.
    """
    centred_P_G = group_centred(rewards_P_G, valid_P_G)
    return centred_P_G / (_std(centred_P_G[valid_P_G]) + EPSILON)


@register_advantage("raw")
def raw(rewards_P_G: Tensor, valid_P_G: Tensor) -> Tensor:
    """The rewards themselves."""
    return rewards_P_G.masked_fill(~valid_P_G, 0)


def decoupled(rewards_K_P_G: Tensor, valid_K_P_G: Tensor, weights_K: Tensor, penalty_P_G: Tensor) -> Tensor:
    """GDPO (arXiv 2601.05242, section 3): each of K rewards normalised within its groups, summed by weight, and the
    sum, less a penalty, normalised over the batch, `(R - mean) / (std + 1e-4)`. Returns [P, G]; 0 where no reward is
    valid, and for groups in which none that weighs anything, nor the penalty, tells two completions apart."""
    normalised = [group_normalised(r, v) for r, v in zip(rewards_K_P_G, valid_K_P_G, strict=True)]
    sums_P_G = (weights_K[:, None, None] * torch.stack(normalised)).sum(dim=0) - penalty_P_G
    valid_P_G = valid_K_P_G.any(dim=0)
    present = sums_P_G[valid_P_G]
    if not len(present):
        return torch.zeros_like(sums_P_G)
    taught_P = tells_apart(rewards_K_P_G, valid_K_P_G, weights_K) | has_signal(penalty_P_G, valid_P_G)
    return ((sums_P_G - present.mean()) / (_std(present) + EPSILON)).masked_fill(~(valid_P_G & taught_P[:, None]), 0)


def tells_apart(rewards_K_P_G: Tensor, valid_K_P_G: Tensor, weights_K: Tensor) -> Tensor:
    """Which groups have signal in one of K rewards that weighs anything. Returns booleans of shape [P]."""
    found_K_P = torch.stack([has_signal(r, v) for r, v in zip(rewards_K_P_G, valid_K_P_G, strict=True)])
    return (found_K_P & (weights_K != 0)[:, None]).any(dim=0)


def _std(x: Tensor) -> Tensor:
    return x.std() if len(x) > 1 else x.new_zeros(())


def overlong_penalty(lengths: Tensor, limit: int, buffer: int, penalty: float) -> Tensor:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), to be added to the reward: 0 up to `limit - buffer`
    tokens, then linear to `-penalty` at `limit`, and that beyond. A buffer of 0 is no penalty at all."""
    if buffer == 0:
        return lengths * 0.0
    return -penalty * ((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def token_weights(lengths_N: Tensor, aggregation: str, max_length: int) -> Tensor:
    """Factors of the token losses of each sequence of a mini-batch with which their sum over all tokens is the
    `aggregation`, however it is split into micro-batches and ranks. Sequences without tokens have weight 0 and count in
    means over sequences.

    TRL takes the means of `grpo` and `bnpo` over each micro-batch, so that its gradient depends on the split.
    """
    sequences = len(lengths_N)
    divisors_N = {
        "sequence_mean_token_mean": lengths_N.clamp(min=1) * sequences,
        "token_mean": lengths_N.sum().clamp(min=1).expand_as(lengths_N),  # DAPO, arXiv 2503.14476, eq. 8
        "sequence_mean_token_sum": torch.full_like(lengths_N, sequences),
        "constant_length": torch.full_like(lengths_N, sequences * max_length),  # Dr. GRPO, arXiv 2503.20783
    }[aggregation]
    return (1 / divisors_N).masked_fill(lengths_N == 0, 0)
