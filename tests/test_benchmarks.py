"""Benchmark scripts follow the product's interfaces."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_ranking_benchmark_measures_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_planted", ROOT / "benchmarks" / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, planted)
    spec.loader.exec_module(planted)
    problem = planted.Problem(planted.Case(seed=1, design="mixed", hidden=16, layers=3, noise="gaussian", decoy_rank=1))
    scores = planted.probe_scores(problem, 0.005, 2, ["update_tail_split"])["update_tail_split"]
    assert set(problem.planted + problem.decoys + problem.clean) <= set(scores)
    assert len({scores[name] for name in problem.planted}) > 1, "the probe moved no matrix"
    assert all(0 <= share <= 1 for share in problem.auc(scores))
