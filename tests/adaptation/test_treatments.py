"""Every treatment starts as the base model and leaves its weights alone; what engines are sent is what it computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan, remove_adapters
from hybrid_rl.adaptation.adapters import Reparametrised
from hybrid_rl.components import read_model
from hybrid_rl.config import PlanConfig
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan
from hybrid_rl.treatments import ADAPTERS, TREATMENTS, LoraConfig, MatryoshkaConfig, MolfConfig
from hybrid_rl.weight_sync import digest, lora_names, served_tensors
from tests.families import build

IDS = torch.arange(4, 24)[None]


def planned(model: torch.nn.Module, treatment: str, **settings: Any) -> AdaptationPlan:
    """`treatment` on every candidate."""
    options: dict[str, Any] = {"settings": PlanConfig(), "lora": LoraConfig(rank=4), **settings}
    return build_plan(read_model(model), {}, model="m", method={}, seed=0, ratio=0.0, rest=treatment, **options)


def move(adapted: Any, scale: float = 0.1) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.trained.values():
            parameter.add_(scale * torch.randn_like(parameter))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.clone()


@torch.no_grad()
def served(base: Any, sent: dict[str, Tensor]) -> Any:
    """`base` as an engine would make it of what it is sent, by the formulas that an engine has: W, and W + B A."""
    for name, tensor in sent.items():
        if ".lora_" not in name:
            base.get_parameter(name).copy_(tensor)
    for name in [n for n in sent if ".lora_A" in n]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = (sent[n] for n in lora_names(module))
        base.get_parameter(f"{module}.weight").add_(b @ a)
    return base


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.mark.parametrize("treatment", ADAPTERS)
def test_what_engines_are_sent_is_what_the_model_computes(treatment: str, model: torch.nn.Module):
    base, before = copy.deepcopy(model), logits(model)
    plan = planned(model, treatment)
    adapted = apply_plan(model, plan)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    count = sum(p.numel() for p in adapted.trained.values())
    assert count == plan.totals["trainable_params"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} != set()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    move(adapted)
    moved = logits(model)
    assert (moved - before).abs().max() > 1e-3
    sent = dict(served_tensors(adapted))
    assert {".lora_" in name for name in sent} == {TREATMENTS[treatment].sent == "factors"}
    torch.testing.assert_close(logits(served(copy.deepcopy(base), sent)), moved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), moved, atol=0, rtol=0, msg="looking at the weights changed them")
    for adapter in adapted.adapters.values():
        adapter.switch(False)
    if not TREATMENTS[treatment].trains_weight:
        assert torch.equal(logits(model), before)
        sent = dict(served_tensors(adapted, ("full",)))
        torch.testing.assert_close(logits(served(copy.deepcopy(base), sent)), before, atol=1e-6, rtol=1e-6)
    remove_adapters(model)
    if not TREATMENTS[treatment].trains_weight:
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize("cast", ["deepspeed", "eval"])
@pytest.mark.parametrize("treatment", ADAPTERS)
def test_bf16_serves_the_same_before_and_after_a_forward_pass(treatment: str, cast: str, model: torch.nn.Module):
    """A learner's model, of which DeepSpeed casts the parameters alone, and a stored policy's. What engines get is, but
    for the rounding of the trained parameters, what an fp32 export is made of."""
    adapted = apply_plan(model, planned(model, treatment))
    move(adapted)
    exact = {name: tensor.detach().clone() for name, tensor in served_tensors(adapted)}
    if cast == "deepspeed":
        adapted.compute_in(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    else:
        adapted.cast(torch.bfloat16)
    sent = {name: tensor.detach().to(torch.bfloat16, copy=True) for name, tensor in served_tensors(adapted)}
    assert torch.isfinite(logits(model)).all()
    after = {name: tensor.detach().to(torch.bfloat16) for name, tensor in served_tensors(adapted)}
    assert {n: digest(t) for n, t in sent.items()} == {n: digest(t) for n, t in after.items()}
    for name, parameter in adapted.trained.items():
        assert parameter.dtype == torch.bfloat16, name
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor.float(), exact[name].float(), atol=2e-2, rtol=2e-2)


def test_random_matrices_stay_as_a_seed_made_them(model: torch.nn.Module):
    """Were they rounded in one place and not in another, learner, evaluation and exports would serve other weights."""
    other = copy.deepcopy(model)
    for treatment in ("vera", "randlora"):
        rounded, exact = (apply_plan(m, planned(m, treatment)) for m in (copy.deepcopy(model), copy.deepcopy(other)))
        for adapted in (rounded, exact):
            move(adapted)
            with torch.no_grad():
                for parameter in adapted.model.parameters():
                    parameter.copy_(parameter.to(torch.bfloat16))
        rounded.cast(torch.bfloat16)
        wanted = dict(served_tensors(exact))
        for name, tensor in served_tensors(rounded):
            torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5, msg=name)


def test_served_tensors_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    """And not at all where adapters contribute nothing."""
    network = build("qwen2")  # with biases
    adapted = apply_plan(network, planned(network, "ia3"))
    biased = [name for name, a in adapted.adapters.items() if "bias" in a.acts_on]
    assert len(biased) == 6
    calls: list[str] = []
    whole = Reparametrised.whole
    monkeypatch.setattr(Reparametrised, "whole", lambda self: (calls.append(self.module), whole(self))[1])
    assert {f"{name}.bias" for name in biased} <= {name for name, _ in served_tensors(adapted)}
    assert sorted(calls) == sorted(adapted.adapters)
    calls.clear()
    assert {f"{name}.bias" for name in biased} <= {name for name, _ in served_tensors(adapted, ("full",))}
    assert not calls


@pytest.mark.parametrize("family", ["qwen3_next", "granite_moe_hybrid", "recurrent_gemma", "qwen2"])
def test_ia3_scales_what_an_mlp_returns_from_however_narrow_it_is(family: str):
    """Shared experts are narrower than the hidden size: their second layer has more rows than columns."""
    network = build(family, "meta")
    options: dict[str, Any] = {"settings": PlanConfig(), "lora": LoraConfig(rank=4)}
    plan = build_plan(read_model(network), {}, model="m", method={}, seed=0, ratio=0.0, rest="ia3", **options)
    fed = {m.name.rpartition(".")[2] for m in plan.modules if m.options["scales"] == "input"}
    given = {
        m.name.rpartition(".")[2] for m in plan.modules if m.options["scales"] == "output" and m.component == "mlp"
    }
    assert (fed, given) == {
        "granite_moe_hybrid": ({"output_linear"}, {"input_linear"}),
    }.get(family, ({"down_proj"}, {"gate_proj", "up_proj"}))


def test_every_expert_of_molf_is_in_the_forward_pass(model: torch.nn.Module):
    plan = planned(model, "molf_efficient", molf=MolfConfig(ranks=[2, 3, 5]))
    adapted = apply_plan(model, plan)
    experts = next(iter(adapted.experts.values()))
    assert [a.shape[0] for a, _ in experts] == [2, 3, 5]
    module = next(iter(adapted.experts))
    layer: Any = model.get_submodule(module)
    move(adapted)
    x = torch.randn(3, layer.in_features)
    alpha = 2 * 2**0.5  # the default: the first expert counts twice
    expected = layer.base_layer(x)
    for (a, b), rank in zip(experts, (2, 3, 5), strict=True):
        expected = expected + x @ a.T @ b.T * alpha / rank**0.5
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_matryoshka_is_the_sum_of_its_nested_adapters(scaling: Any, model: torch.nn.Module):
    settings = MatryoshkaConfig(scaling=scaling, ranks=[1, 2, 4, 7])
    adapted = apply_plan(model, planned(model, "matryoshka", matryoshka=settings, lora=LoraConfig(rank=7)))
    move(adapted)
    module, adapter = next(iter(adapted.adapters.items()))
    a, b = adapter.parameters.values()
    layer: Any = model.get_submodule(module)
    x = torch.randn(3, layer.in_features)
    scale = {"none": lambda k: 1.0, "rank": lambda k: 1 / k, "sqrt": lambda k: 1 / k**0.5}[scaling]
    nested = [scale(k) * x @ a[:k].T @ b[:, :k].T for k in (1, 2, 4, 7)]
    torch.testing.assert_close(layer(x) - layer.base_layer(x), sum(nested, torch.zeros(())), atol=1e-5, rtol=1e-5)
    for k, alone in zip((1, 2, 4, 7), nested, strict=True):
        adapted.use_rank(k)
        torch.testing.assert_close(layer(x) - layer.base_layer(x), alone, atol=1e-5, rtol=1e-5)
    adapted.use_rank(5)  # a rank that was not trained for
    alone = scale(5) * x @ a[:5].T @ b[:, :5].T
    torch.testing.assert_close(layer(x) - layer.base_layer(x), alone, atol=1e-5, rtol=1e-5)


def test_mamba_out_proj_gets_an_adapter_that_is_used():
    """In training mode a fused kernel, where there is one, would multiply by the weight itself."""
    network = build("falcon_h1")
    adapted = apply_plan(network, planned(network, "lora"))
    name = next(n for n in adapted.adapters if n.endswith("mamba.out_proj"))
    network.train()
    assert not network.get_submodule(name.removesuffix(".out_proj")).training
    move(adapted)
    network(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.adapters[name].parameters.values())
    remove_adapters(network)
    assert network.get_submodule(name.removesuffix(".out_proj")).training
