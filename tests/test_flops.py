"""FLOPs of a plan against torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.components import read_model
from hybrid_rl.config import LoraConfig, PlanConfig
from hybrid_rl.flops import count_flops, peak_tflops
from hybrid_rl.plan_building import build_plan
from tests.families import build


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_training_flops_are_what_torch_counts(tiny_model: Path, ratio: float):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    anatomy = read_model(model)
    scores = {c.name: float("layers.0." not in c.name) for c in anatomy.candidates}
    plan = build_plan(
        anatomy, scores, ratio=ratio, model="m", method={}, seed=0, settings=PlanConfig(), lora=LoraConfig(rank=4)
    )
    flops = count_flops(anatomy, plan, model.config)
    apply_plan(model, plan)
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_())
    length = 32
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(2, 100, (1, length)), use_cache=False).logits.sum().backward()
    # Torch's eager attention computes the whole square; a causal token sees half of it.
    square = flops.attention * (length**2 - length * (length + 1) / 2)
    assert flops.training([length], length) + 3 * square == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("treatment", ["vera", "randlora", "dora", "pissa", "ia3", "molf_efficient", "matryoshka"])
def test_flops_of_a_treatment_are_what_torch_counts(treatment: str):
    """Frozen matrices are multiplied by too, and vectors are not matrices."""
    model = build("qwen3")
    model.set_attn_implementation("eager")
    plan = build_plan(
        read_model(model),
        {},
        ratio=0.0,
        model="m",
        method={},
        seed=0,
        settings=PlanConfig(),
        lora=LoraConfig(rank=8),
        rest=treatment,
    )
    flops = count_flops(read_model(model), plan, model.config)
    apply_plan(model, plan)
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_())
    length, passes = 24, 2
    with FlopCounterMode(display=False) as counter:
        for _ in range(passes):
            model(input_ids=torch.randint(2, 60, (1, length)), use_cache=False).logits.sum().backward()
    square = flops.attention * (length**2 - length * (length + 1) / 2)
    expected = flops.training([length] * passes, passes * length, passes) + passes * 3 * square
    # PEFT multiplies DoRA's factors with a unit matrix in between, which is not needed.
    needless = passes * sum(2 * (m.rank or 0) * m.shape[1] ** 2 for m in plan.named("dora"))
    # Of RandLoRA, the gradient of the trained vectors is summed up by products of two matrices.
    rel = 0.01 if treatment == "randlora" else 1e-9
    assert expected + needless == pytest.approx(counter.get_total_flops(), rel=rel)


def test_peaks_are_of_bf16():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_tflops("cpu", "bfloat16") is None
