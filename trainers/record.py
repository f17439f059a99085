"""What is kept of a step: metrics, rollouts, evaluation, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from hybrid_rl.checkpoint import TrainerState, save_checkpoint
from hybrid_rl.config import Config
from hybrid_rl.evaluate import evaluate
from hybrid_rl.learner.assemble import Assembled, reward_metrics
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.screen import RunScreen
from hybrid_rl.step_clock import StepClock
from hybrid_rl.tracking import MetricsLog
from hybrid_rl.types import StepStats
from trainers.setup import Synced, Task, Workplace
from trainers.step import Rollouts, staleness_metrics

logger = logging.getLogger(__name__)


class Recorder:
    """Writes down each finished step; `last_eval` is the latest held-out evaluation."""

    def __init__(
        self,
        config: Config,
        task: Task,
        workplace: Workplace,
        plan: AdaptationPlan,
        run: RunDirectory,
        screen: RunScreen,
        done: TrainerState,
        started: float,
    ) -> None:
        """`done`: where the run stood at `started` (`time.perf_counter`)."""
        self._config, self._task, self._workplace, self._plan = config, task, workplace, plan
        self._run, self._screen, self._log = run, screen, MetricsLog(run, config, last=done.row)
        self._done, self._before = done, done.wall_seconds - started
        self._faults: Mapping[str, int] = {}
        self._ranks = done.row.get("adalora/budget", sum(m.rank or 0 for m in plan.named("adalora")))
        """That AdaLoRA's schedule has left after the latest update."""
        self.last_eval: Mapping[str, float] = done.last_eval

    def write(
        self,
        step: int,
        clock: StepClock,
        rollouts: Rollouts,
        data: Assembled,
        stats: StepStats,
        synced: Synced,
        position: int,
        metrics: Mapping[str, float],
    ) -> None:
        """Evaluate, save and log as the settings say. `position`: prompts used so far; `metrics`: further ones."""
        config, workplace, run = self._config, self._workplace, self._run
        row = {"step": step, **reward_metrics(rollouts.groups, data), **stats.metrics, **metrics}
        row |= {"sync/bytes": synced.update.bytes, "sync/full_model_bytes": self._task.model_bytes}
        row |= {"sync/anchor": float(synced.update.base_version is None), "sync/version": synced.update.version}
        row["sync/verified_engines"] = synced.verified
        row["sync/merged_engines"] = workplace.pool.merged_engines
        row |= staleness_metrics(rollouts.groups, step - 1)
        row |= {f"faults/reward_{kind}": count for kind, count in rollouts.faults.items()}
        row["reward/resampled_groups"] = rollouts.resampled
        faults = self._pool_faults()
        row |= {name: count - self._faults.get(name, 0) for name, count in faults.items()}
        self._faults = faults
        run.write_rollouts(step, rollouts.groups, data.advantages)
        if stats.stepped:
            run.write_routing(step, stats.applied, stats.stepped)
        self._ranks = stats.metrics.get("adalora/budget", self._ranks)
        if step == config.steps:
            self._warn_of_ranks()
        if step == config.steps or (config.eval.every and step % config.eval.every == 0):
            with clock.time("eval"):
                self.last_eval = evaluate(workplace.answers, self._task.eval, config).metrics
            row |= self.last_eval
        if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
            with clock.time("checkpoint"):
                state = TrainerState(
                    step,
                    position,
                    self._plan.hash,
                    config.learner.zero_stage,
                    config.learner.world_size,
                    self.wall_seconds,
                    self.last_eval,
                    row | clock.row(),
                    self._done.base,
                    self._done.started_from,
                )
                save_checkpoint(run.checkpoints, state, workplace.learner.save, keep_last=config.checkpoint.keep_last)
        row |= clock.row()
        self._log.write(row, {"policy/advantages": [a for group in data.advantages for a in group]})
        self._screen.show_step(row)

    def _warn_of_ranks(self) -> None:
        wanted = sum(m.options["target"] for m in self._plan.named("adalora"))
        if self._ranks > wanted:
            logger.warning(
                "the run ends with %d ranks in its adalora modules, above the %d that are asked for: updates that were "
                "skipped (faults/skipped_updates), and steps that trained on nothing, advance no phase of adalora",
                self._ranks,
                wanted,
            )

    @property
    def wall_seconds(self) -> float:
        """Spent on the run so far, over all its resumptions."""
        return self._before + time.perf_counter()

    def close(self) -> None:
        self._log.close()

    def _pool_faults(self) -> dict[str, int]:
        pool, episodes = self._workplace.pool, self._workplace.episodes
        faults = {"engine_restarts": pool.restarts, "engine_backups": pool.backups, **episodes.faults}
        return {"sync/repaired_engines": pool.repairs} | {f"faults/{name}": n for name, n in faults.items()}
