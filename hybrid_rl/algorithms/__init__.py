"""The mathematics of policy optimisation: pure functions on tensors, no I/O, no state.

A loss is a function of a micro-batch's completion tokens, flat, one sequence after another:

    def mine(tokens: Tokens, algo: AlgoConfig) -> TokenLoss:
        ratio_T = torch.exp(tokens.logprobs_T - tokens.old_logprobs_T)
        return TokenLoss(-ratio_T * tokens.advantages_T)

To add it, put it into `losses.py` under `@register_loss("mine")`; or leave it where it is and set
`algo.loss=my_module:mine`; or offer it from an installed package under the entry point group `hybrid_rl.losses`. It
gives one loss a token (a plain tensor [T] will do); what all losses share is `policy_objective`'s: weights, mismatch,
KL divergence, entropy. Advantages are added likewise: `register_advantage`, `algo.advantage`, `hybrid_rl.advantages`.
"""

from hybrid_rl.algorithms.advantages import (
    decoupled,
    find_advantage,
    has_signal,
    overlong_penalty,
    register_advantage,
    tells_apart,
    token_weights,
)
from hybrid_rl.algorithms.losses import TokenLoss, find_loss, kl_T, register_loss
from hybrid_rl.algorithms.mismatch import mismatch_weights, off_policy_mask
from hybrid_rl.algorithms.objective import Objective, policy_objective, rehearse
from hybrid_rl.algorithms.tokens import Tokens

__all__ = [
    "Objective",
    "TokenLoss",
    "Tokens",
    "decoupled",
    "find_advantage",
    "find_loss",
    "has_signal",
    "kl_T",
    "mismatch_weights",
    "off_policy_mask",
    "overlong_penalty",
    "policy_objective",
    "register_advantage",
    "register_loss",
    "rehearse",
    "tells_apart",
    "token_weights",
]
