"""Settings: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybrid_rl.algo import PRESETS
from hybrid_rl.algorithms import find_advantage, find_loss
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import load_config, parse_config, setting_names

MINIMAL = {"model": {"path": "m"}, "data": {"train": "a.jsonl", "eval": "b.jsonl"}}
RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def parse(**changes: object) -> Config:
    return parse_config({**MINIMAL, **changes})


def test_defaults_are_resolved():
    config = parse(full={"lr": 2e-6}, lora={"rank": 8})
    assert config.lora_lr == pytest.approx(2e-5)
    assert config.lora.alpha_at(8) == 16


def test_learning_rates_of_adapters():
    assert parse(full={"lr": 2e-6}, adaptation="molf").lora_lr == 2e-6
    config = parse(full={"lr": 2e-6}, plan={"rest": "molf"})
    assert (config.lora_lr, config.probe_lr) == (2e-6, pytest.approx(1e-5))
    assert parse(full={"lr": 2e-6}, adaptation="molf", lora={"lr": 1e-4}).lora_lr == 1e-4


def test_a_preset_fills_in_what_algo_does_not_say():
    config = parse(algorithm="gspo", algo={"clip_high": 0.1})
    assert (config.algo.loss, config.algo.clip_low, config.algo.clip_high) == ("gspo", 3e-4, 0.1)
    again = parse_config(config.model_dump(mode="json"))
    assert again == config
    assert parse(algorithm="dapo").algo.zero_variance == "resample"


def test_another_algorithm_for_resolved_settings_is_another_algorithm(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(parse(algo={"entropy_coef": 0.01}).model_dump(mode="json")))
    config = load_config(path, ["algorithm=gspo", "algo.clip_low=0.1"])
    assert (config.algo.loss, config.algo.clip_low, config.algo.clip_high) == ("gspo", 0.1, 4e-4)
    assert config.algo.entropy_coef == 0.01
    assert load_config(path).algo.loss == "clip"


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_name_settings(name: str):
    config = parse(algorithm=name)
    assert all(getattr(config.algo, field) == value for field, value in PRESETS[name].items())
    find_loss(config.algo.loss)
    find_advantage(config.algo.advantage)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"bacth": {"prompts": 1}}, ["unknown setting bacth", "batch"]),
        ({"lora": {"ranc": 4}}, ["unknown setting lora.ranc", "lora.rank"]),
        ({"zero_stage": 3}, ["unknown setting zero_stage", "learner.zero_stage"]),
        ({"steps": "many"}, ["steps='many'", "integer"]),
        ({"learner": {"zero_stage": 4}}, ["learner.zero_stage=4", "1, 2 or 3"]),
        (
            {"batch": {"prompts": 3, "num_generations": 3}},
            ["batch.prompts", "batch.num_generations", "learner.world_size"],
        ),
        ({"cluster": {"backend": "inline"}}, ["cluster.backend=inline", "learner.world_size=2"]),
        ({"adaptation": "lora", "plan": {"path": "p.json"}}, ["adaptation=lora", "plan.path"]),
        ({"data": {"train": "a", "eval": "b", "template": "no slot"}}, ["data.template", "{prompt}"]),
        (
            {"batch": {"tokens_per_micro_batch": 100}},
            ["batch.tokens_per_micro_batch=100", "sampling.max_completion_length"],
        ),
        ({"rewards": []}, ["rewards", "at least 1"]),
        ({"plan": {"path": "p.json", "score": "random"}}, ["plan.path", "plan.score"]),
        ({"adaptation": "full", "plan": {"budget": {"ratio": 0.2}}}, ["adaptation=full", "plan.budget"]),
        ({"adaptation": "lora", "plan": {"rest": "frozen"}}, ["adaptation=lora", "plan.rest=frozen"]),
        ({"steps": True}, ["steps=true"]),
        ({"full": {"lr": float("inf")}}, ["full.lr=inf"]),
        ({"learner": {"adam_betas": [5, 5]}}, ["learner.adam_betas"]),
        ({"learner": {"offload": "all"}}, ["learner.offload=all", "learner.zero_stage=2"]),
        ({"algorithm": "gspoo"}, ["algorithm='gspoo'", "did you mean gspo?"]),
        ({"algo": {"beta": 0.1}}, ["unknown setting algo.beta", "did you mean algo.kl_coef?"]),
        ({"learner": {"packing": False}}, ["  - learner.packing=false", "truth value"]),
        ({"algo": {"loss": 3}}, ["algo.loss=3"]),
        ({"algo": {"mismatch": "mask", "old_logprobs": "rollout"}}, ["algo.mismatch=mask", "algo.old_logprobs"]),
        ({"algo": {"mismatch_min": 3.0}}, ["algo.mismatch_min=3.0", "algo.mismatch_max"]),
        ({"algo": {"kl_estimator": "k2"}}, ["algo.kl_estimator=k2 does nothing with algo.kl_coef=0.0"]),
        ({"algo": {"loss": "sapo", "clip_high": 0.5}}, ["algo.clip_high=0.5 does nothing with algo.loss=sapo"]),
        ({"algorithm": "cispo", "algo": {"dual_clip": 9.0}}, ["algo.dual_clip=9.0 does nothing with algo.loss=cispo"]),
        ({"algo": {"advantage": "raw", "zero_variance": "drop"}}, ["algo.zero_variance=drop", "algo.advantage=raw"]),
        ({"algo": {"overlong_buffer": 1e-4}}, ["algo.overlong_buffer=0.0001", "sampling.max_completion_length=256"]),
        ({"model": {"path": "m", "attention": "flash_attention_2"}}, ["model.attention", "model.dtype=float32"]),
        ({"learner": {"world_size": 3, "sequence_parallel": 2}}, ["learner.world_size=3", "sequence_parallel=2"]),
        ({"algo": {"dual_clip": 1.1}}, ["algo.dual_clip=1.1", "algo.clip_high"]),
        ({"batch": {"num_generations": 1}}, ["batch.num_generations=1", "greater than or equal to 2"]),
        ({"adaptation": "lora", "adalora": {"every": 2}}, ["adalora.every does nothing", "adaptation=lora"]),
        ({"adaptation": "adalora", "adalora": {"init_rank": 16}}, ["adalora.init_rank=16", "lora.rank=16"]),
        ({"molf": {"top_k": 2}}, ["molf.top_k", "adaptation=hybrid", "plan.rest=lora"]),
        ({"adaptation": "molf", "matryoshka": {"loss": "largest"}}, ["matryoshka.loss", "adaptation=molf"]),
        ({"plan": {"rest": "molf"}, "molf": {"unwrapped": "train"}}, ["molf.unwrapped", "plan.rest=molf"]),
        ({"plan": {"rest": "molf"}, "molf": {"top_k": 9}}, ["molf.top_k=9", "2 experts"]),
        ({"adaptation": "molf", "molf": {"lr_factors": [1.0]}}, ["molf.lr_factors=[1.0]", "1 experts", "2"]),
        ({"adaptation": "molf", "learner": {"optimizer": "deepspeed"}}, ["learner.optimizer=deepspeed", "MoLF"]),
        ({"plan": {"path": "p.json"}, "matryoshka": {"loss": "largest"}}, ["plan.path='p.json'", "matryoshka.loss"]),
        ({"adaptation": "matryoshka", "matryoshka": {"ranks": [4, 2]}}, ["matryoshka.ranks", "must rise"]),
        ({"adaptation": "matryoshka", "lora": {"alpha": 8.0}}, ["lora.alpha=8", "matryoshka"]),
        ({"adaptation": "matryoshka", "matryoshka": {"ranks": [1, 2]}, "lora": {"ranks": {"*": 4}}}, ["lora.ranks"]),
        ({"adaptation": "lora_matched", "plan": {"budget": {"unit": "modules"}}}, ["lora_matched", "plan.budget"]),
        ({"adaptation": "adalora", "adalora": {"warmup": 0.6}}, ["adalora.warmup=0.6", "adalora.final=0.5", "100"]),
        ({"plan": {"rest": "adalora"}, "steps": 1}, ["adalora.final=0.5", "1 updates"]),
    ],
)
def test_bad_settings_name_the_setting_the_value_and_the_fix(changes: dict, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(steps=0, seeed=1, lora={"rank": -1})
    assert all(part in str(caught.value) for part in ("steps=0", "seeed", "lora.rank=-1"))


def test_overrides_replace_the_file(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {train: a.jsonl, eval: b.jsonl}\nfull: {lr: 1e-5}\n")
    config = load_config(
        path, ["full.lr=2e-4", "batch.prompts=64", 'sampling.stop=["\\n"]', "rollout.engine=transformers"]
    )
    assert (config.full.lr, config.batch.prompts, config.rollout.engine) == (2e-4, 64, "transformers")
    assert config.sampling.stop == ["\n"]
    with pytest.raises(ConfigError, match=r"sampling\.stop\[0\]=''"):
        load_config(path, ['sampling.stop=[""]'])


@pytest.mark.parametrize("override", ["steps", "=3", "model.path.x=1", "steps.x=2"])
def test_bad_overrides_are_refused(tmp_path: Path, override: str):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\nsteps: 3\ndata: {train: a.jsonl, eval: b.jsonl}\n")
    with pytest.raises(ConfigError):
        load_config(path, [override])


@pytest.mark.parametrize("text", ["- a\n- b", "{", "a: !!python/object:os.system {}", "\x00", "just text", ""])
def test_files_that_are_no_settings_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(setting_names()) | st.text(max_size=6), inner, max_size=4)
        ),
        max_leaves=8,
    )
)
def test_no_tree_of_settings_gives_anything_but_a_config_or_a_clear_error(tree: object):
    settings = {**MINIMAL, **(tree if isinstance(tree, dict) else {"steps": tree})}
    with contextlib.suppress(ConfigError):  # anything else fails the test
        parse_config(settings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_valid_and_short(path: Path):
    load_config(path)
    assert len(path.read_text().splitlines()) <= 40


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, hybrid_rl.config, hybrid_rl.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
