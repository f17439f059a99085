"""How two adaptation plans differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_rl.plan import AdaptationPlan, PlannedModule, treatment_label
from hybrid_rl.treatments import ROUTED


@dataclass(frozen=True)
class PlanDifference:
    """How one plan differs from another."""

    same_full: int
    """Modules whose weight is trained in both."""
    full_overlap: float
    """The same, as a share of those whose weight is trained in either (1 where neither has any)."""
    rank_correlation: float | None
    """Spearman's, of the scores of the modules in both plans; `None` where fewer than two have scores."""
    moved: tuple[tuple[str, str, str], ...]
    """Name, treatment in the first, treatment in the second (`absent` where it is not listed), in the first's order."""


def compare_plans(first: AdaptationPlan, second: AdaptationPlan) -> PlanDifference:
    """What changed from `first` to `second`. The same treatment with another rank, alpha or option is another one."""
    one, two = ({m.name: m for m in plan.modules} for plan in (first, second))
    full_one, full_two = ({m.name for m in plan.modules if m.trains_weight} for plan in (first, second))
    either = full_one | full_two
    labels = {name: _labels(one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two])}
    moved = tuple((name, a, b) for name, (a, b) in labels.items() if a != b)
    pairs = [(m.score, two[m.name].score) for m in first.candidates if m.name in two]
    scored = [(a, b) for a, b in pairs if a is not None and b is not None]
    overlap = len(full_one & full_two) / len(either) if either else 1.0
    return PlanDifference(len(full_one & full_two), overlap, _spearman(scored), moved)


def _labels(first: PlannedModule | None, second: PlannedModule | None) -> tuple[str, str]:
    """What is done with a module in two plans, with whatever else tells them apart where the treatment is the same."""
    labels = treatment_label(first), treatment_label(second)
    if first is None or second is None or first.treatment != second.treatment:
        return labels
    details = [{"alpha": m.alpha, **m.options} for m in (first, second)]
    differing = [k for k in dict.fromkeys([*details[0], *details[1]]) if details[0].get(k) != details[1].get(k)]
    if first.treatment in ROUTED:
        differing = [k for k in differing if k != "ranks"]  # the labels have them
    a, b = (
        ", ".join([label, *(f"{k}={d.get(k)}" for k in differing)]) for label, d in zip(labels, details, strict=True)
    )
    return a, b


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if len(pairs) < 2:
        return None
    value = float(spearmanr(*zip(*pairs, strict=True)).statistic)  # type: ignore[union-attr]
    return value if math.isfinite(value) else None
