"""A study's result as a picture: a forest plot, one panel a task."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from hybrid_rl.plain_text import visible
from hybrid_rl.study.analysis import Analysis, Arm
from hybrid_rl.study.tables import ranked

_COLOUR, _DIM = "#1b6ca8", "#5a6570"
_LONGEST = 30


def draw_study(analysis: Analysis, path: Path, held_out: str | None = None) -> None:
    """Every arm's mean and 95 % interval, the best on top, on one set of held-out problems (the first reported, by
    default). The picture's kind is that of the path's ending. Raises `ValueError` if no task has results."""
    held_out = analysis.study.report_on[0] if held_out is None else held_out
    tasks = {task: ranked(arms, held_out) for task, arms in analysis.tasks.items() if arms}
    if not tasks:
        raise ValueError(f"{analysis.study.dir} has no results to draw")
    tallest = max(map(len, tasks.values()))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(1.0 + 5.4 * len(tasks), 1.3 + 0.34 * tallest), squeeze=False, layout="constrained"
    )
    for axes, (task, arms) in zip(panels[0], tasks.items(), strict=True):
        _plot(axes, arms, held_out)
        of = [task, held_out or "held-out"] if len(analysis.study.tasks) > 1 else [held_out or "held-out"]
        axes.set_title(visible(", ".join(of), 80), parse_math=False)
        axes.set_xlabel(f"{analysis.study.metric}, 95 % intervals")
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _plot(axes: Axes, arms: list[Arm], held_out: str) -> None:
    found = [arm.scores[held_out] for arm in arms]
    rows = range(len(arms))
    axes.hlines(rows, [e.low for e in found], [e.high for e in found], color=_COLOUR, linewidth=1.8)
    axes.plot([e.value for e in found], rows, "o", color=_COLOUR)
    for row, estimate in zip(rows, found, strict=True):
        axes.annotate(
            f"{estimate.value:.3f}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            color=_DIM,
            fontsize=8,
        )
    names = [visible(arm.name) for arm in arms]
    labels = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in names]
    axes.set_yticks(rows, labels, fontsize=9, parse_math=False)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
