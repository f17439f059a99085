"""One vLLM engine, one treatment after another: what it computes is what the learner's model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.components import read_model
from hybrid_rl.config import PlanConfig
from hybrid_rl.plan_building import build_plan
from hybrid_rl.rollout.engine import run_requests
from hybrid_rl.treatments import ADAPTERS, TREATMENTS, LoraConfig
from hybrid_rl.types import Request, Sampling
from hybrid_rl.weight_sync import Publisher, served_tensors
from tests.weight_sync.engine_side import Memory, check_logprobs, settings_for, started
from tests.weight_sync.test_engine_side import FALCON, MOE, PROMPTS, SMALL, saved

ARCHITECTURES = {
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),  # with biases, which MoLF, BitFit and IA3 train
    "falcon_h1": lambda: transformers.FalconH1Config(**FALCON),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**MOE),
}


def adapted_by(path: Path, treatment: str) -> Any:
    """The model under `treatment` on every candidate, norms and biases trained too for `bitfit`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    anatomy = read_model(model)
    rest = "frozen" if treatment == "bitfit" else treatment
    biases = [w.name for w in anatomy.weights if w.name.endswith(".bias") and len(w.shape) == 1 and w.layer is not None]
    biases = [name for name in biases if "conv" not in name]
    norms = [w.name for w in anatomy.weights if w.component == "norm"]
    also = {"bitfit": [*norms, *biases], "molf": biases}.get(treatment, [])
    settings, ratio = PlanConfig(also_full=also), float(treatment == "full")
    options: dict[str, Any] = {"settings": settings, "ratio": ratio, "lora": LoraConfig(rank=4)}
    plan = build_plan(anatomy, {}, model="m", method={}, seed=0, rest=rest if not ratio else "lora", **options)
    return apply_plan(model, plan)


def go_through(family: str, treatments: tuple[str, ...], folder: Path, mode: str) -> None:
    path, transport = saved(ARCHITECTURES[family](), folder / family), Memory()
    publisher = Publisher(transport, dtype=torch.float32, bucket_bytes=2**16, anchor_every=99, sparse=True)
    modules = tuple(adapted_by(path, "lora").adapters)
    sampling, version = Sampling(2, 0.7, 1.0, 12, (), 0), 0
    with started("vllm", settings_for(path, transport, lora_modules=modules, adapter=mode, adapter_rank=32)) as engine:
        for treatment in treatments:
            adapted = adapted_by(path, treatment)
            publisher.restart()
            for _ in range(2):
                version += 1
                torch.manual_seed(version)
                with torch.no_grad():
                    for parameter in adapted.trained.values():
                        parameter.add_(0.03 * torch.randn_like(parameter))
                update = publisher.publish(served_tensors(adapted), version, adapted.sent_rank)
                receipt = engine.apply_updates([update])
                assert receipt.digests == update.digests
                kind = mode.replace("auto", "native") if "factors" in _sent(treatment) else "none"
                fallback = "merged" if family == "qwen3_moe" and kind == "native" else kind  # vLLM has no LoRA there
                assert receipt.adapter == fallback, treatment
                requests = [Request(f"{version}/{i}", p, sampling, 11 + i) for i, p in enumerate(PROMPTS)]
                for request, group in zip(requests, run_requests(engine, requests), strict=True):
                    for c in group:
                        ids = torch.tensor([[*request.prompt_ids, *c.token_ids]])
                        with torch.no_grad():
                            logits = adapted.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1] / 0.7
                        chosen = torch.tensor(c.token_ids)[:, None]
                        check_logprobs(c, torch.log_softmax(logits, -1).gather(-1, chosen)[:, 0])


def _sent(treatment: str) -> str:
    return TREATMENTS[treatment].sent if treatment in TREATMENTS else "weight"


def test_treatments_through_vllm(tmp_path: Path):
    go_through("qwen2", ("pissa", "molf", "matryoshka", "bitfit", "ia3", "dora", "full"), tmp_path, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "merged"])
@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_moe"])
def test_every_treatment_through_vllm(family: str, mode: str, tmp_path: Path):
    go_through(family, ("full", *ADAPTERS), tmp_path, mode)
