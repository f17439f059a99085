"""Where a new run begins: its plan, and learner and engines brought to where training starts."""

from __future__ import annotations

import time

from hybrid_rl.checkpoint import TrainerState
from hybrid_rl.config import Config
from hybrid_rl.drawings import draw_plan
from hybrid_rl.export import provenance
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.screen import RunScreen
from trainers.ranking import make_plan
from trainers.setup import Task, Workplace


def begin(
    config: Config, task: Task, run: RunDirectory, workplace: Workplace, screen: RunScreen
) -> tuple[AdaptationPlan, TrainerState]:
    """Make the plan, and bring learner and engines to where training begins."""
    started = time.perf_counter()
    base = workplace.learner.base_digest()
    plan = make_plan(config, task, workplace, screen.show_ranking)
    run.write_summary({"ranking_seconds": time.perf_counter() - started, "plan_hash": plan.hash})
    plan.save(run.plan)
    draw_plan(plan, run.plan_image)
    screen.show_plan(plan)
    workplace.learner.build(plan, task.start)
    workplace.sync(0)
    return plan, TrainerState(0, 0, plan.hash, base=base, started_from=provenance(config))
