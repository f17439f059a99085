"""Architectures x treatments, each from the command line to an export that transformers loads.

`HYBRID_RL_WRITE_DOCS=1` writes the table of docs/treatments-matrix.md from what happened; without it, the table is
compared with what happened.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import WEIGHTS
from hybrid_rl.cli import main
from hybrid_rl.config import ModelConfig
from hybrid_rl.export import load_export
from hybrid_rl.run_directory import read_metrics
from hybrid_rl.stored_policy import find_policy
from hybrid_rl.treatments import ADAPTERS
from tests.trainers.test_rank import PLUGIN, saved

TABLE = Path(__file__).parents[2] / "docs" / "treatments-matrix.md"
ARCHITECTURES = {
    "qwen3": "Qwen3 (dense)",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_5": "Qwen3.5 (sequential hybrid)",
    "falcon_h1": "Falcon-H1 (parallel hybrid)",
}
EVERYWHERE = ("full", "lora", "hybrid", "molf", "molf_efficient", "matryoshka", "dora")
"""The others are tried on the first architecture alone."""
TREATMENTS = (*EVERYWHERE, *(t for t in (*ADAPTERS, "lora_matched", "bitfit") if t not in EVERYWHERE))
FORMATS = ("merged", "peft", "delta")
ALL = set(FORMATS)
QUICK = {
    ("qwen3", "dora"): ALL,
    ("qwen3_moe", "hybrid"): ALL,
    ("qwen3_5", "matryoshka"): ALL,
    ("falcon_h1", "molf"): ALL - {"peft"},  # `A_log` and the like are parameters of blocks, and PEFT saves layers
}
"""The export formats of each."""
IDS = torch.arange(4, 20)[None]


def tree_of(tiny_tree: dict, folder: Path, family: str, treatment: str) -> dict[str, Any]:
    plugin = folder / "shortness.py"
    plugin.write_text(PLUGIN)
    return {
        **tiny_tree,
        "model": {"path": str(saved(family, folder / family))},
        "cluster": {"backend": "inline"},
        "learner": {"world_size": 1},
        "rollout": {"engine": "transformers"},
        "rewards": [{"plugin": f"{plugin}:shortness"}],
        "full": {"lr": 1e-3},
        "adaptation": treatment,
        "plan": {"score": "random"} if treatment == "hybrid" else {},
        "steps": 3,
        "checkpoint": {"every": 2, "keep_last": 4},
        "run": {"dir": str(folder / "run")},
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS, use_cache=False).logits


def go_through(tree: dict, folder: Path, write_config: Any, capsys: pytest.CaptureFixture) -> set[str]:
    """Train, resume, evaluate, export and reload; returns the formats that it could be exported to."""
    config, run = str(write_config(tree)), folder / "run"
    assert main(["train", config]) == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sync/verified_engines"] == 1 for row in rows)
    assert all(row["policy/rollout_logprob_diff_max"] < 1e-4 for row in rows), (
        "the engine computes what the learner does"
    )
    summary = json.loads((run / "summary.json").read_text())
    assert {"eval_before", "eval_after"} <= summary.keys()

    last = run / "checkpoints" / "step_000003"
    uninterrupted = safetensors.torch.load_file(last / WEIGHTS)
    shutil.rmtree(last)
    assert main(["train", config, "--resume"]) == 0
    resumed = safetensors.torch.load_file(last / WEIGHTS)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items()), "resumed bit for bit"

    capsys.readouterr()
    assert main(["eval", config, "--checkpoint", str(run), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {f"eval/{n}": v for n, v in evaluated.items() if f"eval/{n}" in summary["eval_after"]} == pytest.approx(
        summary["eval_after"]
    )

    model = ModelConfig(path=tree["model"]["path"])
    trained = logits(find_policy(run, "RUN").load(model).model)
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(model.path))).abs().max() > 1e-4
    formats = set()
    for form in FORMATS:
        out = folder / form
        status = main(["export", str(run), "--to", form, "--out", str(out)])
        if status == 0:
            formats.add(form)
            loaded = AutoModelForCausalLM.from_pretrained(out) if form == "merged" else load_export(out, model).model
            torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=1e-5)
        else:
            assert status == 2
            assert form == "peft"
    return formats


@pytest.mark.parametrize(("family", "treatment"), sorted(QUICK))
def test_from_training_to_an_export(
    family: str, treatment: str, tiny_tree: dict, tmp_path: Path, write_config: Any, capsys: pytest.CaptureFixture
):
    formats = go_through(tree_of(tiny_tree, tmp_path, family, treatment), tmp_path, write_config, capsys)
    assert formats == QUICK[family, treatment]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_treatment_on_every_architecture(tiny_tree: dict, tmp_path: Path, write_config, capsys):
    cells: dict[tuple[str, str], str] = {}
    for family in ARCHITECTURES:
        for treatment in TREATMENTS if family == next(iter(ARCHITECTURES)) else EVERYWHERE:
            folder = tmp_path / f"{family}-{treatment}"
            folder.mkdir()
            formats = go_through(tree_of(tiny_tree, folder, family, treatment), folder, write_config, capsys)
            assert formats == QUICK.get((family, treatment), formats)
            cells[family, treatment] = ", ".join(form for form in FORMATS if form in formats)
            shutil.rmtree(folder)
    lines = [
        "# Treatments on architectures",
        "",
        "Made by `tests/trainers/test_matrix.py`: tiny models of each architecture, fp32, transformers engine. A cell",
        "names the formats that the policy can be exported to; the cell's run was trained for 3 steps with verified",
        "receipts, evaluated, saved, resumed bit for bit, exported, and reloaded with equal logits (1e-5). Empty cells",
        "were not tried.",
        "",
        "| treatment | " + " | ".join(ARCHITECTURES.values()) + " |",
        "|---" * (1 + len(ARCHITECTURES)) + "|",
        *(
            f"| `{t}` | " + " | ".join(cells.get((family, t), "") for family in ARCHITECTURES) + " |"
            for t in TREATMENTS
        ),
    ]
    text = "\n".join(lines) + "\n"
    if os.environ.get("HYBRID_RL_WRITE_DOCS"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text, (
        "the table in the docs is another; HYBRID_RL_WRITE_DOCS=1 writes it"
    )
