"""Parts of a training step that the loop names in one line: where rollouts come from, and the guard on skipped
updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hybrid_rl.checkpoint import Waiting
from hybrid_rl.config import Config
from hybrid_rl.data import PromptSource
from hybrid_rl.learner.assemble import groups_with_signal
from hybrid_rl.rollout import sampling_from
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.step_clock import StepClock
from hybrid_rl.types import Pending, Sampling, ScoredGroup, TrainBatch, TrainSequence
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


class RolloutSource(Protocol):
    """Where a step's rollouts come from: made when they are wanted, or while the learner works."""

    @property
    def position(self) -> int:
        """Prompts that the steps so far have used; a resumed run goes on from there."""
        ...

    def next(self, step: int, clock: StepClock) -> Rollouts:
        """Completions of the next prompts, with what they earn at `step`. They are scored while others are sampled; the
        time counts as `reward` once there is nothing left to wait for but rewards.

        With `algo.zero_variance=resample`, prompts are drawn until as many groups as a step has teach something, or the
        limit is reached (dynamic sampling, arXiv 2503.14476, section 3.2).
        """
        ...

    def during(self, training: Pending) -> None:
        """Called with the learner's call under way; returns when it is over."""
        ...

    def synced(self) -> None:
        """Called when the engines have the weights of the step that `next` was for."""
        ...

    def waiting(self) -> Waiting:
        """Completions by prompt's id, that are there and no step has asked for."""
        ...

    def close(self) -> None: ...


class InTurn:
    """Rollouts of the current weights, while the learner waits."""

    def __init__(self, config: Config, workplace: Workplace, prompts: PromptSource) -> None:
        self._config, self._workplace, self._prompts = config, workplace, prompts

    @property
    def position(self) -> int:
        return self._prompts.position

    def next(self, step: int, clock: StepClock) -> Rollouts:
        answers = self._workplace.answers
        sampling = training_sampling(self._config)
        groups: list[ScoredGroup] = []
        faults: Counter[str] = Counter()
        for _ in range(draws(self._config)):
            batch = self._prompts.take(groups_wanted(self._config, groups, step))
            with clock.time("generate"):
                answered = answers.generate(batch, sampling)
            with clock.time("reward"):
                scored = answers.scored(answered, step)
            groups += scored.groups
            faults.update(scored.faults)
            if not groups_wanted(self._config, groups, step):
                break
        return complete(self._config, self._workplace, groups, faults, clock)

    def during(self, training: Pending) -> None:
        """Nothing."""

    def synced(self) -> None:
        """Nothing."""

    def waiting(self) -> Waiting:
        return []

    def close(self) -> None:
        """Nothing."""


def training_sampling(config: Config) -> Sampling:
    """Of the rollouts that are trained on."""
    return sampling_from(config, n=config.batch.num_generations, temperature=config.sampling.temperature)


def draws(config: Config) -> int:
    """Times that prompts may be drawn for one step."""
    return 1 + (config.algo.resample_limit if config.algo.zero_variance == "resample" else 0)


def groups_wanted(config: Config, groups: Sequence[ScoredGroup], step: int) -> int:
    """How many more groups a step needs that has these."""
    useful = len(groups)
    if groups and config.algo.zero_variance == "resample":
        useful = sum(groups_with_signal(groups, config, step))
    return config.batch.prompts - useful


def complete(
    config: Config, workplace: Workplace, groups: list[ScoredGroup], faults: Mapping[str, int], clock: StepClock
) -> Rollouts:
    """A step's rollouts, with what the learner must say about them first."""
    divergences = None
    if config.algo.needs_reference and config.algo.kl_in == "reward":
        with clock.time("logprob"):
            divergences = _divergences(workplace, groups)
    return Rollouts(groups, divergences, faults, len(groups) - config.batch.prompts)


def _divergences(workplace: Workplace, groups: list[ScoredGroup]) -> list[list[float]]:
    """A completion without tokens does not diverge."""
    sequences = [
        TrainSequence(g.prompt.token_ids, c.token_ids, c.logprobs, 0.0, given=c.given)
        for g in groups
        for c in g.completions
        if c.token_ids
    ]
    with workplace.learning():
        values = iter(workplace.learner.divergences(workplace.cluster.share(sequences)))
    return [[next(values) if c.token_ids else 0.0 for c in g.completions] for g in groups]


def staleness_metrics(groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """How many updates the sampled tokens are behind the weights `version` that are trained: mean, largest, and the
    share of each number of updates."""
    counts: Counter[int] = Counter()
    mixed = total = 0
    for completion in (c for group in groups for c in group.completions):
        given = {i for start, end in completion.given for i in range(start, end)}
        current, later = completion.weight_version, dict(completion.later_versions)
        for token in range(len(completion.token_ids)):
            current = later.get(token, current)
            if token not in given:
                counts[version - current] += 1
        mixed, total = mixed + bool(later), total + 1
    tokens = max(1, counts.total())
    metrics = {
        "staleness/mean": sum(k * n for k, n in counts.items()) / tokens,
        "staleness/max": float(max(counts, default=0)),
        "staleness/mixed": mixed / max(1, total),
    }
    return metrics | {f"staleness/share_{k}": n / tokens for k, n in sorted(counts.items())}


class SkipGuard:
    """Keeps the batches whose gradient was not finite, and stops a run that no longer learns."""

    def __init__(self, run: RunDirectory, limit: int, in_a_row: int) -> None:
        """`in_a_row`: updates skipped at the end of what was done before."""
        self._run, self._limit = run, limit
        self.in_a_row = in_a_row

    def see(self, step: int, batch: TrainBatch, metrics: Mapping[str, float]) -> None:
        """Raises `RuntimeError` after `limit` skipped updates without one that was applied in between."""
        skipped = int(metrics["faults/skipped_updates"])
        if not skipped:
            self.in_a_row = 0
            return
        kept = self._run.skipped_of(step)
        try:
            self._run.write_skipped(step, batch)
            where = f"the batch is in {kept}"
        except OSError as error:
            where = f"the batch could not be written: {error}"
        logger.warning("step %d: %d updates skipped, a gradient was not finite; %s", step, skipped, where)
        last = int(metrics["faults/skipped_in_a_row"])
        self.in_a_row = self.in_a_row + last if last == metrics["policy/updates"] else last
        if self.in_a_row >= self._limit:
            raise RuntimeError(
                f"{self.in_a_row} updates in a row were skipped because a gradient was not finite "
                f"(learner.max_skipped_updates={self._limit}); look at {kept}, or lower full.lr and lora.lr"
            )
