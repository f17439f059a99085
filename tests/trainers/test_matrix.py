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
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.stored_policy import load_policy
from hybrid_rl.tracking import read_metrics
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
QUICK = {("qwen3", "dora"), ("qwen3_moe", "hybrid"), ("qwen3_5", "matryoshka"), ("falcon_h1", "molf")}
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


def go_through(tree: dict, folder: Path, write_config: Any) -> dict[str, str]:
    """Train, resume, export and reload; what became of each export format."""
    config, run = str(write_config(tree)), folder / "run"
    assert main(["train", config]) == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sync/verified_engines"] == 1 for row in rows)
    assert all(row["policy/rollout_logprob_diff_max"] < 1e-4 for row in rows), (
        "the engine computes what the learner does"
    )
    assert {"eval_before", "eval_after"} <= json.loads((run / "summary.json").read_text()).keys()

    last = run / "checkpoints" / "step_000003"
    uninterrupted = safetensors.torch.load_file(last / WEIGHTS)
    shutil.rmtree(last)
    assert main(["train", config, "--resume"]) == 0
    resumed = safetensors.torch.load_file(last / WEIGHTS)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items()), "resumed bit for bit"

    model = ModelConfig(path=tree["model"]["path"])
    plan = AdaptationPlan.load(run / "plan.json")
    trained = logits(load_policy(model, plan, last / WEIGHTS).model)
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(model.path))).abs().max() > 1e-4
    formats = {}
    for form in ("merged", "peft", "delta"):
        out = folder / form
        status = main(["export", str(run), "--to", form, "--out", str(out)])
        formats[form] = "yes" if status == 0 else "no"
        if status == 0:
            loaded = AutoModelForCausalLM.from_pretrained(out) if form == "merged" else load_export(out, model).model
            torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=1e-5)
        else:
            assert status == 2
            assert form == "peft"
    return formats


@pytest.mark.parametrize(("family", "treatment"), sorted(QUICK))
def test_from_training_to_an_export(family: str, treatment: str, tiny_tree: dict, tmp_path: Path, write_config):
    go_through(tree_of(tiny_tree, tmp_path, family, treatment), tmp_path, write_config)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_treatment_on_every_architecture(tiny_tree: dict, tmp_path: Path, write_config, capsys):
    cells: dict[tuple[str, str], str] = {}
    for family in ARCHITECTURES:
        for treatment in TREATMENTS if family == next(iter(ARCHITECTURES)) else EVERYWHERE:
            folder = tmp_path / f"{family}-{treatment}"
            folder.mkdir()
            formats = go_through(tree_of(tiny_tree, folder, family, treatment), folder, write_config)
            cells[family, treatment] = ", ".join(form for form, works in formats.items() if works == "yes")
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
