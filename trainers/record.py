"""What is kept of a step: metrics, rollouts, evaluation, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from hybrid_rl.checkpoint import Checkpoints, TrainerState, Waiting
from hybrid_rl.config import Config
from hybrid_rl.evaluate import evaluate, is_due
from hybrid_rl.learner.assemble import Assembled, reward_metrics
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.screen import RunScreen
from hybrid_rl.step_clock import StepClock
from hybrid_rl.tracking import MetricsLog
from hybrid_rl.types import StepStats
from trainers.resume import Resumption, learner_layout
from trainers.setup import Synced, Task, Workplace
from trainers.step import Rollouts, RolloutSource, staleness_metrics
from trainers.stopping import StopSignal

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
        resumption: Resumption | None,
        stop: StopSignal,
    ) -> None:
        """`done`: where the run stood at `started` (`time.perf_counter`), as `resumption` has it."""
        self._config, self._task, self._workplace, self._plan = config, task, workplace, plan
        self._run, self._screen, self._log = run, screen, MetricsLog(run, config, last=done.row)
        self._done, self._before = done, done.wall_seconds - started
        self._checkpoints = Checkpoints(run.checkpoints, config.checkpoint, workplace.learner)
        self._checkpoints.last = done.step if resumption else None
        self._damaged, self._unwritten = resumption.damaged if resumption else 0, 0
        self._stop = stop
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
        source: RolloutSource,
        metrics: Mapping[str, float],
    ) -> None:
        """Evaluate, save and log as the settings say. `metrics`: further ones."""
        config, workplace, run = self._config, self._workplace, self._run
        row = {"step": step, **reward_metrics(rollouts.groups, data), **stats.metrics, **metrics}
        row |= {"sync/bytes": synced.update.bytes, "sync/full_model_bytes": self._task.model_bytes}
        row |= {"sync/anchor": float(synced.update.base_version is None), "sync/version": synced.update.version}
        row["sync/verified_engines"] = synced.verified
        row["sync/merged_engines"] = workplace.pool.merged_engines
        row |= staleness_metrics(rollouts.groups, step - 1)
        row |= {f"faults/reward_{kind}": count for kind, count in rollouts.faults.items()}
        row["reward/resampled_groups"] = rollouts.resampled
        row["faults/damaged_checkpoints"], self._damaged = self._damaged, 0
        self._keep(run.rollouts_of(step), lambda: run.write_rollouts(step, rollouts.groups, data.advantages))
        if stats.stepped:
            self._keep(run.routing, lambda: run.write_routing(step, stats.applied, stats.stepped))
        self._ranks = stats.metrics.get("adalora/budget", self._ranks)
        if step == config.steps:
            self._warn_of_ranks()
        faults = self._faults_so_far()
        row |= {name: count - self._faults.get(name, 0) for name, count in faults.items()} | self._log.faults()
        self._faults = faults
        # From here on the step can be saved; what is still to be evaluated, a resumed run evaluates.
        self._done = replace(
            self._done,
            step=step,
            prompts_drawn=source.position,
            wall_seconds=self.wall_seconds,
            row=row | clock.row(),
            layout=learner_layout(config),
        )
        if is_due(step, config):
            with clock.time("eval"), self._stop.released():
                found = evaluate(workplace.answers, self._task.eval, config)
            self._keep(run.evaluation_of(step), lambda: run.write_evaluation(step, found.problems))
            self.last_eval = found.metrics
            row |= self.last_eval
            self._done = replace(self._done, row=row | clock.row(), last_eval=self.last_eval, evaluated=step)
        with clock.time("checkpoint"):
            if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self._checkpoints.begin(self._done, self._plan, source.waiting())
        row |= clock.row()
        alerts = self._log.write(row, {"policy/advantages": [a for group in data.advantages for a in group]})
        self._screen.show_step(row, alerts)
        if step == config.steps:
            self._finish()

    def poll(self) -> None:
        """Give the checkpoint that is being written its name, if all of it is there."""
        self._checkpoints.poll()

    def leave(self, waiting: Waiting) -> None:
        """Save the last finished step, unless it is."""
        if not self._done.row:
            return
        self._checkpoints.finish()
        if self._checkpoints.last != self._done.step:
            self._checkpoints.begin(self._done, self._plan, waiting)
        self._finish()

    def _finish(self) -> None:
        self._checkpoints.finish()
        if self._checkpoints.last != self._done.step:
            raise RuntimeError(
                f"step {self._done.step} could not be saved under {self._run.checkpoints}; make room, and go on from "
                "the checkpoint before with --resume"
            )

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

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(Exception):  # what was begun to be saved is worth a try; the error says more
                self._checkpoints.finish()
        self._log.close()

    def _keep(self, path: Path, write: Callable[[], None]) -> None:
        """Write a file that training can do without."""
        try:
            write()
        except OSError as error:
            self._unwritten += 1
            logger.error("%s could not be written: %s; training goes on", path, error)

    def _faults_so_far(self) -> dict[str, int]:
        pool, episodes = self._workplace.pool, self._workplace.episodes
        faults = {"engine_restarts": pool.restarts, "engine_backups": pool.backups, **episodes.faults}
        faults |= {"failed_checkpoints": self._checkpoints.failed}
        faults |= {"unwritten_files": self._unwritten + self._log.unwritten}
        return {"sync/repaired_engines": pool.repairs} | {f"faults/{name}": n for name, n in faults.items()}
