"""Held-out evaluation: greedy accuracy, the mean over k samples, and the area under accuracies by rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from hybrid_rl.config import Config
from hybrid_rl.reward import RewardPool
from hybrid_rl.rollout import Episodes, sampling_from
from hybrid_rl.types import Prompt, Sampling, ScoredGroup


def evaluate(episodes: Episodes, rewards: RewardPool, prompts: Sequence[Prompt], config: Config) -> dict[str, float]:
    """`eval/accuracy`: mean of the first reward over one greedy completion a problem. `eval/mean_at_k`: the same over
    `eval.k` samples. `eval/truncated`: share of greedy completions cut at a limit. A
    completion without a score counts as 0 here, and in `eval/unscored`."""
    greedy = _answer(episodes, rewards, prompts, sampling_from(config, n=1, temperature=0.0))
    scores = _first_rewards(greedy, config)
    metrics = {
        "eval/accuracy": _mean([s or 0.0 for s in scores]),
        "eval/truncated": _mean([float(c.truncated) for g in greedy for c in g.completions]),
        "eval/unscored": float(sum(s is None for s in scores)),
    }
    if config.eval.k:
        sampling = sampling_from(config, n=config.eval.k, temperature=config.sampling.temperature)
        sampled = _first_rewards(_answer(episodes, rewards, prompts, sampling), config)
        metrics["eval/mean_at_k"] = _mean([s or 0.0 for s in sampled])
        metrics["eval/unscored"] += float(sum(s is None for s in sampled))
    return metrics


def aurac(ranks: Sequence[int], accuracies: Sequence[float], *, log: bool) -> float:
    """Area under the rank-accuracy curve of MatryoshkaLoRA (arXiv 2605.07850), by the trapezoid rule and divided by its
    width: a mean of the accuracies over the ranks or, with `log`, over their logarithms, so that every doubling counts
    alike. `ranks` rise; one has its own accuracy."""
    if len(ranks) == 1:
        return accuracies[0]
    places = [math.log2(r) if log else float(r) for r in ranks]
    points = zip(places, accuracies, strict=True)
    area = sum((x2 - x1) * (a1 + a2) / 2 for (x1, a1), (x2, a2) in pairwise(points))
    return area / (places[-1] - places[0])


def _answer(
    episodes: Episodes, rewards: RewardPool, prompts: Sequence[Prompt], sampling: Sampling
) -> list[ScoredGroup]:
    return rewards.score(prompts, episodes.generate(prompts, sampling)).groups


def _first_rewards(groups: Sequence[ScoredGroup], config: Config) -> list[float | None]:
    return [score for group in groups for score in group.parts[config.rewards[0].plugin]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
