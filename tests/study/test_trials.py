"""A study's settings, the runs that come of them, and what is kept of these."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid_rl.config import ConfigError
from hybrid_rl.study.settings import Study, filled, load_study
from hybrid_rl.study.trials import Result, Results, Trial, choose, final, ranking_steps, sweep, trial

_BASE = {
    "model": {"path": "models/{seed}"},
    "data": {"train": "arithmetic@train", "eval": {"validation": "arithmetic@validation", "test": "arithmetic@test"}},
    "steps": 50,
}
_METHODS: dict[str, Any] = {
    "full": {"set": {"adaptation": "full"}, "rates": {"full.lr": [1e-5, 1e-4, 1e-3]}},
    "lora": {"set": {"adaptation": "lora"}},
    "hybrid": {"set": {"adaptation": "hybrid"}, "rates_of": "full"},
}


def study_in(directory: Path, **changes: Any) -> Study:
    base = directory / "base.yaml"
    base.write_text(yaml.safe_dump(_BASE))
    tree = {"base": str(base), "methods": _METHODS, "seeds": [0, 1, 2], "sweep_seeds": [0, 1], **changes}
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_study(path)


def result_of(t: Trial, score: float) -> Result:
    scores = {s: {"mean_at_k": [score] * 4, "accuracy": [score] * 4} for s in ("validation", "test")}
    return Result(
        key=t.key,
        task=t.task,
        method=t.method,
        rates=dict(t.rates),
        seed=t.seed,
        scores=scores,
        curve=[],
        trained=1,
        optimizer_bytes=16,
        synced_bytes=1,
        tokens=1,
        steps=50,
        ranking_steps=0,
        seconds=1.0,
        ranking_seconds=0.0,
    )


def test_the_seed_stands_wherever_it_is_named() -> None:
    tree = {"a/{seed}": ["{seed}", 3, {"b": "x{seed}y{seed}"}]}
    assert filled(tree, 7) == {"a/7": ["7", 3, {"b": "x7y7"}]}


def test_runs_are_all_choices_with_the_sweeps_seeds_and_the_chosen_one_with_every_seed(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    swept = sweep(study)
    assert [(t.method, dict(t.rates), t.seed) for t in swept] == [
        ("full", {"full.lr": lr}, seed) for seed in (0, 1) for lr in (1e-5, 1e-4, 1e-3)
    ]
    assert all(t.config.model.path == f"models/{t.seed}" and t.config.seed == t.seed for t in swept)
    told = final(study, {("task", "full"): {"full.lr": 1e-4}, ("task", "lora"): {}})
    assert {t.method for t in told} == set(_METHODS)
    assert {t.seed for t in told} == {0, 1, 2}
    assert all(t.config.full.lr == 1e-4 for t in told if t.method in ("full", "hybrid"))
    # A sweep's run with the chosen rate is not made again.
    assert {t.key for t in swept if dict(t.rates) == {"full.lr": 1e-4}} <= {t.key for t in told}


def test_methods_share_prompts_and_rollouts(tmp_path: Path) -> None:
    """What is sampled is decided by the base: a ranking's rollout batches are taken off the steps."""
    study = study_in(tmp_path)
    hybrid, lora = (trial(study, "task", m, {}, 0) for m in ("hybrid", "lora"))
    assert (hybrid.config.steps, hybrid.ranking_steps, lora.config.steps, lora.ranking_steps) == (42, 8, 50, 0)
    assert hybrid.config.probe_steps == 8
    for section in ("batch", "sampling", "data"):
        assert getattr(hybrid.config, section) == getattr(lora.config, section)
    uncounted = trial(study_in(tmp_path, count_ranking=False), "task", "hybrid", {}, 0)
    assert (uncounted.config.steps, uncounted.ranking_steps, ranking_steps(uncounted.config)) == (50, 0, 8)
    gradients = {"methods": {"hybrid": {"set": {"plan.score": "grad_norm"}}}}
    assert (
        trial(study_in(tmp_path, **gradients), "task", "hybrid", {}, 0).ranking_steps == 4
    )  # 128 of 32 prompts a step
    control = {"methods": {"hybrid": {"set": {"plan.score": "random"}}}}
    assert trial(study_in(tmp_path, **control), "task", "hybrid", {}, 0).ranking_steps == 0


def test_the_rate_with_the_best_validation_score_is_chosen(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    score = {1e-5: 0.2, 1e-4: 0.6, 1e-3: 0.6}
    results = {t.key: result_of(t, score[t.config.full.lr]) for t in sweep(study)}
    choice = choose(study, results)["task", "full"]
    assert choice.rates == {"full.lr": 1e-4}  # the smaller of two that are alike
    assert not choice.at_edge
    other = {
        k: replace(r, scores={**r.scores, "test": {"mean_at_k": [0.9 - r.rates["full.lr"]]}})
        for k, r in results.items()
    }
    assert choose(study, other)["task", "full"] == choice  # what the test set says does not matter
    score = {1e-5: 0.2, 1e-4: 0.3, 1e-3: 0.9}
    results = {t.key: result_of(t, score[t.config.full.lr]) for t in sweep(study)}
    assert choose(study, results)["task", "full"].at_edge


def test_results_survive_a_line_that_was_cut(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    first, second, *_ = sweep(study)
    path = tmp_path / "results.jsonl"
    Results(path).add(result_of(first, 0.5))
    with path.open("a") as file:
        file.write(json.dumps(asdict(result_of(second, 0.5)))[:40])
    results = Results(path)
    assert results.missing([first, second]) == [second]
    results.add(result_of(second, 0.7))
    assert set(Results(path).by_key) == {first.key, second.key}


def test_a_run_is_known_by_what_it_trains(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    one = trial(study, "task", "lora", {}, 0)
    run = one.config.run.model_copy(update={"dir": "x"})
    assert one.key == replace(one, config=one.config.model_copy(update={"run": run})).key
    keys = {trial(study, "task", m, {}, seed).key for m in ("lora", "full") for seed in (0, 1)}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compare": [["full", "fulll"]]}, "'fulll' is no method, pool or curve"),
        ({"seeds": [1, 1]}, "has a seed twice"),
        ({"seeds": []}, "seeds"),
        ({"methods": {"a": {"rates": {"full.lr": [1.0], "lora.lr": [1.0, 2.0]}}}}, "different lengths"),
        ({"methods": {"a": {"rates": {"full.lr": [1.0]}, "rates_of": "b"}, "b": {}}}, "drop one"),
        ({"methods": {"a": {"rates_of": "b"}}}, "must be a method with rates of its own"),
        ({"methods": {"a": {"pool": "b"}, "b": {}}}, "both a method and a pool"),
        ({"curves": {"c": {"ranks": [1, 2, 4], "methods": ["full", "lora"]}}}, "give as many, or one"),
        ({"curves": {"c": {"ranks": [2, 1], "methods": ["full"]}}}, "must rise"),
        ({"curves": {"full": {"ranks": [1, 2], "methods": ["full"]}}}, "is a method or pool too"),
        (
            {"curves": {"c": {"ranks": [1, 2], "methods": ["full"]}}, "compare": [["c", "full"]]},
            "area is compared with",
        ),
        ({"recovery": {"of": "full", "over": "dora"}}, "'dora' is no method"),
        ({"metrics": "x"}, "metrics"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        study_in(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"a": {"set": {"adaptation": "lorra"}}}}, "methods.a(.|\n)*adaptation"),
        ({"methods": {"a": {"set": {"full.lrr": 1.0}}}}, "unknown setting full.lrr"),
        ({"choose_on": "dev"}, "has no set 'dev'; it has test, validation"),
        ({"tasks": {"short": {"eval.k": 0}}}, "eval.k above 0"),
        ({"tasks": {"short": {"steps": 8}}, "methods": {"a": {}}}, "its ranking samples as much"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    ],
)
def test_runs_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    study = study_in(tmp_path, **changes)
    with pytest.raises(ConfigError, match=said):
        trial(study, next(iter(study.tasks)), next(iter(study.methods)), {}, 0)


@pytest.mark.parametrize("path", sorted(Path("configs/studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_study_can_be_run(path: Path) -> None:
    study = load_study(path)
    for task in study.tasks:
        for method, how in study.methods.items():
            for point in study.methods[how.rates_of or method].points:
                assert trial(study, task, method, point, study.seeds[-1]).config.data.train
