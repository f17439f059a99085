"""The small base policy: its architectures, its documents, and what they do to an evaluation that takes the last
answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hybrid_rl.components import read_model
from hybrid_rl.config import ConfigError, WarmStartConfig
from hybrid_rl.config_file import parse_config
from hybrid_rl.data import load_rows
from hybrid_rl.plan_building import select_candidates
from hybrid_rl.study.settings import Study, load_study
from hybrid_rl.study.trials import trial
from rewards.math import accuracy
from trainers.study import check_all
from trainers.warm_start import _document, _Problem, build_model, build_tokenizer, warm_start

SMALL = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "batch": 16, "lr": 3e-3}
STUDIES = {"sequential": "all_layers", "parallel": "all_eligible"}


def configured(path: Path, *, length: int = 28, train: str = "arithmetic:both@train", **settings: Any):
    return parse_config(
        {
            "model": {"path": str(path)},
            "data": {"train": train, "eval": "arithmetic@test"},
            "sampling": {"max_completion_length": length},
            "warm_start": SMALL | settings,
        }
    )


@pytest.mark.parametrize(
    ("architecture", "layers", "topology"),
    [("qwen3", 2, "attention-only"), ("qwen3_5", 4, "sequential-hybrid"), ("falcon_h1", 2, "parallel-hybrid")],
)
def test_architectures_are_trained_and_load_again(tmp_path: Path, architecture: str, layers: int, topology: str):
    config = configured(
        tmp_path / "base", architecture=architecture, layers=layers, steps=3, form="marked", runs_on=0.8
    )
    path = warm_start(config, Console(quiet=True))
    model, loaded = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert model.config.model_type.startswith(architecture)
    assert read_model(model).topology == topology
    untrained = build_model(config.warm_start, build_tokenizer("####"))
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), untrained.parameters(), strict=True)]
    assert all(moved), "every weight takes part"


def test_planted_refuses_what_it_does_not_use(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"architecture='falcon_h1' does nothing with planted"):
        configured(tmp_path, architecture="falcon_h1", planted={})


def test_documents_run_on_until_they_end_or_are_cut():
    tokenizer = build_tokenizer("####")
    config = configured(Path("unused"), form="marked", runs_on=0.7, slips=0.0)
    settings = config.warm_start
    rows = load_rows("arithmetic:both@train", setting="data.train", columns={})
    problems = [_Problem.of(row, tokenizer, config, settings) for row in rows[:50]]
    draw = random.Random(0)
    documents = [_document(problems[0], problems, tokenizer, 28, settings, draw) for _ in range(400)]
    texts = [str(tokenizer.decode(ids)) for ids in documents]
    assert all(text.startswith(f"#### {rows[0]['answer']}") for text in texts)
    one = [text for text in texts if "\n" not in text]
    assert 0.24 < len(one) / len(texts) < 0.36, "the share that does not run on"
    assert all(text.endswith("<|end|>") for text in one)
    cut = [ids for ids in documents if ids[-1] != tokenizer.eos_token_id]
    assert cut
    assert all(len(ids) == 28 for ids in cut)
    assert max(map(len, documents)) <= 29, "as long as a completion, and its end"
    answers = {row["prompt"]: row["answer"] for row in rows}
    for text in texts:
        for line in text.removesuffix("<|end|>").split("\n")[1:-1]:
            prompt, _, answer = line.partition("#### ")
            assert answers[prompt] == answer, "what follows are problems with their own answers"


def test_last_answer_without_a_stop_undercounts_a_policy_that_runs_on(tmp_path: Path):
    """How the headline of arXiv 2604.22127 came about before its correction: problems that a policy solves count as
    wrong since it went on to invent others."""
    rows = load_rows("arithmetic@train", setting="data.train", columns={})[:24]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = configured(
        *(tmp_path / "base",),
        train=str(tmp_path / "train.jsonl"),
        **{"form": "marked", "runs_on": 0.8, "slips": 0.0, "steps": 150, "hidden_size": 64, "batch": 32},
    )
    model: Any = AutoModelForCausalLM.from_pretrained(warm_start(config, Console(quiet=True)))
    tokenizer = build_tokenizer("####")
    prompts = torch.tensor(tokenizer([row["prompt"] for row in rows])["input_ids"])
    torch.manual_seed(0)
    ids = model.generate(prompts.repeat(4, 1), max_new_tokens=28, do_sample=True, top_k=0)[:, prompts.shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    gold = [row["answer"] for row in rows] * 4

    def share(texts: list[str], which: Any) -> float:
        scores = accuracy(completions=texts, answer=gold, extract="marker", which=which)
        return sum(s or 0.0 for s in scores) / len(scores)

    stopped = [text.partition("\n")[0] for text in texts]
    assert share(texts, "first") > 0.8
    assert share(texts, "last") < 0.5 * share(texts, "first")
    assert share(stopped, "last") == share(texts, "first"), "a stop string makes the two the same"


@pytest.mark.parametrize("topology", STUDIES)
def test_placement_studies_are_sound_and_their_matched_ranks_match(topology: str):
    study = load_study(f"configs/studies/placement_{topology}.yaml")
    check_all(study)
    wanted = _trained(study, STUDIES[topology])
    matched = [name for name in study.methods if name.endswith("_matched")]
    assert len(matched) == 3
    for name in matched:
        assert _trained(study, name) == pytest.approx(wanted, rel=0.04), name


def _trained(study: Study, method: str) -> int:
    config = trial(study, "first", method, study.methods[method].points[0], seed=0).config
    assert config.warm_start is not None
    anatomy = read_model(build_model(config.warm_start, build_tokenizer("####")))
    candidates = select_candidates(anatomy, config.plan)
    return sum(min(config.lora.rank, *c.shape) * sum(c.shape) for c in candidates)


def test_default_settings_train_what_they_always_did():
    settings = WarmStartConfig()
    assert (settings.architecture, settings.form, settings.runs_on, settings.data) == ("qwen3", "boxed", 0.0, None)
    tokens = build_tokenizer().tokenize("37+45=\\boxed{82}")
    assert tokens == ["3", "7", "+", "4", "5", "=", "\\boxed{", "8", "2", "}"]
