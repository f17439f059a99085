"""What a person looks at: the live terminal view, the before/after table, the learning curve, the plan's heat map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_rl.components import Anatomy, Weight
from hybrid_rl.config import Config
from hybrid_rl.estimate import FP32, ITEM_SIZE, training_memory
from hybrid_rl.placement import COMPONENTS
from hybrid_rl.plan import AdaptationPlan, PlannedModule, by, treatment_label
from hybrid_rl.plan_difference import PlanDifference
from hybrid_rl.scoring import sketch_floats
from hybrid_rl.tracking import RunDirectory, read_metrics
from hybrid_rl.treatments import TREATMENTS, expert_names

_COLOURS = {"accuracy": "#1b6ca8", "sampled": "#e07a1f", "reward": "#9aa5ad"}


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class RunScreen:
    """Progress of a run in the terminal: a bar where there is one, a line every few steps where there is not."""

    def __init__(self, config: Config, too_long: int) -> None:
        self._console = Console(soft_wrap=True)
        self._steps = config.steps
        self._held_out = ""
        if too_long:
            self._console.print(f"training prompts longer than data.max_prompt_length, left out: {too_long}")
        self._progress = _progress(self._console)
        self._task = self._progress.add_task("starting workers", total=self._steps)

    def __enter__(self) -> RunScreen:
        self._console.print("starting workers (about half a minute on a CPU) ...")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show_ranking(self, what: str, done: int, of: int) -> None:
        """How far the ranking of the modules has come."""
        text = f"ranking modules: {what} {done}/{of}"
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal and done == 0:
            self._console.print(f"{text} ...")

    def show_plan(self, plan: AdaptationPlan) -> None:
        self._console.print(plan_table(plan))

    def show_start(self, step: int, evaluation: Mapping[str, float], evaluated: int) -> None:
        """Where training starts from: step 0, or the one that is resumed, last evaluated at step `evaluated`."""
        self._held_out = f"{evaluation['eval/accuracy']:.3f} at step {evaluated}"
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


class Bar:
    """A progress bar for work whose parts are named as they come; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = _progress(console)
        self._console = console
        self._task = self._progress.add_task("", total=1)
        self._shown = ""

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, of: int) -> None:
        """`done` of `of` parts of `what` are finished."""
        self._progress.update(self._task, description=what, completed=done, total=of)
        if not self._console.is_terminal and what != self._shown:
            self._console.print(f"{what} ...")
        self._shown = what


def plan_table(plan: AdaptationPlan, top: int = 8) -> Table:
    """The best-scored modules and the totals of a plan."""
    totals = plan.totals
    share = (totals["full_params"] - totals["extra_params"]) / max(1, totals["candidate_params"])
    table = Table("rank", title="Adaptation plan")
    table.add_column("module", no_wrap=True)
    for header in ("shape", "score", "treatment"):
        table.add_column(header)
    for i, m in enumerate(plan.modules[:top], start=1):
        table.add_row(str(i), m.name, by(m.shape), "-" if m.score is None else f"{m.score:.3g}", treatment_label(m))
    why = "by plan.also_full" if plan.method.get("also_full") else "beside the candidates"
    extra = f" and {totals['extra_modules']} more {why}" if totals["extra_modules"] else ""
    left = len(plan.modules) - top
    others = ", ".join(f"{totals[f'{t}_modules']} {t}" for t in _used(plan) if t != "full")
    table.caption = (f"{left} more in the plan; " if left > 0 else "") + (
        f"{totals['full_modules'] - totals['extra_modules']} of {totals['candidate_modules']} matrices full "
        f"({share:.1%} of their parameters){extra}, {others}; "
        f"{totals['trainable_params']:,} trainable parameters; plan {plan.hash}"
    )
    if any(m.score is not None for m in plan.modules):
        table.caption += ". A matrix may rank higher and not be full where it is larger than what is left of the budget"
    return table


def _used(plan: AdaptationPlan) -> list[str]:
    """The treatments that tables count: those in the plan, `full` and `frozen` always."""
    there = {m.treatment for m in plan.modules} | {"full", "frozen"}
    return [t for t in TREATMENTS if t in there]


def totals_table(plan: AdaptationPlan) -> Table:
    """What the plan does by component."""
    used = _used(plan)
    table = Table("component", "matrices", "parameters", *used, "full parameters", "adapter parameters")
    table.title = f"By component ({plan.topology})"
    for component in dict.fromkeys(m.component for m in plan.modules):
        members = [m for m in plan.modules if m.component == component]
        full = sum(m.params for m in members if m.trains_weight)
        counts = [str(sum(m.treatment == t for m in members)) for t in used]
        size, beside = sum(m.params for m in members), sum(m.adapter_params for m in members)
        table.add_row(
            component, str(len(members)), f"{size:,}", *counts, f"{full:,} ({full / size:.1%})", f"{beside:,}"
        )
    for note, count in Counter(m.note for m in plan.modules if m.note).most_common(4):
        table.caption = f"{table.caption or ''}{count} x {note}\n"
    return table


def rounding_table(rounding: Mapping[str, Mapping[str, Any]], top: int = 8) -> Table:
    """What the cast to the base model's types did to a merged policy, by tensor."""
    table = Table(title="Rounding to the base model's types")
    table.add_column("tensor", overflow="fold")
    for header in ("type", "max error", "mean error", "change", "undone"):
        table.add_column(header, justify="right")
    for name, r in sorted(rounding.items(), key=lambda item: -item[1]["max_error"])[:top]:
        numbers = (f"{r[key]:.2g}" for key in ("max_error", "mean_error", "mean_change"))
        table.add_row(escape(name), r["dtype"], *numbers, f"{r['undone']:.1%}")
    table.caption = (
        f"the largest of {len(rounding)}; change: mean by training; undone: share of the changed elements that "
        "rounding takes back to the base model's value"
    )
    return table


def difference_table(difference: PlanDifference, other: str, top: int = 12) -> Table:
    """What changed from another plan."""
    table = Table("module", "there", "here", title=f"Compared with {other}")
    for row in difference.moved[:top]:
        table.add_row(*row)
    left = len(difference.moved) - top
    correlation = difference.rank_correlation
    table.caption = (
        f"{f'and {left} more; ' if left > 0 else ''}{len(difference.moved)} modules treated otherwise; weight trained "
        f"in both: {difference.same_full} ({difference.full_overlap:.0%} of those trained in either); rank correlation "
        f"of the scores: {'-' if correlation is None else f'{correlation:.2f}'}"
    )
    return table


def draft_tables(
    config: Config, anatomy: Anatomy, candidates: Sequence[Weight], plans: Mapping[str, AdaptationPlan], kinds: int
) -> list[Table]:
    """What a ranking would be of and what training under each of `plans` would take, from shapes alone; `kinds` of view
    are kept while ranking."""
    overview = Table("component", "candidates", "parameters", title=f"Candidates ({anatomy.topology})")
    for component in dict.fromkeys(w.component for w in candidates):
        members = [w for w in candidates if w.component == component]
        overview.add_row(component, str(len(members)), f"{sum(w.params for w in members):,}")
    total, ratio = sum(w.params for w in candidates), config.plan.budget.ratio
    whole = sum(w.params for w in anatomy.weights)
    size = ITEM_SIZE[config.model.dtype] * whole
    sketches = FP32 * sketch_floats(candidates, kinds, config.plan.score_rank)
    overview.caption = (
        f"{len(candidates)} matrices, {total:,} of the model's {whole:,} parameters; a budget of {ratio:.0%} is "
        f"{ratio * total:,.0f} parameters, or {int(ratio * len(candidates))} matrices; ranking by {config.plan.score} "
        f"keeps {_gib(sketches)} of sketches ({sketches / size:.1%} of the model's bytes)"
    )
    parts = {"weights": "weights", "gradients": "gradients", "masters": "fp32 masters", "moments": "Adam moments"}
    if config.algo.needs_reference:
        parts["originals"] = "base policy for the KL"
    memory = Table("", "everything full", *plans)
    memory.title = f"Memory of training, all ranks together ({config.model.dtype})"
    counts = [(whole, whole, whole)]
    counts += [(p.totals["trainable_params"], p.weight_params, p.sent_params) for p in plans.values()]
    dtype, keeps = config.model.dtype, config.algo.needs_reference
    sides = [training_memory(anatomy, n, dtype, reference=k if keeps else 0, sent=s) for n, k, s in counts]
    memory.add_row("trained parameters", *(f"{n:,}" for n, _, _ in counts))
    for part, label in {**parts, "total": "total", "payload": "complete weight update"}.items():
        memory.add_row(label, *(_gib(getattr(side, part)) for side in sides))
    memory.caption = (
        "activations, logits and the rollout engines apart; the hybrids with the largest matrices full, an upper bound"
    )
    return [overview, memory]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def draw_plan(plan: AdaptationPlan, path: Path) -> None:
    """Heat map of the plan: layer by module kind, coloured by score; where the weight is trained, outlined."""
    figure, axes = plt.subplots(figsize=(2.2 + 0.62 * len(_kinds(plan)), 2.4 + min(0.42 * _layers(plan), 9.0)))
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


def evaluation_table(
    scores: Mapping[str, float], ranks: Mapping[int, Mapping[str, float]], areas: Mapping[str, float], problems: int
) -> Table:
    """Held-out scores of a policy, of its `ranks`, and by data set; `areas`: AURAC by form."""
    sets = dict.fromkeys(name.rpartition("/accuracy")[0] for name in scores if name.endswith("/accuracy"))
    columns = {"as trained" if ranks else "mean of sets" if sets else "policy": scores}
    columns |= {f"rank {k}": found for k, found in ranks.items()}
    for each in sets:
        columns[each] = {n.removeprefix(f"{each}/"): value for n, value in scores.items() if n.startswith(f"{each}/")}
    names = {"accuracy": "accuracy", "mean_at_k": "mean@k", "maj_at_k": "maj@k"}
    names |= {name: name.replace("_at_", "@") for name in scores if name.startswith("pass_at_") and name != "pass_at_1"}
    names |= {name: name for name in ("answered", "stopped", "truncated", "unscored")}
    table = Table("", *columns, title=f"Held out: {problems} problems")
    for name, label in names.items():
        if name in scores:
            table.add_row(label, *(_cell(found, name) for found in columns.values()))
    if areas:
        table.caption = (
            f"AURAC {areas['linear']:.3f} over ranks, {areas['log2']:.3f} over doublings. A rank is its adapter alone; "
            "matryoshka.loss=sum trains their sum, and none of them alone"
        )
    return table


def _cell(scores: Mapping[str, float], name: str) -> str:
    """A score with its interval, if it has one."""
    if name not in scores:
        return "-"
    if name == "unscored":
        return f"{scores[name]:.0f}"
    low, high = scores.get(f"ci/{name}_low"), scores.get(f"ci/{name}_high")
    return f"{scores[name]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


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
    modules = [m for m in _plotted(plan) if m.name in shares]
    if not modules:
        return
    names = sorted(
        {name for m in modules for name in shares[m.name]}, key=lambda name: (name != "weight", len(name), name)
    )
    kinds = [kind for kind in _kinds(plan) if any(_kind(m) == kind for m in modules)]
    figure, panels = plt.subplots(1, len(names), figsize=(1.5 + 4.2 * len(names), 4.4), sharey=True, squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        grid = [[float("nan")] * len(kinds) for _ in range(_layers(plan))]
        for m in modules:
            grid[m.layer or 0][kinds.index(_kind(m))] = shares[m.name].get(name, float("nan"))
        axes.set_facecolor("#eceff1")
        image = axes.imshow(grid, aspect="auto", cmap="Blues", origin="lower", vmin=0, vmax=1)
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
        axes.set(title=name.replace("expert_", "LoRA expert "))
    panels[0][0].set(ylabel="layer")
    figure.colorbar(image, ax=panels[0].tolist(), label=f"share of the updates of {steps} steps")
    figure.savefig(run.routing_image, dpi=120, bbox_inches="tight")
    plt.close(figure)


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


def _plot_plan(axes: Axes, plan: AdaptationPlan) -> None:
    """Scores are coloured by rank: their values span orders of magnitude."""
    kinds, modules = _kinds(plan), _plotted(plan)
    scores = sorted({m.score for m in modules if m.score is not None})
    place = {score: i / max(1, len(scores) - 1) for i, score in enumerate(scores)}
    grid = [[float("nan")] * len(kinds) for _ in range(_layers(plan))]
    for m in modules:
        grid[m.layer or 0][kinds.index(_kind(m))] = place[m.score] if m.score is not None else 0.0
    axes.set_facecolor("#eceff1")  # where a layer has no such module
    axes.imshow(grid, aspect="auto", cmap="Blues", origin="lower", vmin=0, vmax=1)
    for m in modules:
        if m.trains_weight:
            corner = (kinds.index(_kind(m)) - 0.46, (m.layer or 0) - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#d1495b", linewidth=2.0))
        if m.treatment == "frozen":
            axes.text(kinds.index(_kind(m)), m.layer or 0, "x", ha="center", va="center", color="#667077", fontsize=7)
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    frozen = ", frozen (x)" if any(m.treatment == "frozen" for m in modules) else ""
    axes.set(ylabel="layer", title=f"Plan: rank of score (blue), weight trained (outlined){frozen}")


def _plotted(plan: AdaptationPlan) -> list[PlannedModule]:
    """The modules that have a place in a layer."""
    return [m for m in plan.modules if m.layer is not None]


def _kind(module: PlannedModule) -> str:
    """The name within the layer, as short as tells what it is: `self_attn.q_proj`."""
    _, _, inside = module.name.partition(f".{module.layer}.")
    parts = inside.split(".")
    shown = (
        2 if not parts[-1].isdigit() else 1 + next(i for i, part in enumerate(reversed(parts)) if not part.isdigit())
    )
    return ".".join(parts[-shown:])


def _kinds(plan: AdaptationPlan) -> list[str]:
    order = {component: i for i, component in enumerate(COMPONENTS)}
    modules = sorted(_plotted(plan), key=lambda m: (order.get(m.component, 99), m.layer or 0, m.name))
    return list(dict.fromkeys(_kind(m) for m in modules))


def _layers(plan: AdaptationPlan) -> int:
    return 1 + max((m.layer or 0 for m in _plotted(plan)), default=0)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
