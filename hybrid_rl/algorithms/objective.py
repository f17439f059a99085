"""From the losses of single tokens to the one number that is differentiated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms.advantages import find_advantage
from hybrid_rl.algorithms.losses import Loss, TokenLoss, find_loss, kl_T
from hybrid_rl.algorithms.mismatch import mismatch_weights, off_policy_mask
from hybrid_rl.algorithms.tokens import Tokens
from hybrid_rl.settings import ConfigError


@dataclass(frozen=True)
class Objective:
    """A micro-batch's share of the objective, and what went into it (without gradient)."""

    loss: Tensor
    """Scalar to differentiate."""
    tokens: TokenLoss
    kl_T: Tensor | None
    """From the reference policy, where it is given."""
    mismatch_T: Tensor
    """Factor of each token's loss by `algo.mismatch`."""
    mismatch_dropped_T: Tensor
    off_policy_dropped_T: Tensor


def policy_objective(tokens: Tokens, algo: AlgoConfig, loss: Loss) -> Objective:
    """Sum over the tokens of `weight * (mismatch * kept * loss + kl_coef * kl - entropy_coef * entropy)`.

    Summed over any split of a mini-batch's sequences it has the value and the gradient of the whole, as the weights are
    the mini-batch's. Correction and mask act on the policy's loss alone, as in TRL; the entropy's mean is the
    aggregation's, where TRL's is always over tokens. Raises `ValueError` if the loss is not one number a token,
    `RuntimeError` if it raises.
    """
    try:
        found = loss(tokens, algo)
    except Exception as error:  # a user's function may raise anything
        raise RuntimeError(f"algo.loss={algo.loss} raised {type(error).__name__}: {error}") from error
    found = _token_loss(found, tokens, algo)
    mismatch_T, dropped_T = mismatch_weights(tokens, algo)
    kept_T = off_policy_mask(tokens, algo)
    total_T = found.loss_T * mismatch_T * kept_T
    reference_T = tokens.reference_logprobs_T
    divergence_T = None if reference_T is None else kl_T(algo.kl_estimator, tokens.logprobs_T, reference_T)
    if algo.kl_coef > 0 and algo.kl_in == "loss":
        assert divergence_T is not None, "algo.kl_coef needs reference_logprobs_T"
        total_T = total_T + algo.kl_coef * divergence_T
    if algo.entropy_coef > 0:
        assert tokens.entropy_T is not None, "algo.entropy_coef needs entropy_T"
        total_T = total_T - algo.entropy_coef * tokens.entropy_T
    return Objective(
        loss=(total_T * tokens.weights_T).sum(),
        tokens=replace(found, loss_T=found.loss_T.detach()),
        kl_T=None if divergence_T is None else divergence_T.detach(),
        mismatch_T=mismatch_T,
        mismatch_dropped_T=dropped_T,
        off_policy_dropped_T=~kept_T,
    )


def _token_loss(found: TokenLoss | Tensor, tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
    result = found if isinstance(found, TokenLoss) else TokenLoss(found)
    shape = getattr(result.loss_T, "shape", type(found).__name__)
    if shape != tokens.logprobs_T.shape:
        raise ValueError(
            f"algo.loss={algo.loss} must return one loss for each of {len(tokens.logprobs_T)} tokens, not {shape}"
        )
    return result


def rehearse(algo: AlgoConfig) -> None:
    """Find the named loss and advantage, and call them once. Raises `ConfigError` for what is not there or fails."""
    loss, advantage = find_loss(algo.loss), find_advantage(algo.advantage)
    lengths = (12, 0, 3, 1)
    count = sum(lengths)
    numbers_T = -torch.linspace(0.1, 5, count)
    tokens = Tokens(
        logprobs_T=(0.9 * numbers_T).requires_grad_(),
        old_logprobs_T=numbers_T,
        rollout_logprobs_T=numbers_T,
        advantages_T=torch.linspace(1, -1, count),
        weights_T=torch.full((count,), 1 / count),
        sequence_T=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        sequences=len(lengths),
        reference_logprobs_T=numbers_T,
        entropy_T=-numbers_T,
    )
    rewards_P_G = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 0.0]])
    valid_P_G = torch.tensor([[True, True, True], [True, True, False]])
    trials = {
        f"algo.loss={algo.loss}": lambda: policy_objective(tokens, algo, loss).loss.backward(),
        f"algo.advantage={algo.advantage}": lambda: advantage(rewards_P_G, valid_P_G),
    }
    for setting, trial in trials.items():
        try:
            trial()
        except Exception as error:  # a user's function may raise anything
            raise ConfigError(f"{setting} fails when tried: {error}") from error
