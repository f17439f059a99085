"""Studies whose runs were never made: settings, trials, and results with scores drawn from known effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hybrid_rl.study.analysis import Analysis, analyse
from hybrid_rl.study.settings import Study
from hybrid_rl.study.trials import Result, Trial, choose, final, sweep

_BASE = {
    "model": {"path": "models/none"},
    "data": {"train": "arithmetic@train", "eval": {"validation": "arithmetic@eval", "test": "arithmetic@eval"}},
    "steps": 100,
    "eval": {"k": 2, "every": 50},
}
PROBLEMS = 40


def make_study(directory: Path, methods: Mapping[str, Mapping[str, Any]], *, seeds: int = 5, **more: Any) -> Study:
    """A study over a base file in `directory`; methods' settings as in a study's file."""
    base = directory / "base.yaml"
    base.write_text(yaml.safe_dump(_BASE), encoding="utf-8")
    tree = {"base": str(base), "dir": str(directory / "study"), "seeds": list(range(seeds)), **more}
    return Study.model_validate({**tree, "methods": methods})


def pretend(
    study: Study, level: Callable[[Trial], float], *, tokens: Callable[[Trial], int] = lambda t: 1000
) -> dict[str, Result]:
    """A result of every run, the sweep's too; `level`: what share of the problems it has right, but for noise."""
    found: dict[str, Result] = {}
    chosen: dict[tuple[str, str], Any] = {}
    for stage in (0, 1):
        if stage:
            chosen = {name: choice.rates for name, choice in choose(study, found).items()}
        for t in final(study, chosen) if stage else sweep(study):
            found.setdefault(t.key, _result(t, level(t), tokens(t)))
    return found


def _result(t: Trial, level: float, tokens: int) -> Result:
    draw = np.random.default_rng([t.seed, *t.method.encode()])
    scores = {
        held_out: {metric: list(np.clip(level + 0.1 * draw.standard_normal(PROBLEMS), 0, 1))}
        for held_out in ("validation", "test")
        for metric in ("mean_at_k",)
    }
    rising = [(0, 0.3), (50, (0.3 + level) / 2), (100, level)]
    curve = [{"step": s, "tokens": tokens * s / 100, "seconds": s, "validation/mean_at_k": v} for s, v in rising]
    return Result(
        key=t.key,
        task=t.task,
        method=t.method,
        rates=dict(t.rates),
        seed=t.seed,
        scores=scores,
        curve=curve,
        trained=123456,
        optimizer_bytes=16 * 123456,
        synced_bytes=5 * 2**20,
        tokens=tokens,
        steps=t.config.steps,
        ranking_steps=t.ranking_steps,
        seconds=61.0,
        ranking_seconds=0.0,
        versions={"hybrid-rl": "9.9.9"},
    )


def found_in(study: Study, results: Mapping[str, Result]) -> Analysis:
    choices = choose(study, results)
    trials = final(study, {name: choice.rates for name, choice in choices.items()})
    return analyse(study, results, trials, choices)
