"""GRPO with an adaptation plan: prompts -> completions -> rewards -> advantages -> learner -> weight sync."""

from __future__ import annotations

import time
from contextlib import closing

from hybrid_rl.checkpoint import LEARNER, TrainerState, checkpoints, load_state
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.data import PromptSource
from hybrid_rl.drawings import draw_curve, draw_plan, draw_routing
from hybrid_rl.evaluate import evaluate
from hybrid_rl.export import provenance
from hybrid_rl.learner.assemble import assemble, lr_scales, mini_batches
from hybrid_rl.learner.measures import NO_UPDATE
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.screen import RunScreen
from hybrid_rl.step_clock import StepClock
from trainers.async_grpo import Overlapped
from trainers.gate import Gate
from trainers.ranking import make_plan
from trainers.record import Recorder
from trainers.setup import Task, Workplace, check_task, open_workplace
from trainers.step import InTurn, RolloutSource, SkipGuard


def train(config: Config, *, name: str, resume: bool = False) -> RunDirectory:
    """Run the whole job; `name` is the configuration's. Raises `ConfigError` before any worker starts where it can."""
    task = check_run(config, resume)
    run = RunDirectory.open(config) if resume else RunDirectory.create(config, name)
    try:
        _run(config, task, run, resume)
    except ConfigError:
        run.discard()
        raise
    return run


def check_run(config: Config, resume: bool) -> Task:
    """Everything that needs no worker. A run that is resumed has its own plan, wherever it once came from."""
    return check_task(config, AdaptationPlan.load(RunDirectory.open(config).plan, "run.dir's plan") if resume else None)


def _run(config: Config, task: Task, run: RunDirectory, resume: bool) -> None:
    with RunScreen(config, task.too_long) as screen, open_workplace(config, task) as workplace:
        started = time.perf_counter()
        base = workplace.learner.base_digest()
        plan = AdaptationPlan.load(run.plan) if resume else make_plan(config, task, workplace, screen.show_ranking)
        ranking = run.read_summary()["ranking_seconds"] if resume else time.perf_counter() - started
        if not resume:
            plan.save(run.plan)
            draw_plan(plan, run.plan_image)
        screen.show_plan(plan)
        workplace.learner.build(plan, task.start)
        if resume:
            done = _restore(run, plan, base, config, workplace)
        else:
            done = TrainerState(0, 0, plan.hash, 0, 0, base=base, started_from=provenance(config))
        workplace.sync(done.step)
        gate = Gate(config, workplace, task.held_out)
        gate.check(done.step)
        if resume:
            before = run.read_summary()["eval_before"]
        else:
            before = evaluate(workplace.answers, task.eval, config).metrics
            run.write_summary({"eval_before": before, "ranking_seconds": ranking, "plan_hash": plan.hash})
        evaluated = done.step // config.eval.every * config.eval.every if done.last_eval and config.eval.every else 0
        screen.show_start(done.step, done.last_eval or before, evaluated)
        prompts = PromptSource(task.train, config.seed, done.prompts_drawn)
        source: RolloutSource = InTurn(config, workplace, prompts)
        if config.asynchrony.max_staleness:
            source = Overlapped(config, workplace, prompts, config.steps - done.step)
        recorder = Recorder(config, task, workplace, plan, run, screen, done, started)
        with closing(source), closing(recorder):
            _loop(config, workplace, source, gate, recorder, SkipGuard(run, config.learner.max_skipped_updates), done)
        after = recorder.last_eval
        summary = {"eval_before": before, "eval_after": after, "steps": config.steps, "ranking_seconds": ranking}
        run.write_summary({**summary, "wall_seconds": recorder.wall_seconds, "plan_hash": plan.hash})
        draw_curve(run, plan, before)
        draw_routing(run, plan)
        screen.show_result(run, before, after)


def _loop(
    config: Config,
    workplace: Workplace,
    source: RolloutSource,
    gate: Gate,
    recorder: Recorder,
    guard: SkipGuard,
    done: TrainerState,
) -> None:
    """Train from the step after `done` to the last."""
    for step in range(done.step + 1, config.steps + 1):
        clock = StepClock()
        scale = lr_scales(step, config)

        rollouts = source.next(step, clock)
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

        metrics |= {"lr/full": config.full.lr * scale["full"], "lr/lora": config.lora_lr * scale["lora"]}
        recorder.write(step, clock, rollouts, data, stats, synced, source.position, metrics)


def _restore(run: RunDirectory, plan: AdaptationPlan, base: str, config: Config, workplace: Workplace) -> TrainerState:
    saved = checkpoints(run.checkpoints)
    if not saved:
        raise ConfigError(f"{run.path} has no finished checkpoint to resume from; start the run anew")
    state = load_state(saved[-1])
    if state.plan_hash != plan.hash:
        raise ConfigError(f"{run.plan} was changed since {saved[-1].name} was saved; restore it or start a new run")
    if state.base not in ("", base):
        raise ConfigError(
            f"model.path={config.model.path!r} is not the base model that {run.path} was started with: its weights "
            "differ; resume with that one"
        )
    if (state.zero_stage, state.world_size) != (config.learner.zero_stage, config.learner.world_size):
        raise ConfigError(
            f"{saved[-1].name} was saved with learner.zero_stage={state.zero_stage}, learner.world_size="
            f"{state.world_size}; resume with the same"
        )
    workplace.learner.load(str(saved[-1].resolve() / LEARNER))
    return state
