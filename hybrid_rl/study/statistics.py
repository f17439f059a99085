"""How sure a difference between methods is. Scores are arrays [S seeds, P problems]; two methods are compared seed by
seed and problem by problem.

Runs differ by their seed and by the problems that they are measured on, so the bootstrap draws both anew, the same for
all methods compared. The mean of a seed carries the noise of its problems already: where every seed has problems of its
own, drawing seeds is all (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8), and drawing
problems within them too would count that noise three times. Where all seeds have the same problems, what a problem does
to all seeds alike is drawn besides, and that alone (drawing both at once also overstates the rest: Owen, The pigeonhole
bootstrap, arXiv 0712.1111). With few seeds a bootstrap is too narrow: deviations of seeds are widened by
sqrt(S / (S - 1)), and percentiles moved outwards as a t interval's are (Hesterberg, What teachers should know about the
bootstrap, arXiv 1411.5279, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 4000
_CHUNK = 500
_ROUNDING = 1e-12
"""Spread of shares that is none."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Variances of a difference between two methods."""

    seeds: float
    """Between seeds: of the true difference."""
    problems: float
    """Between problems, alike for all seeds; 0 where each seed has problems of its own."""
    rest: float
    """Between problems within a seed."""

    def error(self, seeds: NDArray[np.int64], problems: int) -> Scores:
        """Standard error of the mean difference, for each number of seeds."""
        return np.sqrt(self.seeds / seeds + self.problems / problems + self.rest / (seeds * problems))


def replicates(scores: Mapping[str, Scores], *, shared: bool, resamples: int = RESAMPLES) -> dict[str, Scores]:
    """The bootstrap's means [R] of every method, drawn together. All have the same seeds and problems; one seed: of its
    problems alone.

    `shared`: every seed has the same problems.
    """
    ((seeds, problems),) = {array.shape for array in scores.values()}
    # Each distinct array once: methods with the same scores differ by nothing, not by rounding.
    stack, which = np.unique(np.stack(list(scores.values())), axis=0, return_inverse=True)
    draw = np.random.default_rng(0)
    found = np.repeat(stack.mean(axis=(1, 2))[:, None], resamples, axis=1)
    if seeds > 1:
        weights = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
        of_seeds = stack.mean(axis=2)
        widened = math.sqrt(seeds / (seeds - 1))
        found += widened * (of_seeds - of_seeds.mean(axis=1, keepdims=True)) @ weights.T
    if problems > 1 and (shared or seeds == 1):
        of_problems = _alike(stack) if seeds > 1 else stack[:, 0] - stack[:, 0].mean(axis=1, keepdims=True)
        for start in range(0, resamples, _CHUNK):
            index = draw.integers(0, problems, (min(_CHUNK, resamples - start), problems))
            for row, values in zip(found, of_problems, strict=True):
                row[start : start + len(index)] += values[index].mean(axis=1)
    return dict(zip(scores, found[which.reshape(-1)], strict=True))


def _alike(stack: Scores) -> Scores:
    """What problems do to all seeds alike, of methods x seeds x problems [M, S, P]: deviations [M, P] of the problems'
    means, shrunk so that their covariance over methods is without that of the rest."""
    _, seeds, problems = stack.shape
    means = stack.mean(axis=1)
    means = means - means.mean(axis=1, keepdims=True)
    rest = stack - stack.mean(axis=2, keepdims=True) - means[:, None]
    total = means @ means.T / (problems - 1)
    noise = np.einsum("isp,jsp->ij", rest, rest) / ((seeds - 1) * (problems - 1) * seeds)
    values, vectors = np.linalg.eigh(total)
    there = values > 1e-12 * max(1e-300, values.max())
    root, vectors = np.sqrt(values[there]), vectors[:, there]
    # In coordinates in which the total is the identity, shares of the noise are between 0 and 1.
    shares, axes = np.linalg.eigh((vectors / root).T @ noise @ (vectors / root))
    kept = (axes * np.sqrt(np.clip(1 - shares, 0, 1))) @ axes.T
    return (vectors * root) @ kept @ (vectors / root).T @ means


def interval(value: float, drawn: Scores, seeds: int) -> Estimate:
    """The percentile interval of `drawn`, its ends moved away from `value` as far as t is wider than the normal
    distribution. One seed: as it is."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    wider = float(stats.t.ppf(tail, seeds - 1) / stats.norm.ppf(tail)) if seeds > 1 else 1.0
    return Estimate(value, float(value + wider * (low - value)), float(value + wider * (high - value)))


def p_value(value: float, drawn: Scores, seeds: int) -> float:
    """Of no difference: a two-sided t test with the bootstrap's standard error. 1 where no two draws differ: runs that
    are all alike do not show how far others would be from them."""
    error = float(drawn.std())
    if error < _ROUNDING:
        return 1.0
    of = stats.t(seeds - 1) if seeds > 1 else stats.norm()
    return float(2 * of.sf(abs(value) / error))


def holm(p_values: Sequence[float], family: int | None = None) -> list[float]:
    """Adjusted for being tested together (Holm 1979): those below a level are significant at it, all in all. `family`:
    how many there are with those that could not be tested, which count as the largest."""
    family = len(p_values) if family is None else family
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (family - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def spread(difference: Scores, *, shared: bool) -> Spread | None:
    """Variances behind differences [S, P], by the analysis of variance's mean squares; `None` for one seed."""
    seeds, problems = difference.shape
    if seeds < 2 or problems < 2:
        return None
    of_seeds = float(difference.mean(axis=1).var(ddof=1))
    if not shared:
        rest = float(difference.var(axis=1, ddof=1).mean())
        return Spread(max(0.0, of_seeds - rest / problems), 0.0, rest)
    centred = difference - difference.mean(axis=1, keepdims=True) - difference.mean(axis=0) + difference.mean()
    rest = float((centred**2).sum() / ((seeds - 1) * (problems - 1)))
    of_problems = float(difference.mean(axis=0).var(ddof=1))
    return Spread(max(0.0, of_seeds - rest / problems), max(0.0, of_problems - rest / seeds), rest)


def seeds_needed(spread: Spread, effect: float, problems: int, most: int = 1000) -> int | None:
    """Fewest seeds, of at least 2, with which a difference of `effect` is found on so many problems, in 80 % of studies
    at the 5 % level; `None` if not with `most`."""
    seeds = np.arange(2, most + 1)
    sure = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) + stats.t.ppf(POWER, seeds - 1)
    enough = effect >= sure * spread.error(seeds, problems)
    return int(seeds[enough.argmax()]) if enough.any() else None
