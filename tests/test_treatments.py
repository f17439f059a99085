"""Settings of treatments -> plans: what is trained beside the candidates, ranks, alphas, and what a plan may say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybrid_rl.components import read_model
from hybrid_rl.config import ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from tests.families import build
from trainers.setup import check_engine, check_plan

MINIMAL = {"model": {"path": "m"}, "data": {"train": "a.jsonl", "eval": "b.jsonl"}}


def plan_of(family: str, **settings: Any) -> AdaptationPlan:
    config = parse_config({**MINIMAL, "lora": {"rank": 4}, **settings})
    anatomy = read_model(build(family))
    flat = dict.fromkeys((c.name for c in select_candidates(anatomy, config.plan)), 0.0)
    return configured_plan(anatomy, config, flat if config.adaptation == "hybrid" else {}, {})


def extras(plan: AdaptationPlan) -> set[str]:
    return {m.name for m in plan.modules if m.extra}


def test_lora_matched_has_as_many_parameters_as_hybrid():
    wide: dict[str, Any] = {"plan": {"budget": {"ratio": 0.3}, "score": "random"}, "lora": {"rank": 2}}
    hybrid = plan_of("llama", **wide).totals["trainable_params"]
    wide["plan"].pop("score")
    matched = plan_of("llama", adaptation="lora_matched", **wide)
    assert {m.treatment for m in matched.modules} == {"lora"}
    assert matched.totals["trainable_params"] == pytest.approx(hybrid, rel=0.15)
    assert matched.method["matched_rank"] == max(m.rank or 0 for m in matched.modules)


def test_bitfit_trains_norms_and_biases_alone():
    plan = plan_of("qwen2", adaptation="bitfit")
    trained = {m.name for m in plan.modules if m.treatment != "frozen"}
    assert trained == extras(plan)
    assert {m.component for m in plan.modules if m.extra} == {"norm", "attention"}
    assert all(name.endswith(("norm", ".bias")) for name in trained)
    assert any(name.endswith("q_proj.bias") for name in trained)


@pytest.mark.parametrize(("family", "unwrapped"), [("qwen2", "train"), ("qwen2", "freeze"), ("falcon_h1", "train")])
def test_molf_trains_what_its_authors_do(family: str, unwrapped: str):
    plan = plan_of(family, adaptation="molf", molf={"unwrapped": unwrapped})
    beside = extras(plan)
    candidates = {m.name for m in plan.candidates}
    biases = {name for name in beside if name.removesuffix(".bias") in candidates}
    assert bool(biases) == (family == "qwen2")
    assert ({"model.norm"} <= beside or "model.final_layernorm" in beside) == (unwrapped == "train")
    assert not any("lm_head" in name or "router" in name for name in beside)
    if unwrapped == "freeze":
        assert beside == biases


def test_molf_alpha_is_the_one_given_and_counts_twice_by_default():
    alpha = {m.alpha for m in plan_of("llama", adaptation="molf", lora={"rank": 4, "alpha": 6.0}).candidates}
    assert alpha == {6.0}
    given: dict[str, Any] = {"molf": {"ranks": [2, 8], "rank_stabilised": False}, "lora": {"alpha": 6.0}}
    assert {m.alpha for m in plan_of("llama", adaptation="molf_efficient", **given).candidates} == {6.0}
    assert {m.alpha for m in plan_of("llama", adaptation="molf").candidates} == {4.0}  # 2 x sqrt(4)
    assert {m.alpha for m in plan_of("llama", adaptation="lora").candidates} == {8.0}


@pytest.mark.parametrize(
    ("treatment", "change", "part"),
    [
        ("matryoshka", {"options": {"ranks": 4, "scaling": "sqrt", "init": "peft", "loss": "sum"}}, "ranks=4"),
        ("matryoshka", {"alpha": 99.0}, "has no alpha"),
        ("molf", {"options": {"ranks": [3], "rank_stabilised": True}}, "do not come to its rank"),
        ("lora", {"options": {"ranks": [4]}}, "options ['ranks']"),
        ("dora", {"rank": None}, "without a positive rank"),
        ("vera", {"treatment": "veera"}, "'veera'"),
    ],
)
def test_plans_that_were_edited_into_nonsense_are_refused(treatment: str, change: dict, part: str):
    tree = json.loads(plan_of("llama", adaptation=treatment).to_json())
    tree["modules"][0] |= change
    with pytest.raises(ConfigError) as caught:
        AdaptationPlan.from_json(json.dumps(tree)).check_against(read_model(build("llama")))
    assert part in str(caught.value)


def test_a_finished_plan_is_compared_with_the_settings(tmp_path):
    path = tmp_path / "plan.json"
    plan_of("llama", adaptation="molf").save(path)
    given = {**MINIMAL, "plan": {"path": str(path)}, "rollout": {"engine": "transformers"}}
    for more, part in (
        ({}, "give lora.lr"),
        ({"lora": {"lr": 1e-6}, "molf": {"top_k": 5}}, "molf.top_k=5"),
        ({"lora": {"lr": 1e-6}, "learner": {"optimizer": "deepspeed"}}, "learner.optimizer=deepspeed"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_plan(parse_config(given | more), build("llama"))
        assert part in str(caught.value)
    _, plan = check_plan(parse_config(given | {"lora": {"lr": 1e-6}}), build("llama"))
    assert plan is not None


def test_a_hybrid_plan_with_molf_is_served_by_vllm_on_recurrent_models():
    """Nothing beside the candidates is trained by it, whatever `adaptation=molf` would train."""
    config = parse_config({**MINIMAL, "plan": {"rest": "molf", "score": "random"}, "lora": {"rank": 4}})
    check_plan(config, build("falcon_h1"))
    with pytest.raises(ConfigError, match=r"molf\.unwrapped=freeze"):
        check_engine(parse_config({**MINIMAL, "adaptation": "molf"}), plan_of("falcon_h1", adaptation="molf"))
