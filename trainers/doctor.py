"""`hybrid-rl doctor sync`: weight sync on its own, with the run's model, plan, engines and transport."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from trainers.gate import VARIANTS, Gate
from trainers.setup import Task, Workplace, check_task, open_workplace

SYNCS = 4
"""Updates sent: the base policy, then ones of a policy moved at random."""
SCALE = 0.01
"""Deviation of the moves, in a weight's unit."""


def doctor_sync(config: Config, console: Console) -> bool:
    """Send a few versions, check every receipt, and compare log-probabilities by part. Returns whether all is well.

    Nothing is ranked: without `plan.path`, the full part is the last of the candidates that fit the budget.
    """
    task = check_task(config)
    with console.status("starting learner and engines"), open_workplace(config, task) as workplace:
        plan = task.plan or _draft(config, task)
        workplace.learner.build(plan, task.start)
        table, well = _syncs(config, task, workplace)
        console.print(table)
        gate = Gate(config, workplace, task.held_out)
        found = gate.bisect(SYNCS - 1)
    console.print(_differences(found, gate.limit))
    alike = all(mean <= gate.limit for by_engine in found.values() for mean in by_engine.values())
    console.print("every engine computes what the learner computes" if alike else "[bold red]engines differ")
    if not well:
        console.print("[bold red]not every engine held what it was sent[/] (sync.verify must be on to know)")
    return alike and well


def _draft(config: Config, task: Task) -> AdaptationPlan:
    """A plan with both parts, where the settings have both."""
    order = {c.name: float(i) for i, c in enumerate(select_candidates(task.anatomy, config.plan))}
    return configured_plan(task.anatomy, config, order, {"score": "doctor"})


def _syncs(config: Config, task: Task, workplace: Workplace) -> tuple[Table, bool]:
    """What was sent, and whether every engine held it at once."""
    table = Table(
        "version", "kind", "bytes", "of the model", "seconds", "verified", title="Syncs", title_justify="left"
    )
    well = True
    for version in range(SYNCS):
        if version:
            workplace.learner.perturb(config.seed + version, SCALE)
        repairs, started = workplace.pool.repairs, time.perf_counter()
        synced = workplace.sync(version)
        seconds = time.perf_counter() - started
        update, repairs = synced.update, workplace.pool.repairs - repairs
        well &= not repairs and synced.verified == config.rollout.engines
        table.add_row(
            str(version),
            "anchor" if update.base_version is None else "delta",
            f"{update.bytes:,}",
            f"{update.bytes / task.model_bytes:.2%}",
            f"{seconds:.3f}",
            f"{synced.verified} of {config.rollout.engines}" + (f", {repairs} after repair" if repairs else ""),
        )
    return table, well


def _differences(found: dict[str, dict[int, float]], limit: float) -> Table:
    table = Table(
        "policy", *(f"engine {i}" for i in sorted(found[next(iter(VARIANTS))])), title_justify="left",
        title=f"Mean difference of log-probabilities, nats (limit {limit:g})",
    )  # fmt: skip
    for what, by_engine in found.items():
        cells = [f"{mean:.2g}" if mean <= limit else f"[red]{mean:.2g}" for _, mean in sorted(by_engine.items())]
        table.add_row(what, *cells)
    return table
