"""Make a model trainable exactly as its adaptation plan says.

PEFT injects the LoRA layers; the fully fine-tuned matrices are unfrozen in place, without the second copy that PEFT's
`modules_to_save` keeps. Everything else is frozen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hybrid_rl.plan import AdaptationPlan, PlannedModule

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module's update `scaling * B @ A`."""

    a: nn.Parameter
    """[rank, in]"""
    b: nn.Parameter
    """[out, rank]"""
    scaling: float


@dataclass(frozen=True)
class AdaptedModel:
    """A model with a plan applied, and its trained parameters."""

    model: nn.Module
    full: dict[str, nn.Parameter]
    """By full parameter name."""
    lora: dict[str, LoraPair]
    """By module name."""

    @property
    def lora_parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.lora.values() for parameter in (pair.a, pair.b)]


def apply_plan(model: nn.Module, plan: AdaptationPlan) -> AdaptedModel:
    """Apply `plan` to `model` in place.

    A weight that several modules share gets one adapter, which they share too. Raises `ValueError` if what PEFT wrapped
    is not what the plan lists: a plan's names are full module names, and nothing may be matched by suffix.
    """
    lora_modules = plan.named("lora")
    sharers = _sharers(model, [m.name for m in lora_modules])
    if lora_modules:
        model = _inject(model, lora_modules, sharers)
    modules: dict[str, Any] = dict(model.named_modules())
    wrapped = {name for name, module in modules.items() if isinstance(module, LoraLayer)}
    wanted = {name for names in sharers.values() for name in names}
    if wrapped != wanted:
        raise ValueError(f"PEFT wrapped other modules than the plan lists: {sorted(wrapped ^ wanted)}")
    for first, *others in sharers.values():
        for other in others:
            modules[other].lora_A, modules[other].lora_B = modules[first].lora_A, modules[first].lora_B

    model.requires_grad_(False)
    full = dict(weight_named(model, m.name) for m in plan.named("full"))
    lora = {}
    for planned in lora_modules:
        layer = modules[planned.name]
        lora[planned.name] = LoraPair(
            layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, layer.scaling[_ADAPTER]
        )
    adapted = AdaptedModel(model, full, lora)
    for parameter in [*full.values(), *adapted.lora_parameters]:
        parameter.requires_grad_(True)
    return adapted


def weight_named(model: nn.Module, name: str) -> tuple[str, nn.Parameter]:
    """A planned module's tensor and its full parameter name: the module's `weight`, or the bare parameter `name`."""
    parent, _, leaf = name.rpartition(".")
    if isinstance(getattr(model.get_submodule(parent), leaf, None), nn.Parameter):
        return name, model.get_parameter(name)
    return f"{name}.weight", model.get_parameter(f"{name}.weight")


def remove_adapters(model: nn.Module) -> None:
    """Take every LoRA layer off again; the base layers were never changed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)  # type: ignore[attr-defined]
    if hasattr(model, "peft_config"):
        del model.peft_config


def _sharers(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """For each module name, it and every other module that has the same weight."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            holders.setdefault(id(module.weight), []).append(name)
    modules: dict[str, Any] = dict(model.named_modules())
    return {n: [n, *(other for other in holders[id(modules[n].weight)] if other != n)] for n in names}


def _inject(model: nn.Module, planned: list[PlannedModule], sharers: dict[str, list[str]]) -> nn.Module:
    targets = {name: m for m in planned for name in sharers[m.name]}
    ranks = [m.rank for m in planned]
    config = LoraConfig(
        target_modules=list(targets),
        r=max(set(ranks), key=ranks.count),  # type: ignore[arg-type]
        lora_alpha=planned[0].alpha,  # type: ignore[arg-type]
        rank_pattern={f"^{re.escape(name)}": m.rank for name, m in targets.items()},
        alpha_pattern={f"^{re.escape(name)}": m.alpha for name, m in targets.items()},
        lora_dropout=0.0,
    )
    return inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
