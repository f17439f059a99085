"""Tiny models made on the spot, and the environment of CPU workers."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import yaml

from hybrid_rl.config import Config, WarmStartConfig
from hybrid_rl.config_file import parse_config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen3 with the quick start's tokenizer."""
    from trainers.warm_start import build_model, build_tokenizer

    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer()
    model = build_model(WarmStartConfig(hidden_size=64, layers=2, heads=2, kv_heads=1), tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny_tree(tiny_model: Path, tmp_path: Path) -> dict:
    """Settings of a run that takes seconds: two steps on the tiny model. Change and pass to `parse_config`."""
    return {
        "model": {"path": str(tiny_model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "eval_size": 8, "max_prompt_length": 16},
        "sampling": {"max_completion_length": 6},
        "steps": 2,
        "batch": {"prompts": 4, "num_generations": 4},
        "plan": {"prompts": 8, "probe": {"steps": 1, "mini_batches": 2}},
        "lora": {"rank": 4},
        "eval": {"k": 0},
        "tracking": {"wandb": "disabled"},
        "run": {"dir": str(tmp_path / "run")},
    }


@pytest.fixture
def tiny_config(tiny_tree: dict) -> Config:
    return parse_config(tiny_tree)


@pytest.fixture
def write_config(tmp_path: Path):
    """Write a tree of settings to a YAML file."""

    def write(tree: dict) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write
