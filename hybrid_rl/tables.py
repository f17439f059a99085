"""Tables for the terminal: plans, their totals and differences, candidates, rounding, held-out scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from hybrid_rl.components import Anatomy, Weight
from hybrid_rl.config import Config
from hybrid_rl.estimate import FP32, GIB, ITEM_SIZE, MIB
from hybrid_rl.plan import AdaptationPlan, by, treatment_label
from hybrid_rl.plan_difference import PlanDifference
from hybrid_rl.scoring import sketch_floats
from hybrid_rl.treatments import TREATMENTS


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


def candidates_table(config: Config, anatomy: Anatomy, candidates: Sequence[Weight], kinds: int) -> Table:
    """What a ranking would be of; `kinds` of view are kept meanwhile."""
    table = Table("component", "candidates", "parameters", title=f"Candidates ({anatomy.topology})")
    for component in dict.fromkeys(w.component for w in candidates):
        members = [w for w in candidates if w.component == component]
        table.add_row(component, str(len(members)), f"{sum(w.params for w in members):,}")
    total, ratio = sum(w.params for w in candidates), config.plan.budget.ratio
    whole = sum(w.params for w in anatomy.weights)
    size = ITEM_SIZE[config.model.dtype] * whole
    sketches = FP32 * sketch_floats(candidates, kinds, config.plan.score_rank)
    table.caption = (
        f"{len(candidates)} matrices, {total:,} of the model's {whole:,} parameters; a budget of {ratio:.0%} is "
        f"{ratio * total:,.0f} parameters, or {int(ratio * len(candidates))} matrices; ranking by {config.plan.score} "
        f"keeps {gib(sketches)} of sketches ({sketches / size:.1%} of the model's bytes)"
    )
    return table


def gib(size: float) -> str:
    """Bytes, for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 8 else f"{size / MIB:.2f} MiB"


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
