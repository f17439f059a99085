"""Scores from gradients of the base policy and from the course of short probes.

M1, M2 are one matrix's views from two disjoint halves of the prompts, M their mean, n its parameters, r `score_rank`,
P_r the best rank-r truncation. There are three kinds of view: the mean gradient of the base policy (`grad_*`); the mean
of its gradients scaled as Adam scales them (`adam_*`); and the same along a probe (`update_*`).

The probe trains LoRA on every candidate for a few on-policy steps, while the full matrices' gradients are scaled and
summed: that sum is the update which a full matrix would have received on the way, beyond what LoRA did. Only the
adapter moves the policy, so the probe needs the memory of LoRA training, and the base weights are never written.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from hybrid_rl.scoring.registry import Evidence, Kind, Needs, ScoreContext, per_module, register_score
from hybrid_rl.scoring.view import View

Pair = tuple[View, View]
_EPSILON = 1e-30


def shared_energy(pair: Pair) -> float:
    """`<M1, M2>`: the squared norm of what both halves agree on, free of the noise that they do not share."""
    first, second = pair
    return float((first.rows() * second.rows()).sum())


def shared_tail(pair: Pair, rank: int) -> float:
    """`<M1, M2> - (<P_r M1, M2> + <P_r M2, M1>) / 2`: the part of `shared_energy` outside the best rank-r parts.

    With M1 = M2 it is the sum of the squared singular values behind the first r.
    """
    first, second = pair
    return (_left_over(first, second, rank) + _left_over(second, first, rank)) / 2


def _left_over(first: View, second: View, rank: int) -> float:
    """`<M1 - P_r M1, M2>`, measured on rows that the truncation has not seen."""
    found = []
    for fold in first.folds:
        u, s, vh = first.leading(rank, fold)
        rows = first.held_out(fold) - first.held_out_of(u * s, fold) @ vh
        found.append(float((rows * second.held_out(fold)).sum()))
    return sum(found) / len(found)


def mean_view(pair: Pair) -> View:
    """The view of `(M1 + M2) / 2`."""
    first, second = pair
    mean = View(first.name, first.shape, first.sizes, first.device)
    for into, a, b in zip(mean.tensors, first.tensors, second.tensors, strict=True):
        into.copy_((a + b) / 2)
    return mean


def energy(view: View) -> float:
    """`||M||_F^2` of one view, its noise included."""
    return float(view.rows().square().sum())


def tail_energy(view: View, rank: int) -> float:
    """`sum of s_j^2 for j > r` of one view, its noise included."""
    return max(_left_over(view, view, rank), 0.0)


def _gradient(module: Evidence) -> Pair:
    assert module.gradient is not None
    return module.gradient


def _direction(module: Evidence) -> Pair:
    assert module.direction is not None
    return module.direction


def _of_pair(pair: Callable[[Evidence], Pair], of: Callable[[Pair, int], float]) -> Callable[..., float]:
    return lambda module, context: of(pair(module), context.rank) / module.weight.params


def _define(name: str, needs: Needs, score: Callable[[Evidence, ScoreContext], float], definition: str) -> None:
    score.__doc__ = definition
    kind: Kind = "direction" if name.startswith(("adam_", "update_")) else "gradient"
    register_score(name, needs=needs, kinds=(kind,))(per_module(score))


def _tail(pair: Pair, rank: int) -> float:
    return tail_energy(mean_view(pair), rank)


def _shared_tail(pair: Pair, rank: int) -> float:
    return max(shared_tail(pair, rank), 0.0)


_define(
    "update_tail_split",
    "updates",
    _of_pair(_direction, _shared_tail),
    "`(<M1, M2> - (<P_r M1, M2> + <P_r M2, M1>) / 2) / n` along the probe: the full update that both halves agree on "
    "outside their best rank-r parts, per parameter.",
)


@register_score("update_tail_split_by_type", needs="updates")
def update_tail_split_by_type(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """`update_tail_split` over the root of its median among the modules of the same kind (`q_proj`, ...) that have a
    positive one: half of what kinds differ by is taken out, so that a matrix is also compared with its like."""
    scores = [_shared_tail(_direction(m), context.rank) / m.weight.params for m in modules]
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for module, score in zip(modules, scores, strict=True):
        if score > 0:
            kinds[_kind(module)].append(score)
    medians = {kind: statistics.median(values) for kind, values in kinds.items()}
    return [s / math.sqrt(medians[_kind(m)]) if s > 0 else 0.0 for m, s in zip(modules, scores, strict=True)]


def _kind(module: Evidence) -> tuple[str, str]:
    return module.weight.component, module.weight.name.rpartition(".")[2]


_define(
    "update_tail",
    "updates",
    _of_pair(_direction, _tail),
    "`sum of s_j(M)^2 for j > r, / n` along the probe: as `update_tail_split`, noise included.",
)
_define(
    "adam_tail_split",
    "gradients",
    _of_pair(_direction, _shared_tail),
    "The formula of `update_tail_split` on the Adam-scaled gradients of the base policy: the cheap fallback.",
)
_define(
    "adam_tail",
    "gradients",
    _of_pair(_direction, _tail),
    "`sum of s_j(M)^2 for j > r, / n` on the Adam-scaled gradients of the base policy.",
)
_define(
    "grad_tail_split",
    "gradients",
    _of_pair(_gradient, _shared_tail),
    "The formula of `update_tail_split` on the base policy's mean gradient: what holding one gradient step to rank r "
    "forfeits.",
)
_define(
    "grad_tail",
    "gradients",
    _of_pair(_gradient, _tail),
    "`sum of s_j(M)^2 for j > r, / n` of the mean gradient, noise included.",
)


def _share(module: Evidence, context: ScoreContext) -> float:
    view = mean_view(_gradient(module))
    return tail_energy(view, context.rank) / max(energy(view), _EPSILON)


def _lora_tangent(module: Evidence, context: ScoreContext) -> float:
    view = mean_view(_gradient(module))
    return max(energy(view) - view.captured_by_random_rows(context.lora_rank), 0.0) / module.weight.params


def _effective_rank(module: Evidence, context: ScoreContext) -> float:
    view = mean_view(_gradient(module))
    s = view.singular_values().double()
    behind = max(energy(view) - float(s.square().sum()), 0.0)
    unseen = min(view.shape) - len(s)
    if unseen > 0:  # the least that is known of the rest: its energy, spread evenly
        s = torch.cat([s, s.new_full((unseen,), math.sqrt(behind / unseen))])
    p = s / s.sum().clamp(min=_EPSILON)
    return float(torch.exp(-(p * (p + _EPSILON).log()).sum()))


def _norm(module: Evidence, context: ScoreContext) -> float:
    return energy(mean_view(_gradient(module))) / module.weight.params


def _fisher(module: Evidence, context: ScoreContext) -> float:
    assert module.squares is not None
    return module.squares / module.weight.params


_define("grad_tail_frac", "gradients", _share, "`sum of s_j(M)^2 for j > r / sum of s_j(M)^2` of the mean gradient.")
_define(
    "lora_tangent",
    "gradients",
    _lora_tangent,
    "`||M (I - A^+ A)||_F^2 / n` of the mean gradient, A the rows [lora.rank, in] of an adapter's random start: what "
    "its first step cannot reach.",
)
_define(
    "erank",
    "gradients",
    _effective_rank,
    "`exp(-sum p_j ln p_j)`, `p_j = s_j / sum s`, of the mean gradient; of a sketched matrix the energy behind the "
    "known singular values is taken as spread evenly.",
)
_define("grad_norm", "gradients", _norm, "`||M||_F^2 / n` of the mean gradient: importance alone, a control.")
_define(
    "fisher",
    "gradients",
    _fisher,
    "Mean of `||g||_F^2 / n` over the gradients g of single micro-batches: importance alone, a control.",
)
