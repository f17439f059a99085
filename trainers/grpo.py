"""GRPO with an adaptation plan: prompts -> completions -> rewards -> advantages -> learner -> weight sync."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

from hybrid_rl.checkpoint import TrainerState, recover
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.data import PromptSource
from hybrid_rl.drawings import draw_curve, draw_routing
from hybrid_rl.evaluate import evaluate
from hybrid_rl.learner.assemble import assemble, lr_scales, mini_batches
from hybrid_rl.learner.measures import NO_UPDATE
from hybrid_rl.logs import log_to
from hybrid_rl.redaction import scrub_files
from hybrid_rl.report import write_report
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.screen import RunScreen
from hybrid_rl.step_clock import StepClock
from trainers.async_grpo import Overlapped
from trainers.begin import begin
from trainers.gate import Gate
from trainers.preflight import check_surroundings
from trainers.record import Recorder
from trainers.resume import Resumption, can_resume, check_shared, find_resumption, restore, standing
from trainers.setup import Task, Workplace, check_task, open_workplace
from trainers.step import InTurn, RolloutSource, SkipGuard
from trainers.stopping import Stopped, StopSignal

logger = logging.getLogger(__name__)


def train(config: Config, *, name: str, resume: bool | Literal["auto"] = False) -> RunDirectory:
    """Run the whole job; `name` is the configuration's. Raises `ConfigError` before any worker starts where it can,
    `Stopped` when it is asked to end.

    `resume`: go on with the run in `run.dir`; `auto`: if it has a checkpoint, else begin, or begin again.
    """
    with ExitStack() as held:
        if resume and config.run.dir is not None and (there := RunDirectory(Path(config.run.dir))).path.is_dir():
            held.enter_context(there.alone())
            if there.logs.is_dir():
                log_to(there.logs)
            recover(there.checkpoints)
        task, resumption = check_run(config, resume)
        run = resumption.run if resumption else RunDirectory.create(config, name, again=resume == "auto")
        held.enter_context(run.alone())
        if resumption is None:
            run.begin(config, again=resume == "auto")
        log_to(run.logs)
        run.write_machine()
        logger.info("process %d trains in %s", os.getpid(), run.path)
        try:
            with StopSignal() as stop:
                _run(config, task, run, resumption, stop)
        except Stopped:
            logger.info("stopped by SIGTERM %s", standing(run))
            raise Stopped(standing(run)) from None
        except KeyboardInterrupt:
            logger.info("interrupted %s", standing(run))
            raise KeyboardInterrupt(standing(run)) from None
        except ConfigError:
            run.discard()
            raise
        finally:
            scrub_files(run.logs)
        return run


def check_run(config: Config, resume: bool | Literal["auto"]) -> tuple[Task, Resumption | None]:
    """Everything that needs no worker. A run that is resumed has its own plan, wherever it once came from."""
    if not resume and config.run.dir is not None:
        RunDirectory(Path(config.run.dir)).check_free()
    resumption = find_resumption(config) if resume is True or (resume and can_resume(config)) else None
    task = check_task(config, resumption and resumption.plan)
    check_surroundings(config, task)
    return task, resumption


def _run(config: Config, task: Task, run: RunDirectory, resumption: Resumption | None, stop: StopSignal) -> None:
    with RunScreen(config, task.too_long) as screen, open_workplace(config, task) as workplace:
        started = time.perf_counter()
        check_shared(run, workplace.learner)
        if resumption is None:
            plan, done = begin(config, task, run, workplace, screen)
        else:
            plan, done = resumption.plan, restore(resumption, config, task, workplace)
            run.change_settings(config)
            screen.show_plan(plan)
        gate = Gate(config, workplace, task.held_out)
        gate.check(done.step)
        if resumption is None:
            found = evaluate(workplace.answers, task.eval, config)
            run.write_evaluation(0, found.problems)
            run.write_summary({**run.read_summary(), "eval_before": found.metrics})
        before = run.read_summary()["eval_before"]
        screen.show_start(done.step, done.last_eval or before, done.evaluated)
        prompts = PromptSource(task.train, config.seed, done.prompts_drawn)
        source: RolloutSource = InTurn(config, workplace, prompts)
        if config.asynchrony.max_staleness:
            waiting = resumption.waiting if resumption else {}
            source = Overlapped(config, workplace, prompts, config.steps - done.step, waiting)
        skipped = int(done.row.get("faults/skipped_in_a_row", 0))
        guard = SkipGuard(run, config.learner.max_skipped_updates, skipped)
        recorder = Recorder(config, task, workplace, plan, run, screen, done, started, resumption, stop)
        with closing(source), recorder:
            try:
                _loop(config, workplace, source, gate, recorder, guard, done, stop)
            except Stopped:
                recorder.leave(source.waiting())
                raise
        after = recorder.last_eval
        summary = {"eval_after": after, "steps": config.steps, "wall_seconds": recorder.wall_seconds}
        run.write_summary({**run.read_summary(), **summary})
        draw_curve(run, plan, before)
        draw_routing(run, plan)
        write_report(run.path)
        screen.show_result(run, before, after)


def _loop(
    config: Config,
    workplace: Workplace,
    source: RolloutSource,
    gate: Gate,
    recorder: Recorder,
    guard: SkipGuard,
    done: TrainerState,
    stop: StopSignal,
) -> None:
    """Train from the step after `done` to the last."""
    for step in range(done.step + 1, config.steps + 1):
        clock = StepClock()
        scale = lr_scales(step, config)

        rollouts = source.next(step, clock)
        with stop.held():
            recorder.poll()
            data = assemble(rollouts.groups, config, rollouts.divergences, step=step)
            batch = mini_batches(data.sequences, config, scale, step)
            stats = NO_UPDATE
            if batch.mini_batches:
                with workplace.learning():
                    training = workplace.learner.begin_train(workplace.cluster.share(batch))
                    source.during(training)
                    stats = training.result()
                guard.see(step, batch, stats.metrics)
            clock.add(stats.seconds)
            with clock.time("sync"):
                synced = workplace.sync(step, config.asynchrony.in_flight)
                source.synced()
            with clock.time("gate"):
                metrics = gate.check(step)

            metrics["faults/skipped_in_a_row"] = guard.in_a_row
            metrics |= {"lr/full": config.full.lr * scale["full"], "lr/lora": config.lora_lr * scale["lora"]}
            recorder.write(step, clock, rollouts, data, stats, synced, source, metrics)
