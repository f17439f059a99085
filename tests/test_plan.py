"""The plan: budget, order, identity, hand edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_rl.components import Matrix
from hybrid_rl.config import ConfigError
from hybrid_rl.plan import AdaptationPlan, build_plan

CANDIDATES = [
    Matrix("l.0.q", "attention", 0, (64, 64)),
    Matrix("l.0.up", "mlp", 0, (192, 64)),
    Matrix("l.1.q", "attention", 1, (64, 64)),
    Matrix("l.1.up", "mlp", 1, (192, 64)),
]
SCORES = {"l.0.q": 1.0, "l.0.up": 3.0, "l.1.q": 2.0, "l.1.up": 0.0}


def build(ratio: float = 0.3, unit: str = "params", rest: str = "lora", scores: dict | None = None, rank: int = 4):
    scores = SCORES if scores is None else scores
    options = {"model": "m", "topology": "attention-only", "method": {}, "seed": 0, "rank": rank, "alpha": 8.0}
    return build_plan(CANDIDATES, scores, ratio=ratio, unit=unit, rest=rest, **options)  # type: ignore[arg-type]


def test_best_scores_are_full_while_they_fit():
    # The budget of 0.3 x 32,768 = 9,830 parameters cannot hold l.0.up (12,288), the best one.
    assert [m.name for m in build().named("full")] == ["l.1.q", "l.0.q"]
    assert [m.name for m in build(0.4).named("full")] == ["l.0.up"]
    assert [m.name for m in build(0.5, unit="modules").named("full")] == ["l.0.up", "l.1.q"]


def test_the_ends_of_the_budget():
    assert len(build(0.0, scores={}).named("lora")) == 4
    assert len(build(1.0, scores={}).named("full")) == 4
    with pytest.raises(ConfigError, match="trains nothing"):
        build(0.0, rest="frozen")


@given(st.floats(0, 1), st.lists(st.floats(0, 1e6), min_size=4, max_size=4), st.sampled_from(["params", "modules"]))
def test_the_budget_is_never_exceeded_and_every_candidate_is_planned_once(ratio: float, values: list[float], unit: str):
    plan = build(ratio, unit, scores=dict(zip(SCORES, values, strict=True)))
    used = plan.totals["full_params" if unit == "params" else "full_modules"]
    assert used <= ratio * plan.totals["candidate_params" if unit == "params" else "candidate_modules"]
    assert sorted(m.name for m in plan.modules) == sorted(SCORES)
    scores = [m.score for m in plan.modules]
    assert scores == sorted(scores, reverse=True)


def test_the_file_is_the_plan(tmp_path: Path):
    plan = build()
    plan.save(tmp_path / "plan.json")
    assert AdaptationPlan.load(tmp_path / "plan.json") == plan
    assert build().to_json() == plan.to_json()
    tree = json.loads(plan.to_json())
    assert set(tree) == {"version", "model", "method", "seed", "hash", "topology", "totals", "modules"}
    assert set(tree["modules"][0]) >= {"name", "component", "layer", "shape", "params", "score", "rank", "treatment"}


def test_a_hand_edit_changes_hash_and_totals(tmp_path: Path):
    plan = build()
    path = tmp_path / "plan.json"
    tree = json.loads(plan.to_json())
    tree["modules"][0] |= {"treatment": "full", "rank": None, "alpha": None}
    path.write_text(json.dumps(tree))
    edited = AdaptationPlan.load(path)
    edited.check_against(CANDIDATES)
    assert edited.hash != plan.hash
    assert edited.totals["full_modules"] == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"name": "l.9.q"}, "does not have"),
        ({"shape": [1, 2]}, "shape"),
        ({"treatment": "loar"}, "treats l.0.up as 'loar'"),
        ({"treatment": "lora", "rank": None}, "without a positive rank"),
        ({"treatment": "lora", "rank": "4", "alpha": 1.0}, "without a positive rank"),
        ({"treatment": "lora", "rank": -2, "alpha": 1.0}, "without a positive rank"),
        ({"treatment": "lora", "rank": 65, "alpha": 1.0}, "lora.rank=65 is larger than l.0.up of shape 192x64"),
        ({"name": "l.1.q", "shape": [64, 64]}, "twice"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(edit: dict, message: str):
    tree = json.loads(build().to_json())
    tree["modules"][0] |= edit
    with pytest.raises(ConfigError, match=message):
        AdaptationPlan.from_json(json.dumps(tree)).check_against(CANDIDATES)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99, "modules": []}', '{"version": 1}'])
def test_files_that_are_no_plans_are_refused(tmp_path: Path, text: str):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a plan"):
        AdaptationPlan.load(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="does not exist"):
        AdaptationPlan.load(tmp_path / "other.json")


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="not finite"):
        build(scores={**SCORES, "l.0.q": float("nan")})
