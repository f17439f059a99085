"""GRPO with an adaptation plan: prompts -> completions -> rewards -> advantages -> learner -> weight sync."""

from __future__ import annotations

import time
from collections.abc import Mapping

from hybrid_rl.checkpoint import LEARNER, TrainerState, checkpoints, load_state, save_checkpoint
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.data import PromptSource
from hybrid_rl.evaluate import evaluate
from hybrid_rl.learner.assemble import assemble, lr_scales, mini_batches, reward_metrics
from hybrid_rl.learner.measures import NO_UPDATE
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.report import RunScreen, draw_curve, draw_plan
from hybrid_rl.tracking import MetricsLog, RunDirectory, StepClock
from trainers.ranking import make_plan
from trainers.setup import Task, Workplace, check_task, open_workplace
from trainers.step import SkipGuard, sample


def train(config: Config, *, name: str, resume: bool = False) -> RunDirectory:
    """Run the whole job; `name` is the configuration's. Raises `ConfigError` before any worker starts where it can."""
    task = check_task(config)
    run = RunDirectory.open(config) if resume else RunDirectory.create(config, name)
    try:
        _run(config, task, run, resume)
    except ConfigError:
        run.discard()
        raise
    return run


def _run(config: Config, task: Task, run: RunDirectory, resume: bool) -> None:
    with RunScreen(config, task.too_long) as screen, open_workplace(config, task) as workplace:
        started = time.perf_counter()
        plan = AdaptationPlan.load(run.plan) if resume else make_plan(config, task, workplace, screen.show_ranking)
        ranking = run.read_summary()["ranking_seconds"] if resume else time.perf_counter() - started
        if not resume:
            plan.save(run.plan)
            draw_plan(plan, run.plan_image)
        screen.show_plan(plan)
        workplace.learner.build(plan)
        done = _restore(run, plan, config, workplace) if resume else TrainerState(0, 0, plan.hash, 0, 0)
        workplace.sync(done.step)
        if resume:
            before = run.read_summary()["eval_before"]
        else:
            before = evaluate(workplace.pool, workplace.rewards, task.eval, config)
            run.write_summary({"eval_before": before, "ranking_seconds": ranking, "plan_hash": plan.hash})
        screen.show_start(done.step, done.last_eval or before)
        log = MetricsLog(run, config, last=done.row)
        try:
            after = _loop(config, task, workplace, plan, run, log, screen, done, started)
        finally:
            log.close()
        run.write_summary(
            {
                "eval_before": before,
                "eval_after": after,
                "steps": config.steps,
                "ranking_seconds": ranking,
                "wall_seconds": done.wall_seconds + time.perf_counter() - started,
                "plan_hash": plan.hash,
            }
        )
        draw_curve(run, plan, before)
        screen.show_result(run, before, after)


def _loop(
    config: Config,
    task: Task,
    workplace: Workplace,
    plan: AdaptationPlan,
    run: RunDirectory,
    log: MetricsLog,
    screen: RunScreen,
    done: TrainerState,
    started: float,
) -> Mapping[str, float]:
    """Train from the step after `done` to the last. Returns the last evaluation."""
    pool, learner, rewards = workplace.pool, workplace.learner, workplace.rewards
    prompts = PromptSource(task.train, config.seed, done.prompts_drawn)
    guard = SkipGuard(run, config.learner.max_skipped_updates)
    last_eval, restarts = done.last_eval, 0
    for step in range(done.step + 1, config.steps + 1):
        clock = StepClock()
        scale = lr_scales(step, config)

        rollouts = sample(config, workplace, prompts, clock)
        data = assemble(rollouts.groups, config, rollouts.divergences)
        batch = mini_batches(data.sequences, config, scale)
        stats = NO_UPDATE
        if batch.mini_batches:
            stats = learner.train(workplace.cluster.share(batch))
            guard.see(step, batch, stats.metrics)
        clock.add(stats.seconds)
        with clock.time("sync"):
            update, verified = workplace.sync(step)

        row = {"step": step, **reward_metrics(rollouts.groups, data), **stats.metrics}
        row |= {"lr/full": config.full.lr * scale["full"], "lr/lora": config.lora_lr * scale["lora"]}
        row |= {"sync/bytes": len(update.tensors), "sync/full_model_bytes": task.model_bytes}
        row |= {"sync/verified_engines": verified, "sync/version": update.version}
        row |= {f"faults/reward_{kind}": count for kind, count in rollouts.faults.items()}
        row["reward/resampled_groups"] = rollouts.resampled
        row |= {"faults/engine_restarts": pool.restarts - restarts}
        restarts = pool.restarts
        run.write_rollouts(step, rollouts.groups, data.advantages)
        if step == config.steps or (config.eval.every and step % config.eval.every == 0):
            with clock.time("eval"):
                last_eval = evaluate(pool, rewards, task.eval, config)
            row |= last_eval
        if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
            with clock.time("checkpoint"):
                state = TrainerState(
                    step,
                    prompts.position,
                    plan.hash,
                    config.learner.zero_stage,
                    config.learner.world_size,
                    done.wall_seconds + time.perf_counter() - started,
                    last_eval,
                    row | clock.row(),
                )
                save_checkpoint(run.checkpoints, state, update, learner.save, keep_last=config.checkpoint.keep_last)
        row |= clock.row()
        log.write(row, {"policy/advantages": [a for group in data.advantages for a in group]})
        screen.show_step(row)
    return last_eval


def _restore(run: RunDirectory, plan: AdaptationPlan, config: Config, workplace: Workplace) -> TrainerState:
    saved = checkpoints(run.checkpoints)
    if not saved:
        raise ConfigError(f"{run.path} has no finished checkpoint to resume from; start the run anew")
    state = load_state(saved[-1])
    if state.plan_hash != plan.hash:
        raise ConfigError(f"{run.plan} was changed since {saved[-1].name} was saved; restore it or start a new run")
    if (state.zero_stage, state.world_size) != (config.learner.zero_stage, config.learner.world_size):
        raise ConfigError(
            f"{saved[-1].name} was saved with learner.zero_stage={state.zero_stage}, learner.world_size="
            f"{state.world_size}; resume with the same"
        )
    workplace.learner.load(str(saved[-1].resolve() / LEARNER))
    return state
