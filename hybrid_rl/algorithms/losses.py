"""Losses of single tokens, one function an algorithm, and the estimators of the KL divergence.

r is the importance ratio (probability in training over old one), A the advantage. `policy_objective` adds the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms.tokens import Tokens
from hybrid_rl.registry import Registry


@dataclass(frozen=True)
class TokenLoss:
    """Each token's loss, and where the clip acted."""

    loss_T: Tensor
    low_T: Tensor | None = None
    """Tokens whose gradient the clip removed at its lower side; None: it has none."""
    high_T: Tensor | None = None
    """The same at its upper side; of `cispo`, whose weight it capped."""


Loss = Callable[[Tokens, AlgoConfig], TokenLoss | Tensor]
_LOSSES: Registry[Loss] = Registry("algo.loss", "hybrid_rl.losses", ("tokens", "algo"))
register_loss = _LOSSES.register
find_loss = _LOSSES.find


@register_loss("clip")
def clip(tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
    """GRPO and PPO: `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` (arXiv 2402.03300, eq. 3)."""
    return _clipped(torch.exp(_log_ratio_T(tokens)), tokens.advantages_T, algo)


@register_loss("gspo")
def gspo(tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
    """GSPO: as `clip`, with the geometric mean of a sequence's ratios on each of its tokens (arXiv 2507.18071, eq. 5
    and 7). Its mean over the tokens is the paper's loss of the sequence."""
    ratio_N = torch.exp(tokens.mean_N(_log_ratio_T(tokens)))
    return _clipped(tokens.spread_T(ratio_N), tokens.advantages_T, algo)


@register_loss("gspo_token")
def gspo_token(tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
    """GSPO-token: the value of `gspo`, but each token's gradient is its own (arXiv 2507.18071, eq. 13 and 14)."""
    log_ratio_N = tokens.mean_N(_log_ratio_T(tokens)).detach()
    own_T = tokens.logprobs_T - tokens.logprobs_T.detach()
    return _clipped(torch.exp(tokens.spread_T(log_ratio_N) + own_T), tokens.advantages_T, algo)


@register_loss("cispo")
def cispo(tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
    """CISPO: `-sg[min(r, 1 + clip_high)] A log p` (arXiv 2506.13585, eq. 4 and 5, without its lower bound, as there).
    TRL's `epsilon_high` is the cap itself, here `1 + clip_high`."""
    ratio_T = torch.exp(_log_ratio_T(tokens)).detach()
    cap = 1 + algo.clip_high
    return TokenLoss(-ratio_T.clamp(max=cap) * tokens.advantages_T * tokens.logprobs_T, high_T=ratio_T > cap)


@register_loss("sapo")
def sapo(tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
    """SAPO: `-4 / t sigmoid(t (r - 1)) A`, a soft gate whose sharpness t depends on A's sign (arXiv 2511.20347)."""
    positive, negative = algo.sapo_temperature_positive, algo.sapo_temperature_negative
    sharpness_T = torch.full_like(tokens.advantages_T, negative).masked_fill(tokens.advantages_T > 0, positive)
    gate_T = torch.sigmoid(sharpness_T * (torch.exp(_log_ratio_T(tokens)) - 1)) * 4 / sharpness_T
    return TokenLoss(-gate_T * tokens.advantages_T)


def _log_ratio_T(tokens: Tokens) -> Tensor:
    return tokens.logprobs_T - tokens.old_logprobs_T


def _clipped(ratio_T: Tensor, advantages_T: Tensor, algo: AlgoConfig) -> TokenLoss:
    """The clipped surrogate (PPO, arXiv 1707.06347, eq. 7); with `dual_clip`, the ratio is also capped where A < 0
    (arXiv 1912.09729; TRL's `delta`)."""
    low, high = 1 - algo.clip_low, 1 + algo.clip_high
    # The cap is above `high`, so that it binds only where A < 0.
    free_T = ratio_T if algo.dual_clip is None else ratio_T.clamp(max=algo.dual_clip)
    loss_T = -torch.minimum(free_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    high_T = (ratio_T > high) & (advantages_T > 0)
    if algo.dual_clip is not None:
        high_T |= (ratio_T > algo.dual_clip) & (advantages_T < 0)
    return TokenLoss(loss_T, (ratio_T < low) & (advantages_T < 0), high_T)


def kl_T(estimator: str, logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Estimates of KL(policy || reference) on tokens sampled from the policy: k1 `log(p / p_ref)`, k2 half its square,
    k3 `p_ref / p - log(p_ref / p) - 1` (Schulman, "Approximating KL divergence"; arXiv 2402.03300, eq. 4).

    In the loss, only the gradient of k2 is that of the divergence on average; k1's is 0. TRL also multiplies k3 by the
    importance ratio (arXiv 2512.02556) unless `use_bias_correction_kl` is off.
    """
    log_ratio_T = reference_T - logprobs_T
    return {"k1": -log_ratio_T, "k2": log_ratio_T.square() / 2, "k3": torch.expm1(log_ratio_T) - log_ratio_T}[estimator]
