"""From a study's finished runs to what may be said of its methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from scipy import stats

from hybrid_rl.evaluate import aurac
from hybrid_rl.study.settings import Study
from hybrid_rl.study.statistics import (
    Estimate,
    Scores,
    holm,
    interval,
    p_value,
    replicates,
    seeds_needed,
    spread,
)
from hybrid_rl.study.trials import Choice, Result, Trial

PROBLEMS = (128, 256, 640, 1319, 5000)
"""Of which the note on power says how many seeds they need; 1,319 are GSM8K's."""
_LEVEL = 0.05
_FEWEST = 3
"""Seeds below which nothing is settled, whatever the problems say."""
_ALIKE = 0.1
"""Difference in sampled tokens between methods, from which on it is said."""


@dataclass(frozen=True)
class Arm:
    """A method, or a pool of methods, on one task: means over its seeds."""

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    """Seeds whose run failed."""
    scores: Mapping[str, Estimate]
    """By set of held-out problems, with a 95 % interval."""
    recovered: Mapping[str, Estimate]
    """By set, the share of the gain that the study's `recovery` names."""
    rates: str
    at_edge: bool
    trained: float
    optimizer_bytes: float
    synced_bytes: float
    tokens: float
    steps: float
    ranking_steps: float
    seconds: float
    curve: tuple[Mapping[str, float], ...]
    """Means over seeds, at each evaluation."""
    also: str = ""


@dataclass(frozen=True)
class Comparison:
    """What is claimed to be better than what, and whether it is."""

    task: str
    held_out: str
    better: str
    worse: str
    difference: Estimate
    p: float
    adjusted: float
    """p after Holm's correction over all of the study's comparisons."""
    wins: int
    """Seeds in which `better` is."""
    seeds: int
    problems: int
    """Held-out, of each seed."""
    needed: Mapping[int, int | None]
    """Problems, `problems` among them -> seeds with which a difference of the study's `effect` would be found in 80 %
    of studies; empty for one seed."""

    @property
    def significant(self) -> bool:
        return self.adjusted < _LEVEL and self.seeds >= _FEWEST

    @property
    def verdict(self) -> str:
        if not self.significant:
            return "not settled"
        return "better" if self.difference.value > 0 else "worse"


@dataclass(frozen=True)
class Stability:
    """How alike a method's rankings are from run to run, where all are of the same model."""

    task: str
    method: str
    runs: int
    correlation: float
    """Spearman's, mean over all pairs of runs."""
    lowest: float
    """Of any pair."""
    overlap: float
    """Matrices that both of two runs chose, as a share of those that either did (Jaccard), mean over all pairs."""


@dataclass(frozen=True)
class Analysis:
    study: Study
    tasks: Mapping[str, Sequence[Arm]]
    comparisons: Sequence[Comparison]
    areas: Mapping[tuple[str, str, str], Estimate]
    """By task, curve and set of held-out problems: AURAC over the logarithm of the rank."""
    choices: Mapping[tuple[str, str], Choice]
    stability: Sequence[Stability] = ()
    remarks: Sequence[str] = field(default_factory=list)
    """What a reader has to know beside the tables."""
    runs: int = 0
    """That are told of and ended with a result."""
    versions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By package, all with which they were made."""


@dataclass(frozen=True)
class _Runs:
    """A method's, or a pool's, runs on a task."""

    name: str
    methods: tuple[str, ...]
    by_seed: Mapping[int, Sequence[Result]]
    """Only seeds of which all runs ended."""

    def scores(self, held_out: str, metric: str, seeds: Sequence[int]) -> Scores:
        """[S, P]; of a pool, means over its methods."""
        return np.array([np.mean([r.scores[held_out][metric] for r in self.by_seed[seed]], axis=0) for seed in seeds])

    def mean(self, attribute: str) -> float:
        return fmean(float(getattr(r, attribute)) for runs in self.by_seed.values() for r in runs)


@dataclass(frozen=True)
class _Curve:
    """Runs at several ranks. AURAC weighs their scores by rank, so it is a mean of scores as a method's result is."""

    name: str
    by_seed: Mapping[int, Sequence[Result]]
    points: Sequence[tuple[float, _Runs, str]]
    """Of each rank: its weight, the runs, and what is added to the name of the set that they are measured on."""

    def scores(self, held_out: str, metric: str, seeds: Sequence[int]) -> Scores:
        """[S, P]"""
        return np.sum([w * runs.scores(held_out + at, metric, seeds) for w, runs, at in self.points], axis=0)


def analyse(
    study: Study,
    results: Mapping[str, Result],
    trials: Sequence[Trial],
    choices: Mapping[tuple[str, str], Choice],
) -> Analysis:
    """`trials`: the runs that are told of, done or not."""
    tasks: dict[str, list[Arm]] = {}
    compared: list[Comparison] = []
    areas: dict[tuple[str, str, str], Estimate] = {}
    remarks: list[str] = []
    stability: list[Stability] = []
    for task in study.tasks:
        runs = _runs(study, task, results, trials)
        shared = len({str(t.config.data.eval) for t in trials if t.task == task}) == 1
        tasks[task] = [_arm(study, task, arm, runs, choices, shared) for arm in runs.values() if arm.by_seed]
        for held_out in study.report_on:
            curves = {name: _curve(study, name, runs, held_out) for name in study.curves}
            sides = runs | curves
            compared += [
                found
                for better, worse in study.compare
                if (found := _compare(study, task, held_out, sides[better], sides[worse], shared)) is not None
            ]
            for name, curve in curves.items():
                if curve.by_seed:
                    array = curve.scores(held_out, study.metric, list(curve.by_seed))
                    drawn = replicates({name: array}, shared=shared)[name]
                    areas[task, name, held_out] = interval(float(array.mean()), drawn, len(array))
        if len({t.config.model.path for t in trials if t.task == task}) == 1:
            stability += [found for m in study.methods if (found := _stability(task, runs[m])) is not None]
        remarks += _remarks(study, task, tasks[task], [name for name, arm in runs.items() if not arm.by_seed])
    family = len(study.compare) * len(study.tasks) * len(study.report_on)
    adjusted = holm([c.p for c in compared], family)
    compared = [Comparison(**{**vars(c), "adjusted": p}) for c, p in zip(compared, adjusted, strict=True)]
    if len(study.seeds) == 1:
        remarks.append("one seed: intervals and tests are of the problems alone, and say nothing of other runs")
    elif len(study.seeds) < 5:
        remarks.append(f"{len(study.seeds)} seeds: intervals from so few are rough")
    done = [results[key] for key in dict.fromkeys(t.key for t in trials) if key in results]
    versions = {
        name: sorted({r.versions[name] for r in done if name in r.versions})
        for name in dict.fromkeys(name for r in done for name in r.versions)
    }
    return Analysis(study, tasks, compared, areas, choices, stability, remarks, len(done), versions)


def _runs(study: Study, task: str, results: Mapping[str, Result], trials: Sequence[Trial]) -> dict[str, _Runs]:
    done = {(t.method, t.seed): results[t.key] for t in trials if t.task == task and t.key in results}
    arms = {name: (name,) for name in study.methods} | {name: tuple(ms) for name, ms in study.pools.items()}
    return {
        name: _Runs(
            name,
            methods,
            {s: [done[m, s] for m in methods] for s in study.seeds if all((m, s) in done for m in methods)},
        )
        for name, methods in arms.items()
    }


def _arm(
    study: Study,
    task: str,
    arm: _Runs,
    runs: Mapping[str, _Runs],
    choices: Mapping[tuple[str, str], Choice],
    shared: bool,
) -> Arm:
    scores, recovered = {}, {}
    seeds = list(arm.by_seed)
    for held_out in study.report_on:
        array = arm.scores(held_out, study.metric, seeds)
        drawn = replicates({arm.name: array}, shared=shared)[arm.name]
        scores[held_out] = interval(float(array.mean()), drawn, len(seeds))
        if study.recovery is not None and (share := _recovered(study, held_out, arm, runs, shared)) is not None:
            recovered[held_out] = share
    of = [choices[task, study.methods[m].rates_of or m] for m in arm.methods]
    rates = "; ".join(dict.fromkeys(", ".join(f"{n} {v:g}" for n, v in c.rates.items()) for c in of))
    steps = [{p["step"] for p in r.curve} for rs in arm.by_seed.values() for r in rs]
    common = sorted(set.intersection(*steps))
    points = [[p for p in r.curve if p["step"] == step] for step in common for rs in arm.by_seed.values() for r in rs]
    by_step: dict[float, list[Mapping[str, float]]] = {}
    for (point,) in points:
        by_step.setdefault(point["step"], []).append(point)
    curve = tuple({name: fmean(p[name] for p in found) for name in found[0]} for found in by_step.values())
    return Arm(
        name=arm.name,
        methods=arm.methods,
        seeds=tuple(seeds),
        missing=tuple(s for s in study.seeds if s not in arm.by_seed),
        scores=scores,
        recovered=recovered,
        rates=rates,
        at_edge=any(c.at_edge for c in of),
        **{
            name: arm.mean(name)
            for name in (
                *("trained", "optimizer_bytes", "synced_bytes", "tokens"),
                *("steps", "ranking_steps", "seconds"),
            )
        },
        curve=curve,
        also=study.methods[arm.name].also if arm.name in study.methods else f"mean of {len(arm.methods)}",
    )


def _recovered(study: Study, held_out: str, arm: _Runs, runs: Mapping[str, _Runs], shared: bool) -> Estimate | None:
    assert study.recovery is not None
    of, over = runs[study.recovery.of], runs[study.recovery.over]
    seeds = _common(arm, of, over)
    if not seeds or arm.name in (of.name, over.name):
        return None
    arrays = {a.name: a.scores(held_out, study.metric, seeds) for a in (arm, of, over)}
    drawn = replicates(arrays, shared=shared)
    mean = {name: float(a.mean()) for name, a in arrays.items()}
    gain = mean[of.name] - mean[over.name]
    gains = drawn[of.name] - drawn[over.name]
    if interval(gain, gains, len(seeds)).low <= 0:
        return None  # there is no gain to have a share of
    shares = (drawn[arm.name] - drawn[over.name]) / gains
    return interval((mean[arm.name] - mean[over.name]) / gain, shares, len(seeds))


def _compare(
    study: Study, task: str, held_out: str, better: _Runs | _Curve, worse: _Runs | _Curve, shared: bool
) -> Comparison | None:
    seeds = _common(better, worse)
    if not seeds:
        return None
    arrays = {a.name: a.scores(held_out, study.metric, seeds) for a in (better, worse)}
    drawn = replicates(arrays, shared=shared)
    difference = arrays[better.name] - arrays[worse.name]
    drawn_difference = drawn[better.name] - drawn[worse.name]
    value = float(difference.mean())
    found = spread(difference, shared=shared)
    problems = difference.shape[1]
    asked = sorted({*PROBLEMS, problems})
    needed = {m: seeds_needed(found, study.effect, m) for m in asked} if found is not None else {}
    p = p_value(value, drawn_difference, len(seeds))
    wins = int((difference.mean(axis=1) > 0).sum())
    estimate = interval(value, drawn_difference, len(seeds))
    return Comparison(task, held_out, better.name, worse.name, estimate, p, p, wins, len(seeds), problems, needed)


def _curve(study: Study, name: str, runs: Mapping[str, _Runs], held_out: str) -> _Curve:
    """Without seeds where runs were made before the curve was asked for."""
    curve = study.curves[name]
    weights = [aurac(curve.ranks, list(unit), log=True) for unit in np.eye(len(curve.ranks))]
    points = [(w, runs[m], at) for w, (m, at) in zip(weights, curve.points(), strict=True)]
    seeds = {
        seed: [r for _, arm, _ in points for r in arm.by_seed[seed]]
        for seed in _common(*(arm for _, arm, _ in points))
        if all(held_out + at in r.scores for _, arm, at in points for r in arm.by_seed[seed])
    }
    return _Curve(name, seeds, points)


def _stability(task: str, arm: _Runs) -> Stability | None:
    rankings = [(r.ranking, set(r.chosen)) for runs in arm.by_seed.values() for r in runs if r.ranking]
    pairs = list(itertools.combinations(rankings, 2))
    if not pairs:
        return None
    correlations = [_rank_correlation([a[n] for n in a], [b[n] for n in a]) for (a, _), (b, _) in pairs]
    overlaps = [len(a & b) / max(1, len(a | b)) for (_, a), (_, b) in pairs]
    return Stability(task, arm.name, len(rankings), fmean(correlations), min(correlations), fmean(overlaps))


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks."""
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _common(*arms: _Runs | _Curve) -> list[int]:
    first, *rest = arms
    return [seed for seed in first.by_seed if all(seed in arm.by_seed for arm in rest)]


def _remarks(study: Study, task: str, arms: Sequence[Arm], absent: Sequence[str]) -> list[str]:
    """`absent`: arms without any result."""
    where = f"{task}: " if len(study.tasks) > 1 else ""
    found = [f"{where}{name} has no result and is left out" for name in absent]
    found += [f"{where}{arm.name} has no result for seeds {list(arm.missing)}" for arm in arms if arm.missing]
    if edges := [arm.name for arm in arms if arm.at_edge]:
        found.append(
            f"{where}the best rate is at the end of what was tried for {', '.join(edges)}; a better one may lie beyond"
        )
    sampled = [arm.tokens * (1 + arm.ranking_steps / arm.steps) for arm in arms]
    if arms and max(sampled) > (1 + _ALIKE) * min(sampled):
        most, least = arms[sampled.index(max(sampled))], arms[sampled.index(min(sampled))]
        found.append(f"{where}{most.name} sampled {max(sampled) / min(sampled):.2f} times the tokens of {least.name}")
    return found
