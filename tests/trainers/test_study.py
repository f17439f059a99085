"""`hybrid-rl study` on real runs of a tiny planted task."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from hybrid_rl.components import read_model
from hybrid_rl.config import PlantedConfig, WarmStartConfig
from hybrid_rl.run_directory import RunDirectory
from trainers.planted import LETTERS, draw_sets, last_logits, make_teacher, plant


def write_study(directory: Path, **changes: Any) -> Path:
    base = yaml.safe_load(Path("configs/planted.yaml").read_text())
    base |= {"steps": 3, "batch": {"prompts": 4, "num_generations": 4}, "eval": {"k": 2, "every": 0}}
    base["learner"]["warmup_steps"] = 0
    base["warm_start"]["planted"] = {"train": 40, "held_out": 30}
    (directory / "base.yaml").write_text(yaml.safe_dump(base))
    at = f"{directory}/models/{{seed}}"
    task = {
        "model.path": at,
        "warm_start.seed": "{seed}",
        "data.train": f"{at}/train.jsonl",
        "data.eval": {"validation": f"{at}/validation.jsonl", "test": f"{at}/test.jsonl"},
    }
    tree = {
        "base": str(directory / "base.yaml"),
        "dir": str(directory / "study"),
        "tasks": {"planted": task},
        "seeds": [0],
        "methods": {
            "oracle": {"set": {"lora.rank": 1, "plan.budget.ratio": 0.125, "plan.score": "trainers.planted:planted"}}
        },
        **changes,
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def study(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hybrid_rl.cli", "study", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_a_study_leaves_tables_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    done = study(path)
    assert done.returncode == 0, done.stdout + done.stderr
    where = tmp_path / "study"
    (line,) = (where / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    run = RunDirectory(where / "runs" / result["key"])
    assert result["scores"] == json.loads(run.evaluation_of(3).read_text())
    assert len(result["scores"]["test"]["mean_at_k"]) == 30
    plan = json.loads(run.plan.read_text())
    names = [m["name"] for m in plan["modules"]]
    assert sorted(result["chosen"]) == sorted(draw_sets(0, 3, sorted(names, key=_model_order))[0])
    assert result["trained"] == plan["totals"]["trainable_params"]
    rows = [json.loads(row) for row in run.metrics.read_text().splitlines()]
    assert result["tokens"] == sum(row["tokens/generated"] for row in rows)
    assert result["synced_bytes"] == sum(row["sync/bytes"] for row in rows)
    mean = sum(result["scores"]["test"]["mean_at_k"]) / 30
    assert f"{mean:.3f}" in (where / "table.md").read_text()
    assert (where / "report.html").read_text().count("<section") > 3
    assert (where / "figure.png").stat().st_size > 1000
    assert not run.checkpoints.exists()

    refused = study(path)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    before = (where / "results.jsonl").read_bytes()
    (where / "table.md").unlink()
    assert study(path, "--report").returncode == 0
    assert (where / "table.md").exists()
    assert (where / "results.jsonl").read_bytes() == before


def _model_order(name: str) -> tuple[int, int]:
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return int(name.split(".")[2]), leaves.index(name.rpartition(".")[2])


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_no_run_behind(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | {"steps": 100_000}))
    process = subprocess.Popen([sys.executable, "-m", "hybrid_rl.cli", "study", str(path)], stdout=subprocess.DEVNULL)

    def begun() -> bool:
        return any((tmp_path / "study" / "runs").glob("*/rollouts/step_*.jsonl"))

    def of_the_run() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if p.pid != process.pid and _writes_to(p, str(tmp_path))]

    try:
        _await(begun, 200)
        assert of_the_run()
    finally:
        process.kill()
    process.wait()
    _await(lambda: not of_the_run(), 60)
    assert any((tmp_path / "study" / "runs").glob("*/checkpoints/*/")), "it saved before it ended"


def _writes_to(process: psutil.Process, directory: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return os.readlink(f"/proc/{process.pid}/fd/1").startswith(directory)
    return False


def _await(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_a_study_with_a_sweep_a_failure_and_ranks(tmp_path: Path) -> None:
    methods = {
        "full": {"set": {"adaptation": "full"}, "rates": {"full.lr": [1e-3, 1e-2]}},
        "matryoshka": {"set": {"adaptation": "matryoshka", "lora.rank": 2}},
        "broken": {"set": {"adaptation": "lora", "rollout.start_timeout": 1e-6, "cluster.backend": "ray"}},
    }
    curves = {"nested": {"ranks": [1, 2], "methods": ["matryoshka"]}}
    path = write_study(tmp_path, methods=methods, seeds=[0, 1], sweep_seeds=[0], parallel=2, curves=curves)
    done = study(path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 runs of the study failed" in done.stderr
    results = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    assert len(results) == 5  # two of the sweep, one more of the chosen rate, two of matryoshka
    assert {"test@1", "test@2"} <= set(results[-1]["scores"]) | set(results[-2]["scores"])
    table = (tmp_path / "study" / "table.md").read_text()
    assert "AURAC" in table
    assert "broken" not in table.split("## ")[1].split("Note")[0]


def test_the_task_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    """Problems are the teacher's own answers; the base policy differs from it in the planted matrices alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plant(WarmStartConfig(seed=5, hidden_size=64, layers=3), PlantedConfig(train=50, held_out=20), tmp_path)
    student, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    teacher = make_teacher(5, len(LETTERS) + 2, 64, 3)
    teacher.lm_head.weight.data[len(LETTERS) :] = 0
    weights = read_model(student).candidates
    planted, others = draw_sets(5, 3, [w.name for w in weights])
    changed = [
        w.name for w in weights if not torch.equal(*(m.get_submodule(w.name).weight for m in (student, teacher)))
    ]
    assert sorted(changed) == sorted(planted)
    for name in planted:
        clean, damaged = (m.get_submodule(name).weight for m in (teacher, student))
        assert torch.isclose((damaged - clean).norm(), clean.norm(), rtol=1e-4)
    assert [_leaf(n) for n in planted[:2]] == [_leaf(n) for n in others[:2]] == ["v_proj", "o_proj"]
    assert not {*planted} & {*others}
    rows = [
        json.loads(line) for name in ("train", "test") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows])
    best = last_logits(teacher, ids).argmax(-1)
    assert [tokenizer.decode([i]) for i in best.tolist()] == [row["answer"] for row in rows]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
