"""A plan applied to a model trains exactly what it lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan, remove_adapters
from hybrid_rl.components import read_model
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from tests.families import build


def plan_of(model: torch.nn.Module, treatments: dict[str, tuple]) -> AdaptationPlan:
    """`treatments`: module name -> (treatment, rank, alpha); the rest is frozen."""
    modules = []
    for c in read_model(model).weights:
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
    assert set(adapted.full) == {f"{Q}.weight", f"{UP1}.weight"}
    assert {m: (p.a.shape[0], p.scaling) for m, a in adapted.adapters.items() for p in a.factors()} == {
        K: (2, 3.0),
        UP: (5, 1.0),
    }
    after = {name.replace(".base_layer", ""): p for name, p in adapted.model.state_dict().items()}
    assert all(torch.equal(after[name], p) for name, p in before.items()), "applying a plan changes no weight"


def test_the_forward_pass_starts_at_the_base_model(model: torch.nn.Module):
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    every = {c.name: ("lora", 4, 8.0) for c in read_model(model).candidates}
    adapted = apply_plan(model, plan_of(model, every))
    torch.testing.assert_close(adapted.model(input_ids=ids).logits, expected)


def test_adapters_come_off_without_a_trace(model: torch.nn.Module):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapted = apply_plan(model, plan_of(model, {c.name: ("lora", 2, 4.0) for c in read_model(model).candidates}))
    with torch.no_grad():
        for parameter in adapted.adapter_parameters:
            parameter.normal_()
    remove_adapters(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_weights_that_are_no_linear_layers_can_be_full():
    network = build("qwen3_5")
    weights = {w.name: w for w in read_model(network).weights}
    names = [
        next(n for n in weights if n.endswith(leaf)) for leaf in (".A_log", ".dt_bias", "conv1d", "input_layernorm")
    ]
    adapted = apply_plan(network, plan_of(network, dict.fromkeys(names, FULL)))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == set(adapted.full) == {weights[n].parameter for n in names}


def test_a_shared_weight_has_one_adapter():
    """Zamba2's shared blocks: the same weight in several modules. The adapter must act in all of them alike."""
    network = build("zamba2").eval()
    shared = next(w for w in read_model(network).candidates if w.tied)
    ids = torch.arange(4, 10)[None]
    base = network(input_ids=ids, use_cache=False).logits.clone()
    adapted = apply_plan(network, plan_of(network, {shared.name: ("lora", 2, 4.0)}))
    [pair] = adapted.adapters[shared.name].factors()
    torch.manual_seed(0)
    with torch.no_grad():
        pair.a.normal_()
        pair.b.normal_()
    adapted_logits = network(input_ids=ids, use_cache=False).logits.clone()
    remove_adapters(network)
    weight = network.get_parameter(shared.parameter)
    with torch.no_grad():
        weight += pair.scaling * pair.b @ pair.a
    torch.testing.assert_close(network(input_ids=ids, use_cache=False).logits, adapted_logits, atol=1e-5, rtol=1e-5)
    assert (adapted_logits - base).abs().max() > 1e-3
