"""A study's runs: which there are, by what key each is known, and what is kept of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hybrid_rl.config import Config
from hybrid_rl.config_file import load_tree, parse_config, set_in
from hybrid_rl.settings import ConfigError
from hybrid_rl.study.settings import Study, filled


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    task: str
    method: str
    rates: tuple[tuple[str, float], ...]
    """The settings that the sweep is over."""
    seed: int
    config: Config
    """Complete, but for `run.dir`."""
    ranking_steps: int = 0
    """Rollout batches that its ranking takes, which its steps are fewer by."""

    @property
    def key(self) -> str:
        """Of what is trained: the same settings have the same key, whatever the study calls them."""
        # Without defaults, so that a new setting does not make all that was run before something else.
        apart = {"run", "cluster", "tracking", "checkpoint"}
        tree = self.config.model_dump(mode="json", exclude=apart, exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        rates = " ".join(f"{name}={value:g}" for name, value in self.rates)
        return " ".join(part for part in (self.task, self.method, rates, f"seed {self.seed}") if part)


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    key: str
    task: str
    method: str
    rates: dict[str, float]
    seed: int
    scores: dict[str, dict[str, list[float]]]
    """By set of held-out problems and metric, the score of every problem."""
    curve: list[dict[str, float]]
    """Of every evaluation: `step`, `tokens` sampled and `seconds` trained so far, and each set's scores."""
    trained: int
    """Parameters."""
    optimizer_bytes: int
    """Gradients, masters and moments, over all ranks."""
    synced_bytes: int
    """Sent to each engine over the run."""
    tokens: int
    """Sampled in training, the ranking's not counted."""
    steps: int
    ranking_steps: int
    """Rollout batches that the ranking took."""
    seconds: float
    """Of training and evaluation, without start-up."""
    ranking_seconds: float
    chosen: list[str] = field(default_factory=list)
    """Matrices that were trained fully, if a score chose them."""
    ranking: dict[str, float] = field(default_factory=dict)
    """Every candidate's score, if a score chose."""
    versions: dict[str, str] = field(default_factory=dict)

    def mean(self, held_out: str, metric: str) -> float:
        return fmean(self.scores[held_out][metric])


def bases(study: Study) -> dict[str, Config]:
    """By the path of each base policy, settings that have it."""
    found: dict[str, Config] = {}
    for seed in {*study.seeds, *(study.sweep_seeds or ())}:
        for task, settings in study.tasks.items():
            tree = filled(load_tree(study.base), seed)
            for name, value in filled(settings, seed).items():
                set_in(tree, name, value)
            config = parse_config(tree, source=f"{study.base} with tasks.{task}")
            found[config.model.path] = config
    return found


def trial(study: Study, task: str, method: str, rates: Mapping[str, float], seed: int) -> Trial:
    """One run's settings, checked. Raises `ConfigError`, naming the method, where they contradict each other."""
    how = study.methods[method]
    tree = filled(load_tree(study.base), seed)
    tree["seed"] = seed
    said: dict[str, Any] = {**filled(study.tasks[task], seed), **filled(how.settings, seed)}
    for name, value in {**said, **rates}.items():
        set_in(tree, name, value)
    config = parse_config(tree, source=f"{study.base} with methods.{method}, tasks.{task}")
    for held_out in sorted({study.choose_on, *study.report_on} - set(config.data.held_out)):
        raise ConfigError(
            f"data.eval of {study.base} has no set {held_out!r}; it has {', '.join(sorted(config.data.held_out))}"
        )
    if study.metric == "mean_at_k" and not config.eval.k:
        raise ConfigError("metric=mean_at_k needs eval.k above 0")
    steps = ranking_steps(config) if study.count_ranking else 0
    if steps:
        if steps >= config.steps:
            raise ConfigError(f"methods.{method}: its ranking samples as much as its {config.steps} steps; make more")
        if score_needs(config) == "updates":
            set_in(tree, "plan.probe.steps", config.probe_steps)  # it is a share of the steps by default
        set_in(tree, "steps", config.steps - steps)
        config = parse_config(tree, source=f"{study.base} with methods.{method}")
    return Trial(task, method, tuple(sorted(rates.items())), seed, config, steps)


def ranking_steps(config: Config) -> int:
    """Rollout batches that making the plan samples."""
    if config.adaptation != "hybrid" or config.plan.given is not None or not 0 < config.plan.budget.ratio < 1:
        return 0
    needs = score_needs(config)
    if needs == "updates":
        return config.probe_steps
    return -(-config.plan.prompts // config.batch.prompts) if needs == "gradients" else 0


def score_needs(config: Config) -> str:
    """What the plan's score is made from."""
    from hybrid_rl.scoring import find_score

    return find_score(config.plan.score).needs


def sweep(study: Study) -> list[Trial]:
    """The runs that choose rates: of methods with several choices, every choice with every sweep seed."""
    return [
        trial(study, task, method, point, seed)
        for seed in study.sweep_seeds or study.seeds
        for task in study.tasks
        for method, how in study.methods.items()
        if len(how.points) > 1
        for point in how.points
    ]


def final(study: Study, chosen: Mapping[tuple[str, str], Mapping[str, float]]) -> list[Trial]:
    """The runs that are reported, with the rates `chosen` by (task, method); without rates there are none."""
    return [
        trial(study, task, method, chosen[task, how.rates_of or method], seed)
        for seed in study.seeds
        for task in study.tasks
        for method, how in study.methods.items()
        if (task, how.rates_of or method) in chosen
    ]


@dataclass(frozen=True)
class Choice:
    """The rates that a method gets on a task, and what they were chosen from."""

    rates: dict[str, float]
    tried: list[tuple[dict[str, float], float | None]]
    """Each choice and its mean validation score, `None` where a run of it is not there."""
    at_edge: bool
    """Whether the best is the first or the last of the grid: the best may lie beyond."""


def choose(study: Study, results: Mapping[str, Result]) -> dict[tuple[str, str], Choice]:
    """Rates by (task, method): those of the best mean validation score over the sweep's seeds, the first listed where
    two are alike. A choice of which a run is not there does not count, and a method without any has no rates."""
    seeds = study.sweep_seeds or study.seeds
    chosen: dict[tuple[str, str], Choice] = {}
    for task in study.tasks:
        for method, how in study.methods.items():
            if how.rates_of is not None:
                continue
            points = how.points
            tried: list[tuple[dict[str, float], float | None]] = []
            for point in points if len(points) > 1 else ():
                keys = [trial(study, task, method, point, seed).key for seed in seeds]
                there = all(k in results for k in keys)
                means = [results[k].mean(study.choose_on, study.metric) for k in keys] if there else []
                tried.append((point, fmean(means) if means else None))
            known = [(score, -i) for i, (_, score) in enumerate(tried) if score is not None]
            if tried and not known:
                continue
            best = -max(known)[1] if known else 0
            chosen[task, method] = Choice(points[best], tried, len(points) > 2 and best in (0, len(points) - 1))
    return chosen


class Results:
    """`results.jsonl`: a line a finished run, written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.by_key: dict[str, Result] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    result = Result(**json.loads(line))
                except json.JSONDecodeError:  # a killed process left half a line
                    continue
                except TypeError as error:
                    raise ConfigError(f"{path} is of another version ({error}); choose another dir") from None
                self.by_key[result.key] = result

    def add(self, result: Result) -> None:
        cut = self._path.is_file() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * bool(cut) + json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the run's own files may be deleted next
        self.by_key[result.key] = result

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those not done yet, each once."""
        return list({t.key: t for t in trials if t.key not in self.by_key}.values())
