"""Controls: scores that look at no gradient and no weight, against which the others must show their worth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fnmatch import fnmatchcase

from hybrid_rl.config import ConfigError
from hybrid_rl.scoring.registry import Evidence, ScoreContext, register_score


@register_score("random", needs="structure")
def random_scores(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """Uniform in [0, 1), from the run's seed and the order of the modules alone."""
    generator = random.Random(context.seed)
    return [generator.random() for _ in modules]


@register_score("manual", needs="structure")
def manual_scores(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """As `plan.manual` says: the value of the last of its patterns that matches the module's name, else 0."""
    for pattern in context.plan.manual:
        if not any(fnmatchcase(m.weight.name, pattern) for m in modules):
            raise ConfigError(f"plan.manual: {pattern!r} matches no candidate; they look like {modules[0].weight.name}")

    def value(name: str) -> float:
        return next((v for p, v in reversed(context.plan.manual.items()) if fnmatchcase(name, p)), 0.0)

    return [value(m.weight.name) for m in modules]


@register_score("last_layers", needs="structure")
def last_layers(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """The module's layer: the last layers first, as in layer-freezing baselines."""
    outside = 1 + max((m.weight.layer for m in modules if m.weight.layer is not None), default=0)
    return [float(outside if m.weight.layer is None else m.weight.layer) for m in modules]
