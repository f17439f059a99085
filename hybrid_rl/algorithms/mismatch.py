"""What corrects for tokens that another policy sampled than the one that the loss takes for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms.tokens import Tokens


def mismatch_weights(tokens: Tokens, algo: AlgoConfig) -> tuple[Tensor, Tensor]:
    """Factors of the token losses for the engine and the learner computing differently, and which tokens were dropped.
    No gradient.

    By the ratio of the learner's probability at the weights that sampled over the engine's, of each token, of the whole
    sequence, or as its geometric mean: `truncate` weighs with it, clamped to the bounds (TIS); `mask` weighs with it
    too, and drops what is outside of them (MIS; of tokens, IcePop, arXiv 2510.18855). The first two levels are TRL's
    `vllm_importance_sampling_mode`.
    """
    if algo.mismatch == "none":
        return torch.ones_like(tokens.rollout_logprobs_T), torch.zeros_like(tokens.sequence_T, dtype=torch.bool)
    # `old_logprobs_T` are the learner's: `algo.old_logprobs=rollout` is refused with a correction.
    log_ratio_T = (tokens.old_logprobs_T - tokens.rollout_logprobs_T).detach()
    if algo.mismatch_level == "sequence":
        log_ratio_T = tokens.spread_T(tokens.sum_N(log_ratio_T))
    elif algo.mismatch_level == "geometric":
        log_ratio_T = tokens.spread_T(tokens.mean_N(log_ratio_T))
    ratio_T = torch.exp(log_ratio_T)
    if algo.mismatch == "truncate":
        return ratio_T.clamp(algo.mismatch_min, algo.mismatch_max), torch.zeros_like(ratio_T, dtype=torch.bool)
    dropped_T = (ratio_T < algo.mismatch_min) | (ratio_T > algo.mismatch_max)
    return ratio_T.masked_fill(dropped_T, 0), dropped_T


def off_policy_mask(tokens: Tokens, algo: AlgoConfig) -> Tensor:
    """Which tokens to keep: all but those of sequences of negative advantage that the policy has become unlikely to
    sample, by their mean log(rollout / new probability) (DeepSeek-V3.2, arXiv 2512.02556, eq. 9; TRL's
    `off_policy_mask_threshold`)."""
    if algo.off_policy_mask is None:
        return torch.ones_like(tokens.sequence_T, dtype=torch.bool)
    drift_N = tokens.mean_N((tokens.rollout_logprobs_T - tokens.logprobs_T).detach())
    return (tokens.advantages_T >= 0) | (tokens.spread_T(drift_N) <= algo.off_policy_mask)
