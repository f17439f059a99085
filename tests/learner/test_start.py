"""Training goes on from exactly the values that were exported, whatever precision it computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import WEIGHTS, Start, apply_plan
from hybrid_rl.adaptation.delta import write_delta
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config import ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.digests import digest
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.weight_sync import lora_names
from tests.held import receive
from tests.learner.processes import hybrid_plan, on_ranks

RANKS = 3
"""Which divide no tensor here: ZeRO-3 pads each one."""


def write_start(model: Path, plan: AdaptationPlan, directory: Path) -> dict[str, Tensor]:
    """A `delta` of values that bf16 has not."""
    adapted = apply_plan(AutoModelForCausalLM.from_pretrained(model), plan)
    torch.manual_seed(1)
    values = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in adapted.trained.items()}
    beside = [(name, value) for name, value in values.items() if name not in adapted.full]
    write_delta(((name, values[name], p.detach()) for name, p in adapted.full.items()), beside, directory)
    assert not any(torch.equal(value, value.bfloat16().float()) for value in values.values())
    return values


def test_masters_are_the_exported_values(tiny_model: Path, tmp_path: Path):
    plan = hybrid_plan(tiny_model)
    values = write_start(tiny_model, plan, tmp_path)
    start = Start(str(tmp_path), "delta", {name: digest(value) for name, value in values.items()})
    sent = on_ranks(RANKS, _build_and_save, str(tiny_model), plan.to_json(), start)
    for stage in (1, 2, 3):
        saved = load_file(tmp_path / f"zero_{stage}" / WEIGHTS)
        assert saved.keys() == values.keys()
        assert all(torch.equal(saved[name], value) for name, value in values.items()), stage
        for m in plan.named("full"):
            assert torch.equal(sent[stage][f"{m.name}.weight"], values[f"{m.name}.weight"].bfloat16())
        for m in plan.named("lora"):
            a = values[f"{m.name}.lora_A.default.weight"].bfloat16()
            assert torch.equal(sent[stage][lora_names(m.name)[0]], a)


def _build_and_save(rank: int, port: int, model: str, plan: str, start: Start) -> dict[int, dict[str, Tensor]]:
    from hybrid_rl.learner.worker import LearnerWorker

    sent = {}
    for stage in (1, 2, 3):
        tree = {
            "model": {"path": model, "dtype": "bfloat16"},
            "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
            "batch": {"prompts": RANKS, "num_generations": 4},
            "lora": {"rank": 4},
            "learner": {"world_size": RANKS, "zero_stage": stage},
        }
        worker = LearnerWorker(parse_config(tree), rank, Memory())
        worker.connect("127.0.0.1", port)
        if stage == 1:
            wrong = Start(start.directory, start.format, {**start.digests, next(iter(start.digests)): "other"})
            with pytest.raises(ConfigError, match="does not come to what was exported"):
                worker.build(plan, wrong)
            worker = LearnerWorker(parse_config(tree), rank, Memory())
            worker.connect("127.0.0.1", port)
        worker.build(plan, start)
        worker.begin_save(str(Path(start.directory) / f"zero_{stage}"))
        worker.saved(wait=True)
        update: Any = worker.export(1)
        if rank == 0:
            sent[stage] = receive(worker._transport, [update])
    return sent
