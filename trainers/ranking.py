"""From a workplace to an adaptation plan: gather what the score looks at, score, spend the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hybrid_rl.config import Config
from hybrid_rl.data import PromptSource
from hybrid_rl.learner.assemble import assemble
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.rollout import sampling_from
from hybrid_rl.scoring import Evidence, Score, ScoreContext, find_score
from hybrid_rl.types import Prompt, TrainSequence
from trainers.setup import Task, Workplace, check_engine, ranks

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many of its parts are done, and of how many."""


def make_plan(
    config: Config, task: Task, workplace: Workplace | None, progress: Progress = lambda *state: None
) -> AdaptationPlan:
    """The plan given by `plan.path` or `plan.start`, or one made as the configuration says.

    A workplace is needed unless the score looks at names and shapes alone.
    """
    if task.plan is not None:
        _say_unused(config, {"score_rank", "score_seed", "prompts", "probe"}, str(config.plan.given))
        return task.plan
    if not ranks(config):
        _say_unused(config, {"score_rank", "score_seed", "prompts", "probe"}, f"adaptation={config.adaptation}")
        return configured_plan(task.anatomy, config, {}, {})
    score = find_score(config.plan.score)
    context = ScoreContext(config.plan, config.lora.rank, config.score_seed)
    method: dict[str, Any] = {"score": score.name}
    used = {"gradients": {"score_rank", "prompts"}, "updates": {"score_rank", "probe"}}.get(score.needs, set())
    _say_unused(config, {"score_rank", "prompts", "probe"} - used, f"plan.score={score.name}")
    if score.needs == "structure":
        candidates = select_candidates(task.anatomy, config.plan)
        return configured_plan(task.anatomy, config, score([Evidence(w) for w in candidates], context), method)
    assert workplace is not None
    workplace.learner.begin_ranking(score)
    if score.needs != "weights":
        seen = _observe(config, task, workplace, score, progress)
        method |= {"score_rank": config.plan.score_rank, **seen}
    scores, unreached = workplace.learner.finish_ranking()
    plan = configured_plan(task.anatomy, config, scores, method, unreached)
    check_engine(config, plan)
    for m in plan.modules:
        if m.note:
            logger.warning("%s: %s (%s)", m.name, m.treatment, m.note)
    return plan


def _say_unused(config: Config, names: set[str], because: str) -> None:
    default = type(config.plan)()
    unused = sorted(name for name in names if getattr(config.plan, name) != getattr(default, name))
    if unused:
        logger.warning("%s: %s not used", because, ", ".join(f"plan.{name}" for name in unused))


def _observe(config: Config, task: Task, workplace: Workplace, score: Score, progress: Progress) -> dict[str, Any]:
    """Show the learner rollouts of the base policy, or of the probe as it goes; returns what was seen."""
    # Apart from the training order. A probe longer than the data goes round.
    source = PromptSource(task.train, seed=config.seed + 1)
    if score.needs == "gradients":
        prompts = source.take(min(config.plan.prompts, len(task.train)))
        progress("rollouts of the base policy", 0, 1)
        [halves], dropped = _rollouts(config, workplace, prompts, step=0, parts=1)
        progress("gradients", 1, 1)
        with workplace.learning():
            workplace.learner.observe(halves)
        _warn_if_nothing([len(half) for half in halves])
        return {"prompts": len(prompts), "zero_variance_groups": dropped}
    steps, parts = config.probe_steps, min(config.plan.probe.mini_batches, config.batch.prompts // 2)
    total = steps * parts
    used = dropped = 0
    sequences = [0, 0]
    for step in range(steps):
        progress("probe", step, steps)
        workplace.sync(step)
        prompts = source.take(config.batch.prompts)
        batches, lost = _rollouts(config, workplace, prompts, step, parts)
        for part, halves in enumerate(batches):
            with workplace.learning():
                workplace.learner.observe(halves, config.probe_lr * probe_schedule(step * parts + part, total))
            sequences = [n + len(half) for n, half in zip(sequences, halves, strict=True)]
        used, dropped = used + len(prompts), dropped + lost
    progress("probe", steps, steps)
    _warn_if_nothing(sequences)
    probe = {"steps": steps, "mini_batches": parts, "lr": config.probe_lr}
    return {"prompts": used, "zero_variance_groups": dropped, "probe": probe}


def probe_schedule(update: int, total: int) -> float:
    """Factor of the probe's learning rate at an update, counted from 0: up over a tenth, then down to a tenth."""
    return min(1.0, (update + 1) / max(1, total // 10)) * (1 - 0.9 * update / total)


def _rollouts(
    config: Config, workplace: Workplace, prompts: Sequence[Prompt], step: int, parts: int
) -> tuple[list[list[list[TrainSequence]]], int]:
    """Fresh rollouts in `parts` batches of two halves, and how many groups had no signal. Even rows of the data are in
    one half, odd ones in the other, however often they come."""
    seed = config.seed + 1 + step
    sampling = sampling_from(config, n=config.batch.num_generations, temperature=config.sampling.temperature, seed=seed)
    groups = workplace.answers.scored(workplace.answers.generate(prompts, sampling)).groups
    halves = [[g for g in groups if int(g.prompt.id.rpartition("/")[2]) % 2 == half] for half in range(2)]
    # What teaches nothing must not count in calibration means.
    dropping = config.model_copy(update={"algo": config.algo.model_copy(update={"zero_variance": "drop"})})
    batches = [[assemble(half[part::parts], dropping) for half in halves] for part in range(parts)]
    dropped = sum(half.zero_variance_groups for batch in batches for half in batch)
    return [[[s for s in half.sequences if s.completion_ids] for half in batch] for batch in batches], dropped


def _warn_if_nothing(sequences: Sequence[int]) -> None:
    """A score that compares the halves is 0 where either saw nothing."""
    if not all(sequences):
        logger.warning(
            "the ranking saw %d and %d completions of groups with unequal rewards in its halves; without any in one, "
            "scores are 0 and modules are taken in the order of their names. Raise plan.prompts or plan.probe.steps, "
            "or give the policy an easier task",
            *sequences,
        )
