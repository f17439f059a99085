"""What a person looks at: the live terminal view, the before/after table, the learning curve, the plan's heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.tracking import RunDirectory, read_metrics

_COLOURS = {"accuracy": "#1b6ca8", "sampled": "#e07a1f", "reward": "#9aa5ad"}


class RunScreen:
    """Progress of a run in the terminal: a bar where there is one, a line every few steps where there is not."""

    def __init__(self, config: Config, too_long: int) -> None:
        self._console = Console(soft_wrap=True)
        self._steps = config.steps
        self._held_out = ""
        if too_long:
            self._console.print(f"training prompts longer than data.max_prompt_length, left out: {too_long}")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting workers", total=self._steps)

    def __enter__(self) -> RunScreen:
        self._console.print("starting workers (about half a minute on a CPU) ...")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show_plan(self, plan: AdaptationPlan) -> None:
        self._console.print(plan_table(plan))

    def show_start(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Where training starts from: step 0, or the one that is resumed."""
        self._held_out = f"{evaluation['eval/accuracy']:.3f} at step {step}"
        if step:
            left = "nothing is left to do" if step == self._steps else f"{self._steps - step} steps are left"
            self._console.print(f"resumed after step {step} of {self._steps}; {left}")

    def show_step(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        if "eval/accuracy" in row:
            self._held_out = f"{row['eval/accuracy']:.3f} at step {step}"
        text = f"step {step}  reward {row['reward/mean']:.3f}  {row['time/step']:.2f} s  held-out {self._held_out}"
        self._progress.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and (step % max(1, self._steps // 20) == 0 or step == self._steps):
            self._console.print(text)

    def show_result(self, run: RunDirectory, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self._progress.stop()
        table = Table("held out", "before", "after", "change", title="Before and after")
        for name in ("eval/accuracy", "eval/mean_at_k"):
            if name in before:
                change = 100 * (after[name] - before[name])
                table.add_row(
                    name.removeprefix("eval/"), f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.1f} points"
                )
        self._console.print(table)
        self._console.print(f"run directory   {run.path}")
        self._console.print(f"learning curve  {run.curve}")


def plan_table(plan: AdaptationPlan, top: int = 8) -> Table:
    """The best-scored modules and the totals of a plan."""
    totals = plan.totals
    share = totals["full_params"] / max(1, totals["candidate_params"])
    table = Table("rank", title="Adaptation plan")
    table.add_column("module", no_wrap=True)
    for header in ("shape", "score", "treatment"):
        table.add_column(header)
    for i, m in enumerate(plan.modules[:top], start=1):
        score = "-" if m.score is None else f"{m.score:.3g}"
        table.add_row(str(i), m.name, f"{m.shape[0]} x {m.shape[1]}", score, m.treatment)
    table.caption = (
        f"{totals['full_modules']} of {totals['candidate_modules']} matrices full ({share:.1%} of their parameters), "
        f"{totals['lora_modules']} LoRA, {totals['frozen_modules']} frozen; {totals['trainable_params']:,} trainable "
        f"parameters; plan {plan.hash}"
    )
    return table


def draw_plan(plan: AdaptationPlan, path: Path) -> None:
    """Heat map of the plan: layer by module kind, coloured by score, full modules outlined."""
    figure, axes = plt.subplots(figsize=(1.5 + 0.8 * len(_kinds(plan)), 1.6 + 0.42 * _layers(plan)))
    _plot_plan(axes, plan)
    _save(figure, path)


def draw_curve(run: RunDirectory, plan: AdaptationPlan, before: Mapping[str, float]) -> None:
    """The learning curve beside the plan."""
    rows = read_metrics(run.metrics)
    width = 3.2 + 0.55 * len(_kinds(plan))
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


def _plot_plan(axes: Axes, plan: AdaptationPlan) -> None:
    kinds = _kinds(plan)
    grid = [[float("nan")] * len(kinds) for _ in range(_layers(plan))]
    for m in plan.modules:
        grid[m.layer][kinds.index(_kind(m.name))] = m.score if m.score is not None else 0.0
    axes.imshow(grid, aspect="auto", cmap="Blues", origin="lower")
    for m in plan.modules:
        if m.treatment == "full":
            corner = (kinds.index(_kind(m.name)) - 0.46, m.layer - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#d1495b", linewidth=2.5))
    axes.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right")
    axes.set_yticks(range(_layers(plan)))
    axes.set(ylabel="layer", title="Plan: score (blue), full (outlined)")


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _kinds(plan: AdaptationPlan) -> list[str]:
    return list(
        dict.fromkeys(_kind(m.name) for m in sorted(plan.modules, key=lambda m: (m.layer, m.component, m.name)))
    )


def _layers(plan: AdaptationPlan) -> int:
    return 1 + max(m.layer for m in plan.modules)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
