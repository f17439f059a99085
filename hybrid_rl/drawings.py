"""Pictures of plans and runs: the learning curve, the plan's heat map, accuracy by rank, routing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_grid import kind_of, kinds_of, layer_count, plotted, routing_shares, score_places
from hybrid_rl.run_directory import RunDirectory, read_metrics

_COLOURS = {"accuracy": "#1b6ca8", "sampled": "#e07a1f", "reward": "#9aa5ad"}


def draw_plan(plan: AdaptationPlan, path: Path) -> None:
    """Heat map of the plan: layer by module kind, coloured by score; where the weight is trained, outlined."""
    figure, axes = plt.subplots(figsize=(2.2 + 0.62 * len(kinds_of(plan)), 2.4 + min(0.42 * layer_count(plan), 9.0)))
    _plot_plan(axes, plan)
    _save(figure, path)


def draw_curve(run: RunDirectory, plan: AdaptationPlan, before: Mapping[str, float]) -> None:
    """The learning curve beside the plan."""
    rows = read_metrics(run.metrics)
    width = 3.2 + 0.55 * len(kinds_of(plan))
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4 + width, 4.2), width_ratios=[6.4, width])
    left.plot(
        [r["step"] for r in rows], [r["reward/mean"] for r in rows], color=_COLOURS["reward"], label="training reward"
    )
    for name, label, colour in (
        ("eval/accuracy", "held-out accuracy (greedy)", _COLOURS["accuracy"]),
        ("eval/mean_at_k", "held-out mean@k (sampled)", _COLOURS["sampled"]),
    ):
        points = [(0.0, before[name])] if name in before else []
        points += [(r["step"], r[name]) for r in rows if name in r]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    left.set(xlabel="step", ylabel="share right", ylim=(0, 1.02), title="Learning curve")
    left.grid(alpha=0.3)
    left.legend(loc="lower right", frameon=False)
    _plot_plan(right, plan)
    _save(figure, run.curve)


def draw_ranks(
    scores: Mapping[str, float], ranks: Mapping[int, Mapping[str, float]], areas: Mapping[str, float], path: Path
) -> None:
    """Accuracy by rank, beside that of the policy as it is trained."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name, label, colour in (
        ("accuracy", "accuracy (greedy)", _COLOURS["accuracy"]),
        ("mean_at_k", "mean@k (sampled)", _COLOURS["sampled"]),
    ):
        if name in scores:
            axes.plot(list(ranks), [found[name] for found in ranks.values()], marker="o", color=colour, label=label)
            axes.axhline(scores[name], color=colour, linestyle="--", linewidth=1, label=f"{label}, as trained")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(k) for k in ranks])
    title = f"Accuracy by rank: AURAC {areas['linear']:.3f} over ranks, {areas['log2']:.3f} over doublings"
    axes.set(xlabel="rank", ylabel="share right", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_routing(run: RunDirectory, plan: AdaptationPlan) -> None:
    """Of MoLF: the share of updates that stepped each expert, by module and layer."""
    shares, steps = routing_shares(run, plan)
    modules = [m for m in plotted(plan) if m.name in shares]
    if not modules:
        return
    names = sorted(
        {name for m in modules for name in shares[m.name]}, key=lambda name: (name != "weight", len(name), name)
    )
    kinds = [kind for kind in kinds_of(plan) if any(kind_of(m) == kind for m in modules)]
    figure, panels = plt.subplots(1, len(names), figsize=(1.5 + 4.2 * len(names), 4.4), sharey=True, squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        grid = [[float("nan")] * len(kinds) for _ in range(layer_count(plan))]
        for m in modules:
            grid[m.layer or 0][kinds.index(kind_of(m))] = shares[m.name].get(name, float("nan"))
        axes.set_facecolor("#eceff1")
        image = axes.imshow(grid, aspect="auto", cmap="Blues", origin="lower", vmin=0, vmax=1)
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
        axes.set(title=name.replace("expert_", "LoRA expert "))
    panels[0][0].set(ylabel="layer")
    figure.colorbar(image, ax=panels[0].tolist(), label=f"share of the updates of {steps} steps")
    figure.savefig(run.routing_image, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _plot_plan(axes: Axes, plan: AdaptationPlan) -> None:
    """Scores are coloured by rank."""
    kinds, modules = kinds_of(plan), plotted(plan)
    place = score_places(plan)
    grid = [[float("nan")] * len(kinds) for _ in range(layer_count(plan))]
    for m in modules:
        grid[m.layer or 0][kinds.index(kind_of(m))] = place[m.score] if m.score is not None else 0.0
    axes.set_facecolor("#eceff1")  # where a layer has no such module
    axes.imshow(grid, aspect="auto", cmap="Blues", origin="lower", vmin=0, vmax=1)
    for m in modules:
        if m.trains_weight:
            corner = (kinds.index(kind_of(m)) - 0.46, (m.layer or 0) - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#d1495b", linewidth=2.0))
        if m.treatment == "frozen":
            axes.text(kinds.index(kind_of(m)), m.layer or 0, "x", ha="center", va="center", color="#667077", fontsize=7)
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    frozen = ", frozen (x)" if any(m.treatment == "frozen" for m in modules) else ""
    axes.set(ylabel="layer", title=f"Plan: rank of score (blue), weight trained (outlined){frozen}")


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
