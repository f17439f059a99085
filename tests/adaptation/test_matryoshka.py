"""P as it was published, how A starts, and that any rank is a slice."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import LowRank, apply_plan
from hybrid_rl.adaptation.inject import ADAPTER
from hybrid_rl.adaptation.matryoshka import nested_p, paper_init, rank_scale, single_p
from hybrid_rl.components import read_model
from hybrid_rl.config import ConfigError, PlanConfig
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan
from hybrid_rl.treatments import LoraConfig, MatryoshkaConfig
from hybrid_rl.weight_sync import lora_names, served_tensors

POWERS = (1, 2, 4, 8, 16, 32)
SCALINGS = {"none": lambda k: 1.0, "rank": lambda k: 1 / k, "sqrt": lambda k: 1 / k**0.5}


@pytest.fixture
def model(tiny_model: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def planned(model: nn.Module, rank: int, **settings: Any) -> AdaptationPlan:
    """Matryoshka on every candidate."""
    options: dict[str, Any] = {"settings": PlanConfig(), "lora": LoraConfig(rank=rank)}
    options["matryoshka"] = MatryoshkaConfig(**settings)
    return build_plan(read_model(model), {}, model="m", method={}, seed=0, ratio=0.0, rest="matryoshka", **options)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("none", (6, 5, 4, 3, 2, 1, 1)),
        ("rank", (1.969, 0.969, 0.469, 0.219, 0.094, 0.031, 0.031)),
        ("sqrt", (2.987, 1.987, 1.280, 0.780, 0.427, 0.177, 0.177)),
    ],
)
def test_p_has_the_published_numbers(scaling: str, expected: tuple[float, ...]):
    """Of R = 32 and K = 1, 2, 4, ..., 32, at i = 1, 2, 3, 5, 9, 17, 32."""
    p = nested_p(POWERS, scaling)
    assert p.shape == (32,)
    assert p[torch.tensor([1, 2, 3, 5, 9, 17, 32]) - 1].tolist() == pytest.approx(expected, abs=5e-4)
    # Constant between nested ranks, and falling at each.
    steps = torch.tensor([b - a for a, b in itertools.pairwise((0, *POWERS))])
    assert torch.equal(p, torch.repeat_interleave(p[torch.tensor((0, *POWERS[:-1]))], steps))
    torch.testing.assert_close(p, torch.stack([single_p(32, k, scaling) for k in POWERS]).sum(0))
    for k in (1, 3, 32):
        alone = single_p(32, k, scaling)
        torch.testing.assert_close(alone, torch.tensor([SCALINGS[scaling](k) * (i < k) for i in range(32)]))
        assert rank_scale(k, scaling) == pytest.approx(SCALINGS[scaling](k))


def test_a_starts_as_the_paper_or_as_peft_has_it(model: nn.Module):
    """The paper's range goes by the rank, PEFT's by the inputs: .177 and .022 for 2048 inputs and rank 32."""
    wide = nn.Parameter(torch.zeros(32, 2048))
    paper_init(wide)
    peft = torch.empty(32, 2048)
    nn.init.kaiming_uniform_(peft, a=5**0.5)
    for a, bound in ((wide.detach(), 32**-0.5), (peft, 2048**-0.5)):
        assert 0.999 * bound < float(a.abs().max()) <= bound
        assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    for init, divisor in (("paper", lambda a: a.shape[0]), ("peft", lambda a: a.shape[1])):
        adapted = apply_plan(copy.deepcopy(model), planned(model, 8, init=init))
        for adapter in adapted.adapters.values():
            a, b = (p.detach() for p in adapter.parameters.values())
            assert 0.9 * divisor(a) ** -0.5 < float(a.abs().max()) <= divisor(a) ** -0.5
            assert not b.any()


@pytest.mark.parametrize("loss", ["sum", "sampled"])
@pytest.mark.parametrize("scaling", list(SCALINGS))
@torch.no_grad()
def test_every_rank_is_a_slice(model: nn.Module, scaling: Any, loss: Any):
    """Of what engines are sent, of the whole weight and of the forward pass, for every k up to R."""
    adapted = apply_plan(model, planned(model, 6, ranks=[1, 2, 4, 6], scaling=scaling, loss=loss))
    torch.manual_seed(1)
    for parameter in adapted.trained.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    name, adapter = next(iter(adapted.adapters.items()))
    assert isinstance(adapter, LowRank)
    a, b = adapter.parameters.values()
    layer: Any = model.get_submodule(name)
    x = torch.randn(5, layer.in_features)
    for k in range(1, 7):
        with adapted.at_rank(k):
            sliced = SCALINGS[scaling](k) * b[:, :k] @ a[:k]
            sent = dict(served_tensors(adapted))
            sent_a, sent_b = (sent[n] for n in lora_names(name))
            assert torch.equal(sent_a, a)
            assert torch.equal(sent_b[:, k:], torch.zeros_like(sent_b[:, k:]))
            torch.testing.assert_close(sent_b[:, :k] @ sent_a[:k], sliced)
            torch.testing.assert_close(adapter.weight() - adapter.base, sliced, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ sliced.T, atol=1e-5, rtol=1e-5)
    whole = {"sum": (1, 2, 4, 6), "sampled": (6,)}[loss]
    trained = sum((SCALINGS[scaling](k) * b[:, :k] @ a[:k] for k in whole), torch.zeros(()))
    torch.testing.assert_close(adapter.weight() - adapter.base, trained, atol=1e-5, rtol=1e-5)


def test_peft_does_not_merge_without_p(model: nn.Module):
    layer: Any = next(iter(apply_plan(model, planned(model, 4)).adapters.values())).layer
    for safe in (False, True):
        with pytest.raises(NotImplementedError, match="cannot merge a Matryoshka adapter"):
            layer.merge(safe_merge=safe)
    with pytest.raises(NotImplementedError, match="cannot merge"):
        layer.lora_variant[ADAPTER].unmerge(layer, ADAPTER, layer.base_layer.weight)


@torch.no_grad()
def test_bf16_computes_with_the_factors_that_engines_get(model: nn.Module):
    """P is multiplied into B in fp32 and rounded once, on both sides."""
    adapted = apply_plan(model, planned(model, 7, scaling="sqrt"))
    torch.manual_seed(1)
    for parameter in adapted.trained.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.cast(torch.bfloat16)
    sent = {name: tensor.to(torch.bfloat16) for name, tensor in served_tensors(adapted)}
    for name, adapter in adapted.adapters.items():
        layer = adapter.layer
        x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
        a, b = (sent[n] for n in lora_names(name))
        assert torch.equal(layer(x), layer.base_layer(x) + x @ a.T @ b.T)


def test_a_plan_has_one_loss_of_its_matryoshka_modules(model: nn.Module):
    plan = planned(model, 4, loss="per_rank")
    other = dataclasses.replace(plan.modules[0], options={**plan.modules[0].options, "loss": "sum"})
    mixed = dataclasses.replace(plan, modules=(other, *plan.modules[1:]))
    plan.check_against(read_model(model))
    with pytest.raises(ConfigError, match=r"loss=per_rank and others with sum, but an update has one"):
        mixed.check_against(read_model(model))
