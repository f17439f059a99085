"""Held-out evaluation: greedy accuracy, what k samples a problem say, how answers ended, and areas under accuracies by
rank. Shares are over problems; a completion without a score counts as 0, and as unscored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from hybrid_rl.answers import Answers
from hybrid_rl.config import Config
from hybrid_rl.rollout import sampling_from
from hybrid_rl.types import Outcome, Prompt, Sampling, ScoredGroup

EXTRACTED = "extracted"
"""What rewards call the answer they read in a completion (`log_extra`); maj@k counts equal ones together."""
_LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Evaluated:
    """What was measured, and the answers it was measured on."""

    metrics: dict[str, float]
    """By the names of docs/metrics.md, all under `eval/`."""
    greedy: list[ScoredGroup]
    sampled: list[ScoredGroup]
    """Empty where `eval.k` is 0."""
    problems: dict[str, dict[str, list[float]]]
    """By set and metric (`accuracy`, `mean_at_k`), the score of every problem in the set's order."""


def is_due(step: int, config: Config) -> bool:
    """Whether the policy is evaluated after a step."""
    return step == config.steps or bool(config.eval.every and step % config.eval.every == 0)


def evaluate(answers: Answers, sets: Mapping[str, Sequence[Prompt]], config: Config) -> Evaluated:
    """Answer all held-out problems once greedily, and `eval.k` times by sampling; judge by the reward that measures
    accuracy.

    `sets`: problems by the name of their data set, their ids beginning with it where there are several. Each set's
    metrics then stand under `eval/<name>/`, and the unweighted means over the sets, or sums of counts, under `eval/`.
    """
    greedy = _answer(answers, sets, sampling_from(config, n=1, temperature=0.0), config)
    sampled: dict[str, list[ScoredGroup]] = {}
    if config.eval.k:
        sampling = sampling_from(config, n=config.eval.k, temperature=config.sampling.temperature)
        sampled = _answer(answers, sets, sampling, config)
    found: dict[str, dict[str, float]] = {}
    problems: dict[str, dict[str, list[float]]] = {}
    for name in sets:
        reward = config.accuracy(name).name
        problems[name] = _per_problem(greedy[name], sampled.get(name, []), reward)
        found[name] = _measure(greedy[name], sampled.get(name, []), problems[name], reward, config)
    if len(found) == 1:
        (metrics,) = found.values()
    else:
        metrics = {key: _over_sets(key, found) for key in _common(found) if not key.startswith("ci/")}
        metrics |= {f"{name}/{key}": value for name, f in found.items() for key, value in f.items()}
    return Evaluated(
        {f"eval/{name}": value for name, value in metrics.items()},
        [group for name in sets for group in greedy[name]],
        [group for name in sets for group in sampled.get(name, [])],
        problems,
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of `k` samples is right, estimated without bias from `right` of `samples` (arXiv
    2107.03374, equation 1). `k` is at most `samples`."""
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; where several are equally frequent, the share of them that is. Samples
    without an answer ('') do not vote."""
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    chosen = [answer for answer, n in votes.items() if n == most]
    return _mean([float(right[list(answers).index(answer)]) for answer in chosen])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean over problems: Wilson's where each is right or wrong, else by percentiles of
    a bootstrap over problems with a fixed seed."""
    if set(values) <= {0.0, 1.0}:
        found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(_LEVEL, method="wilson")
        return float(found.low), float(found.high)
    array = np.asarray(values)
    draw = np.random.default_rng(0)
    means = [array[draw.integers(0, len(array), len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


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


def _per_problem(greedy: Sequence[ScoredGroup], sampled: Sequence[ScoredGroup], reward: str) -> dict[str, list[float]]:
    """Scores of one data set's problems."""
    found = {"accuracy": [outcome.score or 0.0 for group in greedy for outcome in group.outcomes[reward]]}
    if sampled:
        found["mean_at_k"] = [_mean([o.score or 0.0 for o in group.outcomes[reward]]) for group in sampled]
    return found


def _measure(
    greedy: Sequence[ScoredGroup],
    sampled: Sequence[ScoredGroup],
    problems: Mapping[str, list[float]],
    reward: str,
    config: Config,
) -> dict[str, float]:
    """Of one data set, whose `problems` have these scores; intervals under `ci/`."""
    k = config.eval.k
    outcomes = [outcome for group in greedy for outcome in group.outcomes[reward]]
    ends = [completion.finish_reason for group in greedy for completion in group.completions]
    per_problem = dict(problems)
    shares = {
        "truncated": _mean([float(end in ("length", "time")) for end in ends]),
        "stopped": _mean([float(end == "stop") for end in ends]),
    }
    if any(EXTRACTED in outcome.extra for outcome in outcomes):
        shares["answered"] = _mean([float(_extracted(o) != "") for o in outcomes])
    if sampled:
        rows = [group.outcomes[reward] for group in sampled]
        right = [[(o.score or 0.0) >= config.eval.right_from for o in row] for row in rows]
        for j in sorted({2**i for i in range(k.bit_length())} | {k}):
            per_problem[f"pass_at_{j}"] = [pass_at_k(k, sum(row), j) for row in right]
        if any(EXTRACTED in o.extra for row in rows for o in row):
            answers = [[_extracted(o) for o in row] for row in rows]
            per_problem["maj_at_k"] = [majority(a, r) for a, r in zip(answers, right, strict=True)]
        ends_of_samples = [c.finish_reason for group in sampled for c in group.completions]
        shares["truncated_at_k"] = _mean([float(end in ("length", "time")) for end in ends_of_samples])
        outcomes = [*outcomes, *(o for row in rows for o in row)]
    metrics = {name: _mean(values) for name, values in per_problem.items()} | shares
    metrics["unscored"] = float(sum(o.score is None for o in outcomes))
    for name, values in per_problem.items():
        metrics[f"ci/{name}_low"], metrics[f"ci/{name}_high"] = interval(values)
    return metrics


def _extracted(outcome: Outcome) -> str:
    """The answer that the reward read; '' without one."""
    answer = outcome.extra.get(EXTRACTED)
    return "" if answer is None else str(answer)


def _answer(
    answers: Answers, sets: Mapping[str, Sequence[Prompt]], sampling: Sampling, config: Config
) -> dict[str, list[ScoredGroup]]:
    """Sets that the same reward judges are answered together."""
    groups: dict[str, list[ScoredGroup]] = {}
    for reward in dict.fromkeys(config.accuracy(name).name for name in sets):
        judged = {name: prompts for name, prompts in sets.items() if config.accuracy(name).name == reward}
        answered = answers.generate([p for prompts in judged.values() for p in prompts], sampling, only=reward)
        scored = iter(answers.scored(answered).groups)
        groups |= {name: [next(scored) for _ in prompts] for name, prompts in judged.items()}
    return groups


def _common(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Metrics that every data set has."""
    first, *rest = found.values()
    return [key for key in first if all(key in other for other in rest)]


def _over_sets(key: str, found: Mapping[str, Mapping[str, float]]) -> float:
    values = [metrics[key] for metrics in found.values()]
    return sum(values) if key == "unscored" else _mean(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
