"""Scores from the base weights alone: no data, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_rl.scoring.registry import Evidence, ScoreContext, register_score

_EPSILON = 1e-12
_WEIGHTS = (0.3, 0.3, 0.2, 0.2)


def _spectral_terms(matrix: Tensor, rank: int) -> list[float]:
    """The four terms of `weight_spectral`, unweighted."""
    s = torch.linalg.svdvals(matrix.double())
    energy = s.square()
    share = energy / energy.sum().clamp(min=_EPSILON)
    p = s / s.sum().clamp(min=_EPSILON)
    effective_rank = torch.exp(-(p * (p + _EPSILON).log()).sum())
    condition = s[0] / s[-1].clamp(min=_EPSILON)
    logs = s.clamp(min=_EPSILON).log()
    gaps = (logs[:-1] - logs[1:]).abs().mean() if len(s) > 1 else torch.ones(())
    return [
        float(effective_rank / len(s)),
        float(1 - share[:rank].sum()),
        float(torch.log1p(condition) / 10),
        float(1 / gaps.clamp(min=_EPSILON)),
    ]


def _all_terms(modules: Sequence[Evidence], context: ScoreContext) -> list[list[float]]:
    terms = []
    for module in modules:
        assert module.base is not None
        terms.append(_spectral_terms(module.base, context.lora_rank))
    return terms


@register_score("weight_spectral", needs="weights")
def weight_spectral(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """`0.3 erank(W)/d + 0.3 (1 - share of energy in first r) + 0.2 ln(1 + cond)/10 + 0.2 / mean |ln s_j - ln s_j+1|`.

    As published (modelscope/twinkle at 7a7ea01, spectral_hybrid_lora.py), r the LoRA rank, d the smaller side. The last
    term telescopes to `(d - 1) / ln cond` and outweighs the others a hundredfold, so this ranks by size and
    conditioning; see `weight_spectral_normalised`.
    """
    return [sum(w * t for w, t in zip(_WEIGHTS, terms, strict=True)) for terms in _all_terms(modules, context)]


@register_score("weight_spectral_normalised", needs="weights")
def weight_spectral_normalised(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """`weight_spectral` with each of its four terms standardised over the modules before they are weighted."""
    terms = torch.tensor(_all_terms(modules, context), dtype=torch.float64)
    spread = terms.std(dim=0, correction=0).clamp(min=_EPSILON)
    return (((terms - terms.mean(dim=0)) / spread) @ torch.tensor(_WEIGHTS, dtype=torch.float64)).tolist()
