"""Make a model trainable exactly as its adaptation plan says.

PEFT injects the layers with adapters; the fully fine-tuned matrices are unfrozen in place, without the second copy that
PEFT's `modules_to_save` keeps. Everything else is frozen, and the base model's weights stay what they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hybrid_rl import module_facts as facts
from hybrid_rl.adaptation.adapters import Adapter, LowRank, Vera
from hybrid_rl.adaptation.inject import inject
from hybrid_rl.adaptation.matryoshka import Nesting
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.treatments import ROUTED

logger = logging.getLogger(__name__)

Experts = tuple[tuple[nn.Parameter, ...], ...]


@dataclass(frozen=True)
class AdaptedModel:
    """A model with a plan applied, and its trained parameters."""

    model: nn.Module
    full: dict[str, nn.Parameter]
    """Trained in place, by the parameter's name in the base model."""
    adapters: dict[str, Adapter]
    """By module name."""
    experts: dict[str, Experts] = field(default_factory=dict)
    """Of MoLF, by module name: each expert's parameters, the module's own first where they are one."""
    sent_whole: frozenset[str] = frozenset()
    """Modules whose adapter engines get within the whole weight."""
    sent_rank: int = 0
    """Rank that the factors sent to engines are padded to."""

    @property
    def adapter_parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters.values() for p in adapter.parameters.values()]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter: a weight by its name in the base model, an adapter's by its module's and its own."""
        beside = {f"{m}.{name}": p for m, a in self.adapters.items() for name, p in a.parameters.items()}
        return {**self.full, **beside}

    def compute_in(self, dtype: torch.dtype) -> None:
        """Make the forward pass one in `dtype`: casts what adapters multiply by that is no parameter. What engines are
        sent does not change by it."""
        for adapter in self.adapters.values():
            if isinstance(adapter, Vera):
                adapter.compute_in(dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """To `dtype` as DeepSpeed casts a model: its parameters, not its buffers."""
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.compute_in(dtype)

    @property
    def nestings(self) -> list[Nesting]:
        """Of the Matryoshka layers."""
        return [a.nesting for a in self.adapters.values() if isinstance(a, LowRank) and a.nesting is not None]

    def use_rank(self, k: int | None) -> None:
        """From here on every Matryoshka layer is its adapter of rank `k` alone; `None`: as it is trained."""
        for nesting in self.nestings:
            nesting.use(k)

    @contextmanager
    def at_rank(self, k: int | None) -> Iterator[None]:
        """`use_rank(k)` inside; afterwards as it is trained."""
        self.use_rank(k)
        try:
            yield
        finally:
            self.use_rank(None)


def apply_plan(model: nn.Module, plan: AdaptationPlan) -> AdaptedModel:
    """Apply `plan` to `model` in place.

    A weight that several modules share gets one adapter, which they share too. Raises `ValueError` if what PEFT wrapped
    is not what the plan lists: a plan's names are full module names, and nothing may be matched by suffix.
    """
    full = dict(weight_named(model, m.name) for m in plan.modules if m.trains_weight)
    sharers = _sharers(model, [m.name for m in plan.adapted])
    adapters: dict[str, Adapter] = {}
    by_treatment = sorted(plan.adapted, key=lambda m: m.treatment)
    for treatment, planned in groupby(by_treatment, key=lambda m: m.treatment):
        adapters |= inject(model, treatment, list(planned), sharers)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    wanted = {name for names in sharers.values() for name in names}
    if wrapped != wanted:
        raise ValueError(f"PEFT wrapped other modules than the plan lists: {sorted(wrapped ^ wanted)}")
    _keep_off_shortcuts(model, wanted)

    model.requires_grad_(False)
    adapters = {m.name: adapters[m.name] for m in plan.adapted}
    experts = {m.name: tuple(_experts(m.name, full, adapters[m.name])) for m in plan.adapted if m.treatment in ROUTED}
    sent_whole = frozenset(m.name for m in plan.adapted if m.sent == "weight")
    sent_rank = max((m.sent_rank for m in plan.modules), default=0)
    adapted = AdaptedModel(model, full, adapters, experts, sent_whole, sent_rank)
    for parameter in adapted.trained.values():
        parameter.requires_grad_(True)
    return adapted


def _experts(module: str, full: Mapping[str, nn.Parameter], adapter: Adapter) -> Iterator[tuple[nn.Parameter, ...]]:
    """MoLF's: the weight with its bias where they are trained, then each pair."""
    if f"{module}.weight" in full:
        yield tuple(full[name] for name in (f"{module}.weight", f"{module}.bias") if name in full)
    assert isinstance(adapter, LowRank)
    yield from adapter.pairs


def weight_named(model: nn.Module, name: str) -> tuple[str, nn.Parameter]:
    """A planned module's tensor and its full parameter name: the module's `weight`, or the bare parameter `name`."""
    parent, _, leaf = name.rpartition(".")
    if isinstance(getattr(model.get_submodule(parent), leaf, None), nn.Parameter):
        return name, model.get_parameter(name)
    return f"{name}.weight", model.get_parameter(f"{name}.weight")


def remove_adapters(model: nn.Module) -> None:
    """Take every adapter off again; the base layers were never changed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    for module in model.modules():
        if vars(module).pop("train", None) is not None:
            module.train(model.training)


def _sharers(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """For each module name, it and every other module that has the same weight."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            holders.setdefault(id(module.weight), []).append(name)
    weights = {n: id(model.get_parameter(f"{n}.weight")) for n in names}
    return {n: [n, *(other for other in holders[weights[n]] if other != n)] for n in names}


def _keep_off_shortcuts(model: nn.Module, wrapped: set[str]) -> None:
    """Some blocks (Mamba's) have a fused kernel for training that multiplies by a layer's weight itself, past the
    adapter around it. They stay in evaluation mode, in which they call the layer; no policy here has dropout."""
    kept: set[nn.Module] = set()
    for name in wrapped:
        owner, _, path = name.rpartition(".")
        while owner:
            block = model.get_submodule(owner)
            if facts.bypasses(type(block), path) == "training":
                block.train(False)
                block.train = lambda mode=True, block=block: block  # type: ignore[method-assign]
                kept.add(block)
            owner, _, attribute = owner.rpartition(".")
            if attribute.isdigit():
                break
            path = f"{attribute}.{path}"
    if kept:
        logger.info("%d blocks are kept from a fused kernel that would pass by their adapters", len(kept))
