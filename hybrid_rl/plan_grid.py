"""A plan as a grid, layers by kinds of matrix, for whatever draws it."""

from __future__ import annotations

from hybrid_rl.placement import COMPONENTS
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.treatments import expert_names


def plotted(plan: AdaptationPlan) -> list[PlannedModule]:
    """The modules that have a place in a layer."""
    return [m for m in plan.modules if m.layer is not None]


def kind_of(module: PlannedModule) -> str:
    """The name within the layer, as short as tells what it is: `self_attn.q_proj`."""
    _, _, inside = module.name.partition(f".{module.layer}.")
    parts = inside.split(".")
    shown = (
        2 if not parts[-1].isdigit() else 1 + next(i for i, part in enumerate(reversed(parts)) if not part.isdigit())
    )
    return ".".join(parts[-shown:])


def kinds_of(plan: AdaptationPlan) -> list[str]:
    order = {component: i for i, component in enumerate(COMPONENTS)}
    modules = sorted(plotted(plan), key=lambda m: (order.get(m.component, 99), m.layer or 0, m.name))
    return list(dict.fromkeys(kind_of(m) for m in modules))


def layer_count(plan: AdaptationPlan) -> int:
    return 1 + max((m.layer or 0 for m in plotted(plan)), default=0)


def score_places(plan: AdaptationPlan) -> dict[float, float]:
    """Each score's place among them, from 0 to 1: their values span orders of magnitude."""
    scores = sorted({m.score for m in plotted(plan) if m.score is not None})
    return {score: i / max(1, len(scores) - 1) for i, score in enumerate(scores)}


def routing_shares(run: RunDirectory, plan: AdaptationPlan) -> tuple[dict[str, dict[str, float]], int]:
    """By module with experts, the share of a run's updates that stepped each of them, by name; and the number of
    steps."""
    rows = run.read_routing().values()
    updates = sum(made for made, _ in rows)
    shares: dict[str, dict[str, float]] = {}
    for m in plan.modules:
        if counts := [stepped[m.name] for _, stepped in rows if m.name in stepped]:
            names = expert_names(len(counts[0]), weight=m.trains_weight)
            shares[m.name] = {name: sum(c) / updates for name, c in zip(names, zip(*counts, strict=True), strict=True)}
    return shares, len(rows)
