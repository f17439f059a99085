"""Where a run goes on: its latest whole checkpoint, checked against its plan, its settings and its base model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid_rl.checkpoint import PLAN, TrainerState, latest, latest_whole, load_state, load_waiting
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.evaluate import evaluate, is_due
from hybrid_rl.learner import LearnerGroup
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_difference import compare_plans
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.types import Completion
from trainers.setup import Task, Workplace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from."""

    run: RunDirectory
    plan: AdaptationPlan
    checkpoint: Path
    state: TrainerState
    waiting: dict[str, tuple[Completion, ...]]
    """Completions by prompt's id, that no step has trained on yet."""
    damaged: int
    """Later checkpoints that are left aside."""


def can_resume(config: Config) -> bool:
    """Whether `run.dir` has a finished checkpoint."""
    if config.run.dir is None:
        raise ConfigError("--auto-resume needs run.dir=DIRECTORY, the same each time")
    return latest(RunDirectory(Path(config.run.dir)).checkpoints) is not None


def find_resumption(config: Config) -> Resumption:
    """Raises `ConfigError` if `run.dir` holds no run to go on with, or one of other settings or of another plan."""
    run = RunDirectory.open(config)
    plan = AdaptationPlan.load(run.plan, "run.dir's plan")
    found = latest_whole(run.checkpoints)
    if found is None:
        raise ConfigError(
            f"run.dir={str(run.path)!r} has no finished checkpoint to resume from; begin again with --auto-resume"
        )
    checkpoint, problems = found
    for problem in problems:
        logger.warning("%s; going back to %s", problem, checkpoint.name)
    state = load_state(checkpoint)
    if state.plan_hash != plan.hash:
        raise ConfigError(_plan_changed(run, plan, checkpoint))
    given = Path(config.plan.path) if config.plan.path is not None else None
    if given is not None and given.is_file() and AdaptationPlan.load(given).hash != plan.hash:
        raise ConfigError(f"plan.path={config.plan.path!r} is not the plan that {run.path} is trained by; drop it")
    if plan.named("adalora") and run.steps != config.steps:
        raise ConfigError(
            f"steps={config.steps}: {run.path} has adalora modules, whose phases were laid out for {run.steps} steps; "
            "leave it at that"
        )
    return Resumption(run, plan, checkpoint, state, load_waiting(checkpoint), len(problems))


def restore(resumption: Resumption, config: Config, task: Task, workplace: Workplace) -> TrainerState:
    """Bring learner and engines to where the run stood; evaluate the policy there if the run was stopped before it came
    to that."""
    state, run, learner = resumption.state, resumption.run, workplace.learner
    if state.base not in ("", learner.base_digest()):
        raise ConfigError(
            f"model.path={config.model.path!r} is not the base model that {run.path} was started with: its weights "
            "differ; resume with that one"
        )
    layout = learner_layout(config)
    if state.layout != layout:
        logger.warning(
            "%s was saved by a learner of %s, and %s go on: sums over ranks are rounded otherwise, and random numbers "
            "begin anew in ranks that are new",
            *(resumption.checkpoint.name, state.layout, layout),
        )
    learner.build(resumption.plan)
    learner.load(str(resumption.checkpoint.resolve()))
    workplace.sync(state.step)
    if is_due(state.step, config) and "eval/accuracy" not in state.row:
        evaluated = evaluate(workplace.answers, task.eval, config)
        resumption.run.write_evaluation(state.step, evaluated.problems)
        found = evaluated.metrics
        state = replace(state, row={**state.row, **found}, last_eval=found, evaluated=state.step)
    return state


def check_shared(run: RunDirectory, learner: LearnerGroup) -> None:
    """Raises `ConfigError` if a rank could not save where the driver looks for it."""
    blind = learner.blind(str(run.config.resolve()))
    if blind:
        raise ConfigError(
            f"run.dir={str(run.path)!r} is not there for learner ranks {blind}, which are on other machines; put it on "
            "a file system that all of them share, where checkpoints are written"
        )


def standing(run: RunDirectory) -> str:
    """Where a run stands that was asked to end."""
    saved = latest(run.checkpoints)
    if saved is None:
        return "before anything was saved; --auto-resume begins again"
    return f"and {saved.name} is saved; --resume goes on"


def learner_layout(config: Config) -> str:
    """How many ranks share what."""
    return f"{config.learner.world_size} ranks with ZeRO-{config.learner.zero_stage}"


def _plan_changed(run: RunDirectory, plan: AdaptationPlan, checkpoint: Path) -> str:
    moved = compare_plans(AdaptationPlan.load(checkpoint / PLAN), plan).moved
    shown = "".join(f"\n  {name}: {before} -> {now}" for name, before, now in moved[:8])
    more = f"\n  and {len(moved) - 8} more" if len(moved) > 8 else ""
    return (
        f"{run.plan} was changed since {checkpoint.name} was saved; copy {checkpoint / PLAN} back, or start a new run "
        f"with plan.path:{shown}{more}"
    )
