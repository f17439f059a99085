"""Whole runs with an environment, of the calculator's recipe with a tiny policy and a task that it can do."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.config import ConfigError
from hybrid_rl.config_file import load_config
from hybrid_rl.run_directory import read_metrics
from trainers.grpo import train

RECIPE = Path(__file__).parent.parent.parent / "configs" / "calculator.yaml"
TASK = """
def respond(turns, answer, **columns):
    return f"={answer};"

def length(completions, **columns):
    return [1 / (1 + len(set(c))) + (sum(map(ord, c)) % 7) * 0.01 for c in completions]
"""


def settings(model: Path, directory: Path, *more: str) -> list[str]:
    file = directory / "task.py"
    file.write_text(TASK)
    return [
        *(f"model.path={model}", "model.dtype=float32", "data.train=arithmetic@train", "data.eval=arithmetic@eval"),
        *("data.columns={}", "data.answer_after=null", "data.chat=false", "data.eval_size=4", "eval.k=0"),
        *(f"rollout.environment={file}:respond", "rollout.max_turns=3", f"sampling.stop={[*string.ascii_letters]}"),
        *("sampling.max_completion_length=32", "batch.prompts=4", "batch.num_generations=4", "steps=2"),
        *("adaptation=lora", "lora.rank=4", "full.lr=1.0e-4", "eval.every=0", "checkpoint.every=0"),
        *(f"rewards=[{{plugin: '{file}:length'}}]", "tracking.wandb=disabled", f"run.dir={directory / 'run'}"),
        *more,
    ]


@pytest.mark.parametrize(
    "engine",
    [
        ["rollout.engine=transformers", "cluster.backend=inline", "learner.world_size=1"],
        pytest.param(["rollout.engine=vllm", "learner.world_size=2"], marks=pytest.mark.slow),
    ],
    ids=["transformers", "vllm"],
)
def test_a_run_trains_on_the_policys_tokens_alone(tiny_model: Path, tmp_path: Path, engine: list[str]):
    run = train(load_config(RECIPE, settings(tiny_model, tmp_path, *engine)), name="calculator")
    for row in read_metrics(run.metrics):
        assert row["tokens/given"] > 0
        assert row["tokens/trained"] == row["tokens/generated"]
        assert 1 < row["completions/mean_turns"] <= 3
        assert row["policy/rollout_logprob_diff_max"] < 1e-4, "learner and engine read the same tokens"
        assert row["faults/environment_error"] == row["faults/environment_timeout"] == 0
        lines = (run.rollouts / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        assert len(records) == 16
        assert sum(end - start for r in records for start, end in r["given"]) == row["tokens/given"]
        assert any(f"={r['columns']['answer']};" in r["completion"] for r in records if r["given"])


def test_an_environment_that_is_not_there_is_refused_before_any_worker_starts(tiny_model: Path, tmp_path: Path):
    config = load_config(RECIPE, settings(tiny_model, tmp_path, "rollout.environment=nowhere.py:respond"))
    with pytest.raises(ConfigError, match=r"rollout\.environment: plugin 'nowhere.py:respond' cannot be loaded"):
        train(config, name="refused")
