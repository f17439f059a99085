"""A plan applied to a model trains exactly what it lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.components import candidate_matrices
from hybrid_rl.plan import AdaptationPlan, PlannedModule


def plan_of(model: torch.nn.Module, treatments: dict[str, tuple]) -> AdaptationPlan:
    """`treatments`: module name -> (treatment, rank, alpha); the rest is frozen."""
    modules = []
    for c in candidate_matrices(model):
        treatment, rank, alpha = treatments.get(c.name, ("frozen", None, None))
        modules.append(PlannedModule(c.name, c.component, c.layer, c.shape, c.params, None, rank, alpha, treatment))
    return AdaptationPlan("m", "attention-only", {}, 0, tuple(modules))


FULL = ("full", None, None)
Q, K, UP, UP1 = (
    *("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"),
    *("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
)


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_exactly_the_planned_parameters_train(model: torch.nn.Module):
    treatments = {Q: FULL, UP1: FULL, K: ("lora", 2, 6.0), UP: ("lora", 5, 5.0)}
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapted = apply_plan(model, plan_of(model, treatments))
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    lora = {f"{m}.lora_{f}.default.weight" for m in (K, UP) for f in "AB"}
    assert trained == {f"{Q}.weight", f"{UP1}.weight"} | lora
    assert set(adapted.full) == {Q, UP1}
    assert {m: (p.a.shape[0], p.scaling) for m, p in adapted.lora.items()} == {K: (2, 3.0), UP: (5, 1.0)}
    after = {name.replace(".base_layer", ""): p for name, p in adapted.model.state_dict().items()}
    assert all(torch.equal(after[name], p) for name, p in before.items()), "applying a plan changes no weight"


def test_the_forward_pass_starts_at_the_base_model(model: torch.nn.Module):
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    every = {c.name: ("lora", 4, 8.0) for c in candidate_matrices(model)}
    adapted = apply_plan(model, plan_of(model, every))
    torch.testing.assert_close(adapted.model(input_ids=ids).logits, expected)
