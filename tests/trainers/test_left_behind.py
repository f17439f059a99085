"""What a whole run leaves behind: everything that is promised, and no secret in any file of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hybrid_rl.config_file import parse_config
from hybrid_rl.run_directory import read_metrics
from trainers.grpo import train

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789marker-wandb",
    "HF_TOKEN": "hf_marker0of0hugging0face",
    "JUDGE_API_KEY": "sk-marker-of-the-judge-key",
    "DATABASE_PASSWORD": "marker of a password",
}
PLUGIN = '''
import os

def careless(completion, **columns):
    """Says its key wherever a reward can say something."""
    print("the key is", os.environ["JUDGE_API_KEY"], flush=True)
    if len(completion) % 2:
        return 0.0
    raise RuntimeError(f"401: wrong key {os.environ['JUDGE_API_KEY']}, password {os.environ['DATABASE_PASSWORD']}")

def careful(completions, log_extra=None, **columns):
    if log_extra:
        log_extra("asked with", [os.environ["HF_TOKEN"]] * len(completions))
    return [float(len(set(c))) for c in completions]
'''


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_run_leaves_its_report_and_no_secret(
    backend: str, tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["hybrid-rl", "train", f"some.setting={SECRETS['JUDGE_API_KEY']}"])
    plugin = tmp_path / "rewards.py"
    plugin.write_text(PLUGIN)
    careless = {"plugin": f"{plugin}:careless", "name": "careless", "weight": 0.1}
    rewards = [{"plugin": f"{plugin}:careful", "name": "careful"}, careless]
    run = train(
        parse_config(
            {
                **tiny_tree,
                "cluster": {"backend": backend},
                "learner": {"world_size": 1},
                "rollout": {"engine": "transformers"},
                "rewards": rewards,
                "eval": {"k": 0, "reward": "careful"},
                "adaptation": "lora",
                "tracking": {"wandb": "offline", "tensorboard": True, "timeout": 60},
                "run": {"dir": str(tmp_path / "run"), "name": f"with {SECRETS['HF_TOKEN']}"},
            }
        ),
        name="careless",
    )
    rows = read_metrics(run.metrics)
    assert sum(row["faults/reward_error"] for row in rows) > 0
    assert all(row["faults/tracking_wandb"] == row["faults/tracking_tensorboard"] == 0 for row in rows)
    for path in (run.report, run.machine, run.config, run.plan_image, run.curve):
        assert path.stat().st_size > 0
    said = [json.loads(line)["failures"].get("careless", "") for line in run.rollouts_of(1).read_text().splitlines()]
    assert any("wrong key (JUDGE_API_KEY, left out), password (DATABASE_PASSWORD, left out)" in each for each in said)
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(list(run.path.glob("wandb/offline-run-*/*.wandb"))) == 1
    found = {
        (str(path.relative_to(run.path)), name)
        for path in files
        for name, value in SECRETS.items()
        if value.encode() in path.read_bytes()
    }
    assert not found
