"""The plan: budget, order, identity, hand edits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_rl.components import Anatomy, Weight, read_model
from hybrid_rl.config import BudgetConfig, ConfigError, LoraConfig, PlanConfig
from hybrid_rl.placement import PLACEMENTS
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan, select_candidates
from hybrid_rl.plan_difference import compare_plans


def weight(name: str, component: str, layer: int | None, shape: tuple[int, ...], **more) -> Weight:
    defaults = {"parameter": f"{name}.weight", "linear": len(shape) == 2, "slices": (), "tied": ()}
    defaults |= {"no_lora": None, "quantised": False}
    return Weight(name=name, component=component, layer=layer, shape=shape, **{**defaults, **more})  # type: ignore[arg-type]


WEIGHTS = [
    weight("embed", "embedding", None, (100, 64), linear=False, tied=("lm_head",)),
    weight("l.0.q", "attention", 0, (64, 64)),
    weight("l.0.up", "mlp", 0, (192, 64)),
    weight("l.0.router", "router", 0, (4, 64), linear=False),
    weight("l.1.q", "attention", 1, (64, 64)),
    weight("l.1.up", "mlp", 1, (192, 64)),
    weight("l.1.norm", "norm", 1, (64,)),
]
ANATOMY = Anatomy("attention-only", tuple(WEIGHTS), {})
SCORES = {"l.0.q": 1.0, "l.0.up": 3.0, "l.1.q": 2.0, "l.1.up": 0.0}


def build(ratio: float = 0.3, unit: str = "params", *, scores=None, anatomy=ANATOMY, lora=None, unreached=(), **plan):
    budget = {"unit": unit, **{k: plan.pop(k) for k in ("fill", "quotas") if k in plan}}
    chosen = PlanConfig(budget=BudgetConfig(**budget), **plan)
    return build_plan(
        anatomy,
        SCORES if scores is None else scores,
        model="m",
        method={},
        seed=0,
        ratio=ratio,
        settings=chosen,
        lora=LoraConfig(rank=4, alpha=8.0, **(lora or {})),
        unreached=unreached,
    )


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
    total = plan.totals["candidate_params" if unit == "params" else "candidate_modules"]
    assert used <= ratio * total * (1 + 1e-9)
    assert sorted(m.name for m in plan.modules) == sorted(SCORES)
    scores = [m.score for m in plan.modules]
    assert scores == sorted(scores, reverse=True)


def test_the_file_is_the_plan(tmp_path: Path):
    plan = build()
    plan.save(tmp_path / "plan.json")
    assert AdaptationPlan.load(tmp_path / "plan.json") == plan
    assert build().to_json() == plan.to_json()
    tree = json.loads(plan.to_json())
    assert set(tree) == {
        *("version", "model", "architecture", "method", "seed", "hash", "topology", "totals", "modules")
    }
    assert set(tree["modules"][0]) >= {"name", "component", "layer", "shape", "params", "score", "rank", "treatment"}


def test_a_hand_edit_changes_hash_and_totals(tmp_path: Path):
    plan = build()
    path = tmp_path / "plan.json"
    tree = json.loads(plan.to_json())
    tree["modules"][0] |= {"treatment": "full", "rank": None, "alpha": None}
    path.write_text(json.dumps(tree))
    edited = AdaptationPlan.load(path)
    edited.check_against(ANATOMY)
    assert edited.hash != plan.hash
    assert edited.totals["full_modules"] == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"name": "l.9.q"}, "1 modules that this model does not have, e.g. l.9.q"),
        ({"shape": [1, 2]}, r"another shape, e.g. l.0.up \(1, 2\), here \(192, 64\)"),
        ({"treatment": "loar"}, "treats l.0.up as 'loar'"),
        ({"treatment": "lora", "rank": None}, "without a positive rank"),
        ({"treatment": "lora", "rank": "4", "alpha": 1.0}, "without a positive rank"),
        ({"treatment": "lora", "rank": -2, "alpha": 1.0}, "without a positive rank"),
        ({"treatment": "lora", "rank": 65, "alpha": 1.0}, "l.0.up of shape 192x64 the rank 65"),
        ({"name": "l.1.q", "shape": [64, 64]}, "twice"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(edit: dict, message: str):
    tree = json.loads(build().to_json())
    tree["modules"][0] |= edit
    with pytest.raises(ConfigError, match=message):
        AdaptationPlan.from_json(json.dumps(tree)).check_against(ANATOMY)


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


def test_prefix_stops_where_skip_goes_on_and_knapsack_finds_the_best_set():
    # Budget 0.5 x 32,768 = 16,384: l.0.up (12,288) and one q (4,096) fit.
    assert {m.name for m in build(0.5).named("full")} == {"l.0.up", "l.1.q"}
    assert {m.name for m in build(0.3, fill="prefix").named("full")} == set()
    # Scores are a parameter's: two q's of 2.0 are worth 16,384; up is worth 36,864 at 3.0, and 15,974 at 1.3.
    scores = {"l.0.q": 2.0, "l.0.up": 3.0, "l.1.q": 2.0, "l.1.up": 0.0}
    assert {m.name for m in build(0.4, scores=scores, fill="knapsack").named("full")} == {"l.0.up"}
    scores["l.0.up"] = 1.3
    assert {m.name for m in build(0.4, scores=scores, fill="knapsack").named("full")} == {"l.0.q", "l.1.q"}


@given(
    st.floats(0.01, 0.99),
    st.lists(st.floats(0, 10), min_size=4, max_size=4),
    st.sampled_from(["params", "modules"]),
    st.floats(0.1, 1.0),
)
@settings(max_examples=50, deadline=None)
def test_knapsack_is_the_best_of_all_subsets(ratio: float, values: list[float], unit: str, quota: float):
    scores = dict(zip(SCORES, values, strict=True))
    plan = build(ratio, unit, scores=scores, fill="knapsack", quotas={"mlp": quota})
    cost = {m.name: m.params if unit == "params" else 1 for m in plan.modules}
    total = ratio * sum(cost.values())

    def value(names: Iterable[str]) -> float:
        return sum(scores[n] * cost[n] for n in names)

    def allowed(names: tuple[str, ...]) -> bool:
        mlp = sum(cost[n] for n in names if "up" in n)
        return sum(cost[n] for n in names) <= total * (1 + 1e-9) and mlp <= quota * total * (1 + 1e-9)

    subsets = [s for k in range(5) for s in itertools.combinations(SCORES, k) if allowed(s)]
    chosen = tuple(m.name for m in plan.named("full"))
    assert allowed(chosen)
    tolerance = 1e-6 * max(value([name]) for name in SCORES)
    assert value(chosen) == pytest.approx(max(value(s) for s in subsets), rel=1e-6, abs=tolerance + 1e-9)


def test_a_quota_caps_a_component():
    free, capped = build(0.6), build(0.6, quotas={"mlp": 0.5})
    assert {m.name for m in free.named("full")} == {"l.0.up", "l.1.q"}
    assert {m.name for m in capped.named("full")} == {"l.0.q", "l.1.q"}
    with pytest.raises(ConfigError, match="quotas names recurrent"):
        build(quotas={"recurrent": 0.5})


def test_patterns_choose_candidates_and_extras():
    plan = build(0.5, scores={"l.0.q": 1.0, "l.1.q": 2.0}, placement="attention", also_full=["*.router", "l.1.norm"])
    assert [m.name for m in plan.modules] == ["l.1.q", "l.0.q", "l.0.router", "l.1.norm"]
    assert [m.treatment for m in plan.modules] == ["full", "lora", "full", "full"]
    assert plan.totals["extra_params"] == 4 * 64 + 64
    assert plan.totals["candidate_params"] == 2 * 64 * 64
    only = select_candidates(ANATOMY, PlanConfig(placement="attention", include=["l.1.up"], exclude=["l.0.*"]))
    assert [w.name for w in only] == ["l.1.q", "l.1.up"]
    for setting in ("include", "exclude", "also_full"):
        with pytest.raises(ConfigError, match=f"plan.{setting}: 'l.7.*' matches no"):
            build(**{setting: ["l.7.*"]})
    with pytest.raises(ConfigError, match="a candidate that the budget decides on"):
        build(also_full=["l.0.q"])
    with pytest.raises(ConfigError, match="has no such matrices"):
        build(placement="recurrent")


def test_ranks_by_pattern_keep_their_scaling_and_fit_the_matrix():
    plan = build(0.0, scores={}, lora={"ranks": {"*.q": 64, "l.1.*": 2}})
    by_name = {m.name: m for m in plan.modules}
    assert {n: m.rank for n, m in by_name.items()} == {"l.0.q": 64, "l.0.up": 4, "l.1.q": 2, "l.1.up": 2}
    assert all((m.alpha or 0) / (m.rank or 1) == 2.0 for m in plan.modules)
    low = Anatomy("attention-only", (weight("l.0.b", "mlp", 0, (3, 64)),), {})
    (module,) = build(0.0, scores={}, anatomy=low).modules
    assert (module.rank, module.alpha) == (3, 6.0)
    assert module.note == "rank 4 lowered to 3: the matrix is 3x64"


def test_what_cannot_be_trained_as_asked_is_handled_or_refused():
    odd = Anatomy(
        "attention-only",
        (
            weight("l.0.out", "recurrent", 0, (64, 64), no_lora="it is bypassed"),
            weight("l.0.q8", "attention", 0, (64, 64), quantised=True),
            weight("l.0.dead", "attention", 0, (64, 64)),
            weight("l.0.q", "attention", 0, (64, 64)),
        ),
        {},
    )
    scores = {"l.0.out": 1.0, "l.0.q8": 9.0, "l.0.dead": 8.0, "l.0.q": 2.0}
    plan = build(0.25, scores=scores, anatomy=odd, unreached={"l.0.dead"})
    got = {m.name: (m.treatment, m.note) for m in plan.modules}
    assert got == {
        "l.0.q8": ("lora", None),
        "l.0.dead": ("frozen", "no gradient reaches it"),
        "l.0.q": ("full", None),
        "l.0.out": ("frozen", "no adapter can serve it: it is bypassed"),
    }
    tree = json.loads(plan.to_json())
    for i, treatment, message in (
        (0, "full", "l.0.q8 is quantised"),
        (3, "lora", "as lora, but it is bypassed"),
    ):
        edited = json.loads(json.dumps(tree))
        edited["modules"][i] |= {"treatment": treatment, "rank": 4, "alpha": 8.0}
        with pytest.raises(ConfigError, match=message):
            AdaptationPlan.from_json(json.dumps(edited)).check_against(odd)
    tied = Anatomy("attention-only", (*WEIGHTS, weight("lm_head", "lm_head", None, (100, 64), tied=("embed",))), {})
    with pytest.raises(ConfigError, match="lm_head is tied to embed"):
        build(scores={**SCORES, "lm_head": 1.0}, anatomy=tied, include=["lm_head"])
    with pytest.raises(ConfigError, match="embed is tied to lm_head"):
        build(also_full=["embed"])


def test_comparing_plans():
    one, two = build(0.5), build(0.5, scores={"l.0.q": 3.0, "l.0.up": 1.0, "l.1.q": 2.0, "l.1.up": 0.5})
    assert {m.name for m in two.named("full")} == {"l.0.q", "l.1.q"}
    difference = compare_plans(one, two)
    assert difference.same_full == 1
    assert difference.full_overlap == pytest.approx(1 / 3)
    assert difference.rank_correlation == pytest.approx(0.2)  # ranks 2 4 3 1 against 4 2 3 1: 1 - 6 x 8 / 60
    assert difference.moved == (("l.0.up", "full", "lora r=4"), ("l.0.q", "lora r=4", "full"))
    assert compare_plans(one, one).moved == ()


# Modules and LoRA parameters at rank 16 that arXiv 2604.22127 lists for its six conditions of each model.
SEQUENTIAL = {
    "softmax_only": (24, 1_081_344),
    "gdn_only": (90, 4_432_896),
    "mlp_only": (72, 5_308_416),
    "softmax_plus_mlp": (96, 6_389_760),
    "gdn_plus_mlp": (162, 9_741_312),
    "all_layers": (186, 10_822_656),
}
PARALLEL = {
    "attention_only": (108, 2_211_840),
    "ssm_only": (36, 2_520_576),
    "mlp_only": (108, 5_308_416),
    "attention_plus_mlp": (216, 7_520_256),
    "ssm_plus_mlp": (144, 7_828_992),
    "all_eligible": (289, 11_466_496),
}


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_published_placements_are_exact(kind: str):
    if kind == "sequential":  # Qwen3.5-0.8B
        shape = transformers.Qwen3_5TextConfig(
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
        )
        conditions = SEQUENTIAL
    else:  # Falcon-H1-0.5B
        shape = transformers.FalconH1Config(
            vocab_size=32784,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=36,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            mamba_d_ssm=1536,
            mamba_n_heads=24,
            mamba_d_head=64,
            mamba_d_state=128,
            mamba_n_groups=1,
        )
        conditions = PARALLEL
    with torch.device("meta"):
        anatomy = read_model(transformers.AutoModelForCausalLM.from_config(shape))
    for name, (modules, params) in conditions.items():
        chosen = select_candidates(anatomy, PlanConfig(placement=name))
        assert (len(chosen), sum(16 * sum(w.shape) for w in chosen)) == (modules, params), name
    assert {*SEQUENTIAL, *PARALLEL, "all"} == set(PLACEMENTS)
