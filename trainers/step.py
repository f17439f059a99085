"""Parts of a training step that the loop names in one line: rollouts, and the guard on skipped updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_rl.config import Config
from hybrid_rl.data import PromptSource
from hybrid_rl.learner.assemble import groups_with_signal
from hybrid_rl.rollout import sampling_from
from hybrid_rl.tracking import RunDirectory, StepClock
from hybrid_rl.types import ScoredGroup, TrainBatch, TrainSequence
from trainers.setup import Workplace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollouts:
    """What was sampled for one step."""

    groups: list[ScoredGroup]
    divergences: list[list[float]] | None
    """Each completion's from the base policy, where `algo.kl_in=reward`."""
    faults: Mapping[str, int]
    resampled: int
    """Prompts drawn in place of ones whose completions all earned the same."""


def sample(config: Config, workplace: Workplace, prompts: PromptSource, clock: StepClock) -> Rollouts:
    """Completions of the next prompts, with their rewards.

    With `algo.zero_variance=resample`, prompts are drawn until as many groups as a step has teach something, or the
    limit is reached (dynamic sampling, arXiv 2503.14476, section 3.2).
    """
    sampling = sampling_from(config, n=config.batch.num_generations, temperature=config.sampling.temperature)
    draws = 1 + (config.algo.resample_limit if config.algo.zero_variance == "resample" else 0)
    groups: list[ScoredGroup] = []
    faults: Counter[str] = Counter()
    missing = config.batch.prompts
    for _ in range(draws):
        batch = prompts.take(missing)
        with clock.time("generate"):
            completions = workplace.pool.generate(batch, sampling)
        with clock.time("reward"):
            scored = workplace.rewards.score(batch, completions)
        groups += scored.groups
        faults.update(scored.faults)
        missing = config.batch.prompts - sum(groups_with_signal(groups))
        if missing == 0:
            break
    divergences = None
    if config.algo.needs_reference and config.algo.kl_in == "reward":
        with clock.time("logprob"):
            divergences = _divergences(workplace, groups)
    return Rollouts(groups, divergences, faults, len(groups) - config.batch.prompts)


def _divergences(workplace: Workplace, groups: list[ScoredGroup]) -> list[list[float]]:
    """A completion without tokens does not diverge."""
    sequences = [
        TrainSequence(g.prompt.token_ids, c.token_ids, c.logprobs, 0.0)
        for g in groups
        for c in g.completions
        if c.token_ids
    ]
    values = iter(workplace.learner.divergences(workplace.cluster.share(sequences)))
    return [[next(values) if c.token_ids else 0.0 for c in g.completions] for g in groups]


class SkipGuard:
    """Keeps the batches whose gradient was not finite, and stops a run that no longer learns."""

    def __init__(self, run: RunDirectory, limit: int) -> None:
        self._run, self._limit = run, limit
        self._in_a_row = 0

    def see(self, step: int, batch: TrainBatch, metrics: Mapping[str, float]) -> None:
        """Raises `RuntimeError` after `limit` skipped updates without one that was applied in between."""
        skipped = int(metrics["faults/skipped_updates"])
        if not skipped:
            self._in_a_row = 0
            return
        path = self._run.write_skipped(step, batch)
        logger.warning(
            "step %d: %d updates skipped, a gradient was not finite; the batch is in %s", step, skipped, path
        )
        last = int(metrics["faults/skipped_in_a_row"])
        self._in_a_row = self._in_a_row + last if last == metrics["policy/updates"] else last
        if self._in_a_row >= self._limit:
            raise RuntimeError(
                f"{self._in_a_row} updates in a row were skipped because a gradient was not finite "
                f"(learner.max_skipped_updates={self._limit}); look at {path}, or lower full.lr and lora.lr"
            )
