"""How two adaptation plans differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_rl.plan import AdaptationPlan, treatment_label


@dataclass(frozen=True)
class PlanDifference:
    """How one plan differs from another."""

    same_full: int
    """Modules full in both."""
    full_overlap: float
    """Modules full in both, as a share of those full in either (1 where neither has any)."""
    rank_correlation: float | None
    """Spearman's, of the scores of the modules in both plans; `None` where fewer than two have scores."""
    moved: tuple[tuple[str, str, str], ...]
    """Name, treatment in the first, treatment in the second (`absent` where it is not listed), in the first's order."""


def compare_plans(first: AdaptationPlan, second: AdaptationPlan) -> PlanDifference:
    """What changed from `first` to `second`. LoRA of another rank counts as another treatment."""
    one, two = ({m.name: m for m in plan.modules} for plan in (first, second))
    full_one, full_two = ({m.name for m in plan.named("full")} for plan in (first, second))
    either = full_one | full_two
    labels = {
        name: (treatment_label(one.get(name)), treatment_label(two.get(name))) for name in dict.fromkeys([*one, *two])
    }
    moved = tuple((name, a, b) for name, (a, b) in labels.items() if a != b)
    pairs = [(m.score, two[m.name].score) for m in first.candidates if m.name in two]
    scored = [(a, b) for a, b in pairs if a is not None and b is not None]
    overlap = len(full_one & full_two) / len(either) if either else 1.0
    return PlanDifference(len(full_one & full_two), overlap, _spearman(scored), moved)


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if len(pairs) < 2:
        return None
    value = float(spearmanr(*zip(*pairs, strict=True)).statistic)  # type: ignore[union-attr]
    return value if math.isfinite(value) else None
