"""Where a run goes on: its latest whole checkpoint, checked against its plan, its settings and its base model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from hybrid_rl.checkpoint import LEARNER, PLAN, TrainerState, latest, latest_whole, load_state, load_waiting
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_difference import compare_plans
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.types import Completion
from trainers.setup import Workplace

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
        raise ConfigError(f"run.dir={str(run.path)!r} has no finished checkpoint to resume from; start the run anew")
    checkpoint, problems = found
    for problem in problems:
        logger.warning("%s; going back to %s", problem, checkpoint.name)
    state = load_state(checkpoint)
    if state.plan_hash != plan.hash:
        raise ConfigError(_plan_changed(run, plan, checkpoint))
    return Resumption(run, plan, checkpoint, state, load_waiting(checkpoint), len(problems))


def restore(resumption: Resumption, config: Config, workplace: Workplace) -> None:
    """Bring learner and engines to where the run stood."""
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
    learner.load(str(resumption.checkpoint.resolve() / LEARNER))
    workplace.sync(state.step)


def evaluated_at(state: TrainerState, config: Config) -> int:
    """The step of the latest held-out evaluation."""
    every = config.eval.every
    return state.step // every * every if state.last_eval and every else 0


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
