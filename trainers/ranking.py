"""From a workplace to an adaptation plan: gather what the score looks at, score, spend the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hybrid_rl.config import Config
from hybrid_rl.data import PromptSource
from hybrid_rl.learner.assemble import assemble
from hybrid_rl.plan import AdaptationPlan, select_candidates
from hybrid_rl.rollout import sampling_from
from hybrid_rl.scoring import Evidence, Score, ScoreContext, find_score
from hybrid_rl.types import Prompt, TrainSequence
from trainers.setup import Task, Workplace, plan_from

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many of its parts are done, and of how many."""


def make_plan(
    config: Config, task: Task, workplace: Workplace | None, progress: Progress = lambda *state: None
) -> AdaptationPlan:
    """The plan given by `plan.path`, or one made as the configuration says.

    A workplace is needed unless the score looks at names and shapes alone.
    """
    if task.plan is not None:
        return task.plan
    if config.adaptation != "hybrid" or not 0 < config.plan.budget.ratio < 1:
        return plan_from(task.anatomy, config, {}, {})
    score = find_score(config.plan.score)
    context = ScoreContext(config.plan, config.lora.rank, config.seed)
    method: dict[str, Any] = {"score": score.name}
    if score.needs == "structure":
        candidates = select_candidates(task.anatomy, config.plan)
        return plan_from(task.anatomy, config, score([Evidence(w) for w in candidates], context), method)
    assert workplace is not None
    workplace.learner.begin_ranking(score)
    if score.needs != "weights":
        seen = _observe(config, task, workplace, score, progress)
        method |= {"score_rank": config.plan.score_rank, **seen}
    scores, unreached = workplace.learner.finish_ranking()
    plan = plan_from(task.anatomy, config, scores, method, unreached)
    for m in plan.modules:
        if m.note:
            logger.warning("%s: %s (%s)", m.name, m.treatment, m.note)
    return plan


def _observe(config: Config, task: Task, workplace: Workplace, score: Score, progress: Progress) -> dict[str, Any]:
    """Show the learner rollouts of the base policy, or of the probe as it goes; returns what was seen."""
    # Apart from the training order. No more than there are: a problem in both halves would make noise look like
    # agreement, so a probe longer than the data goes round and is told.
    source = PromptSource(task.train, seed=config.seed + 1)
    if score.needs == "gradients":
        prompts = source.take(min(config.plan.prompts, len(task.train)))
        progress("rollouts of the base policy", 0, 1)
        [halves], dropped = _rollouts(config, workplace, prompts, step=0, parts=1)
        progress("gradients", 1, 1)
        workplace.learner.observe(halves)
        _warn_if_nothing(sum(len(half) for half in halves))
        return {"prompts": len(prompts), "zero_variance_groups": dropped}
    steps, parts = config.probe_steps, config.plan.probe.mini_batches
    total = steps * parts
    used = dropped = sequences = 0
    for step in range(steps):
        progress("probe", step, steps)
        workplace.sync(step)
        prompts = source.take(config.batch.prompts)
        batches, lost = _rollouts(config, workplace, prompts, step, parts)
        for part, halves in enumerate(batches):
            workplace.learner.observe(halves, config.probe_lr * probe_schedule(step * parts + part, total))
            sequences += sum(len(half) for half in halves)
        used, dropped = used + len(prompts), dropped + lost
    progress("probe", steps, steps)
    _warn_if_nothing(sequences)
    if used > len(task.train):
        logger.warning("the probe saw %d prompts, more than the %d there are; some twice", used, len(task.train))
    probe = {"steps": steps, "mini_batches": parts, "lr": config.probe_lr}
    return {"prompts": used, "zero_variance_groups": dropped, "probe": probe}


def probe_schedule(update: int, total: int) -> float:
    """Factor of the probe's learning rate at an update, counted from 0: up over a tenth, then down to a tenth."""
    return min(1.0, (update + 1) / max(1, total // 10)) * (1 - 0.9 * update / total)


def _rollouts(
    config: Config, workplace: Workplace, prompts: Sequence[Prompt], step: int, parts: int
) -> tuple[list[list[list[TrainSequence]]], int]:
    """Fresh rollouts in `parts` batches of two halves, every other prompt in either, and the groups without signal."""
    seed = config.seed + 1 + step
    sampling = sampling_from(config, n=config.batch.num_generations, temperature=config.sampling.temperature, seed=seed)
    groups = workplace.rewards.score(prompts, workplace.pool.generate(prompts, sampling)).groups
    batches = [[assemble(groups[half::2][part::parts]) for half in range(2)] for part in range(parts)]
    dropped = sum(half.zero_variance_groups for halves in batches for half in halves)
    return [[half.sequences for half in halves] for halves in batches], dropped


def _warn_if_nothing(sequences: int) -> None:
    if not sequences:
        logger.warning(
            "the ranking saw no group with unequal rewards, so every score is 0 and modules are taken in the order of "
            "their names; raise plan.prompts or plan.probe.steps, or give the policy an easier task"
        )
