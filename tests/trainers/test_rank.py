"""Ranking end to end: tiny models of several architectures, engines and learner in one process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM

from hybrid_rl import register_score
from hybrid_rl.cli import main
from hybrid_rl.components import read_model
from hybrid_rl.config import ConfigError, LoraConfig, PlanConfig
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.worker import LearnerWorker
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan, select_candidates
from hybrid_rl.scoring import per_module
from tests.families import FAMILIES
from trainers import rank, setup
from trainers.grpo import train
from trainers.rank import rank_dry_run, rank_modules
from trainers.sizing import Sizing
from trainers.warm_start import build_tokenizer

PLUGIN = '''
def shortness(completions, **columns):
    """Never the same for a whole group, so that every step trains."""
    return [1.0 / (1 + len(set(c))) + (sum(map(ord, c)) % 7) * 0.01 for c in completions]
'''


def saved(family: str, path: Path) -> Path:
    """A tiny model of the family with the quick start's tokenizer."""
    tokenizer = build_tokenizer()
    config = FAMILIES[family]()
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = tokenizer.pad_token_id, None, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tree(tiny_tree: dict, tmp_path: Path) -> dict[str, Any]:
    """Everything in this process, with a reward that a random policy gets something out of."""
    plugin = tmp_path / "shortness.py"
    plugin.write_text(PLUGIN)
    small = {"cluster": {"backend": "inline"}, "learner": {"world_size": 1}, "rollout": {"engine": "transformers"}}
    return {**tiny_tree, **small, "rewards": [{"plugin": f"{plugin}:shortness"}], "full": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("family", "topology"),
    [
        ("qwen3_5", "sequential-hybrid"),
        ("falcon_h1", "parallel-hybrid"),
        ("qwen3_moe", "attention-only"),
        ("zamba2", "mixed-hybrid"),
    ],
)
def test_rank_from_the_command_line(family: str, topology: str, tree: dict, tmp_path: Path, write_config, capfd):
    tree["model"] = {"path": str(saved(family, tmp_path / family))}
    tree["plan"] |= {
        "probe": {"steps": 2, "mini_batches": 4},
        "also_full": ["*.mlp.gate"] if family == "qwen3_moe" else [],
    }
    out = tmp_path / "plan.json"
    assert main(["rank", str(write_config(tree)), "--out", str(out)]) == 0
    plan = AdaptationPlan.load(out)
    assert plan.topology == topology
    assert 0 < plan.totals["full_params"] - plan.totals["extra_params"] <= 0.1 * plan.totals["candidate_params"]
    assert len({m.score for m in plan.candidates}) > 4
    assert out.with_suffix(".png").stat().st_size > 5000
    for m in plan.modules:
        if m.treatment == "frozen":
            assert m.note
    if family == "qwen3_moe":
        assert plan.totals["extra_modules"] == 2
    shown = capfd.readouterr().out
    assert plan.modules[0].name in shown
    assert plan.hash in shown


def test_the_same_settings_give_the_same_bytes_and_a_comparison_says_so(
    tree: dict, tmp_path: Path, write_config, capfd
):
    config = str(write_config(tree))
    one, two, other = (tmp_path / f"{name}.json" for name in ("one", "two", "other"))
    assert main(["rank", config, "--out", str(one)]) == 0
    assert main(["rank", config, "--out", str(two), "--compare", str(one)]) == 0
    assert one.read_bytes() == two.read_bytes()
    assert "(100% of those trained in either)" in capfd.readouterr().out
    assert main(["rank", config, "plan.score=last_layers", "--out", str(other), "--compare", str(one)]) == 0
    assert "modules treated otherwise" in capfd.readouterr().out
    assert main(["rank", config, "--out", str(two), "--compare", str(tmp_path / "none.json")]) == 2
    assert "--compare" in capfd.readouterr().err


@pytest.mark.parametrize(("score", "starts"), [("grad_tail_split", 2), ("weight_spectral", 1), ("random", 0)])
def test_cheaper_scores_start_no_more_than_they_need(
    score: str, starts: int, tree: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A learner and an engine, the learner alone, nothing."""
    started: list[str] = []
    for name in ("_start_learner", "_start_engine"):
        start = getattr(setup, name)
        monkeypatch.setattr(setup, name, lambda *a, n=name, s=start: (started.append(n), s(*a))[1])
    plan = rank_modules(parse_config({**tree, "plan": {"score": score, "prompts": 8}}))
    assert len(started) == starts
    assert ("plan.prompts not used" in caplog.text) == (score != "grad_tail_split")
    assert plan.method["score"] == score
    assert plan.named("full")


def test_a_score_of_ones_own_ranks(tree: dict):
    @register_score("longest_name", needs="gradients")
    @per_module
    def longest_name(found, context) -> float:
        """Characters of the name."""
        assert found.gradient is not None
        return float(len(found.weight.name))

    plan = rank_modules(parse_config({**tree, "plan": {"score": "longest_name", "prompts": 4}}))
    assert plan.modules[0].name == max((m.name for m in plan.modules), key=lambda n: (len(n), [-ord(c) for c in n]))


def test_a_dry_run_needs_only_the_shape(tree: dict, tmp_path: Path, write_config, capfd):
    """An 8B model on `meta`: nothing but its config.json is there."""
    shape = transformers.Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
    )
    shape.save_pretrained(tmp_path / "8b")
    tree |= {"model": {"path": str(tmp_path / "8b"), "dtype": "bfloat16"}, "data": {"train": "none", "eval": "none"}}
    assert main(["rank", str(write_config({**tree, "lora": {"rank": 16}})), "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "252 matrices, 6,945,767,424 of the model's 8,190,735,360 parameters" in shown
    assert "694,576,742 parameters, or 25 matrices" in shown
    assert float(shown.partition("% of the model's bytes")[0].rpartition("(")[2]) <= 2.0


@pytest.mark.parametrize(
    ("changes", "label", "besides"),
    [
        ({"adaptation": "molf"}, "molf", True),
        ({"plan": {"rest": "dora"}}, "hybrid, dora", True),
        ({"adaptation": "lora"}, "LoRA", False),
        ({"plan": {"rest": "lora"}}, "hybrid, by params", False),
        ({"plan": {"budget": {"unit": "modules"}}}, "hybrid, by modules", False),
    ],
)
def test_a_dry_run_shows_the_plan_that_is_configured(
    changes: dict, label: str, besides: bool, tree: dict, monkeypatch: pytest.MonkeyPatch
):
    """With what a weight update of it carries, and what a KL term keeps."""
    sized: list[Sizing] = []
    shown = rank.memory_table
    monkeypatch.setattr(rank, "memory_table", lambda sizing: (sized.append(sizing), shown(sizing))[1])
    console = Console(width=250, record=True, quiet=False, file=io.StringIO())
    config = parse_config({**tree, **changes, "lora": {"rank": 4}, "algo": {"kl_coef": 0.1}})
    rank_dry_run(config, console)
    assert f"{label} (configured)" in console.export_text()
    by_plan = sized[0].by_plan
    assert next(iter(by_plan)) == sized[0].configured == label
    assert set(by_plan) == {"full", "LoRA", "hybrid, by params", "hybrid, by modules"} | ({label} if besides else set())
    anatomy, _ = setup.check_plan(config, setup.meta_model(config))
    matrices = select_candidates(anatomy, config.plan)
    assert by_plan["LoRA"].update == 4 * sum(4 * sum(m.shape) for m in matrices)
    whole = 4 * sum(m.params for m in matrices)
    kept = {name: sizes.learner.host.get("base policy for the KL", 0) for name, sizes in by_plan.items()}
    assert (kept["LoRA"], kept["full"]) == (0, whole)
    if besides:
        update = by_plan[label].update
        assert update >= whole  # merged on the way; norms are trained besides under MoLF
        assert kept[label] == (update if label == "molf" else kept["hybrid, by params"])


def test_a_hand_edited_plan_trains_exactly_what_it_lists(tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "edited.json"
    plan = rank_modules(parse_config({**tree, "plan": {"score": "random"}}))
    edit = json.loads(plan.to_json())
    for m in edit["modules"]:
        m |= {"treatment": "frozen", "rank": None, "alpha": None}
    names = [m["name"] for m in edit["modules"]]
    full, low = names.index("model.layers.1.mlp.up_proj"), names.index("model.layers.0.self_attn.k_proj")
    edit["modules"][full]["treatment"] = "full"
    edit["modules"][low] |= {"treatment": "lora", "rank": 3, "alpha": 6.0}
    path.write_text(json.dumps(edit))

    built: list[LearnerWorker] = []
    build = LearnerWorker.build
    monkeypatch.setattr(LearnerWorker, "build", lambda self, *args: (built.append(self), build(self, *args))[1])
    run = train(parse_config({**tree, "plan": {"path": str(path)}}), name="edited")
    (worker,) = built
    trained = {name: p for name, p in worker._model.named_parameters() if p.requires_grad}
    expected = {names[full] + ".weight": 0} | {f"{names[low]}.lora_{f}.default.weight": 1 for f in "AB"}
    assert trained.keys() == expected.keys()
    for name, group in expected.items():
        assert any(p is trained[name] for p in worker._engine._optimizer.bit16_groups[group])
    assert sum(len(group) for group in worker._engine._optimizer.bit16_groups) == 3
    assert AdaptationPlan.load(run.plan).hash == AdaptationPlan.load(path).hash


def test_a_plan_of_another_model_is_refused_with_what_differs(tree: dict, tmp_path: Path):
    path = tmp_path / "plan.json"
    rank_modules(parse_config({**tree, "plan": {"score": "random"}})).save(path)
    other = {**tree, "model": {"path": str(saved("qwen2", tmp_path / "other"))}, "plan": {"path": str(path)}}
    with pytest.raises(ConfigError, match=r"made for another model.*\n.*of another shape, e.g. model.layers"):
        train(parse_config(other), name="other")


def test_bad_input_is_refused_before_any_worker_starts(tree: dict, tmp_path: Path, write_config, capfd):
    config = str(write_config(tree))
    out = ["--out", str(tmp_path / "plan.json")]
    for override, message in (
        ("plan.score=update_tail_spilt", "did you mean update_tail_split"),
        ("plan.placement=recurrent", "this attention-only model has no such matrices"),
        ("plan.placement=atention", "'atention' is no component"),
        ("plan.also_full=[nothing*]", "matches no weight by its full name"),
        ("lora.ranks={nothing: 4}", "lora.ranks: 'nothing' matches no candidate"),
        ("plan.components={nothing: mlp}", "nothing"),
        ("plan.path=x.json", "nothing to rank"),
        ("plan.exclude=[q_proj]", "did you mean '*q_proj*'?"),
        ("plan.also_full=[*norm*]", "put quotes around a pattern"),
        ("plan.budget.quotas={mpl: 0.5}", "there are attention, mlp"),
    ):
        assert main(["rank", config, override, *out]) == 2, override
        assert message in capfd.readouterr().err
    assert main(["rank", config]) == 2
    assert "--out" in capfd.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_of_a_shallower_model_is_refused(tree: dict, tmp_path: Path):
    path = tmp_path / "plan.json"
    shallow, deep = FAMILIES["qwen3"](), FAMILIES["qwen3"]()
    deep.num_hidden_layers = shallow.num_hidden_layers + 1
    deep.layer_types = None
    anatomies = []
    for config in (shallow, deep):
        with torch.device("meta"):
            anatomies.append(read_model(AutoModelForCausalLM.from_config(type(config)(**config.to_dict()))))
    scores = {w.name: 1.0 for w in anatomies[0].candidates}
    options = {"model": "shallow", "method": {}, "seed": 0, "ratio": 0.1}
    build_plan(anatomies[0], scores, settings=PlanConfig(), lora=LoraConfig(rank=2), **options).save(path)
    plan = AdaptationPlan.load(path)
    plan.check_against(anatomies[0])
    with pytest.raises(ConfigError, match="7 of this model's candidates are not in the plan"):
        plan.check_against(anatomies[1])


def test_without_any_signal_the_plan_is_still_made_and_said(
    tree: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    plugin = tmp_path / "nothing.py"
    plugin.write_text("def nothing(completions, **columns):\n    return [0.0 for _ in completions]\n")
    plan = rank_modules(parse_config({**tree, "rewards": [{"plugin": f"{plugin}:nothing"}]}))
    assert plan.named("full")
    assert not plan.named("frozen")
    assert "saw 0 and 0 completions" in caplog.text


def test_a_score_that_fails_is_named(tree: dict):
    for name, result, message in (
        ("of_zero", lambda: 1 / 0, "plan.score=of_zero failed: ZeroDivisionError"),
        ("of_text", lambda: "hi", "plan.score=of_text failed: ValueError"),
        ("of_nothing", lambda: float("nan"), "the score nan, which is no number"),
    ):
        register_score(name, needs="structure")(per_module(lambda found, context, result=result: result()))
        with pytest.raises(ConfigError, match=message):
            rank_modules(parse_config({**tree, "plan": {"score": name}}))
