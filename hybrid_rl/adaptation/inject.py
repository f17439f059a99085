"""Each treatment's layers, by PEFT: what is injected where, and how it starts.

PEFT's guard against LoRA on Mamba's `out_proj` goes by names; ours by what the code does (`module_facts.bypasses`), and
keeps the fused kernel that it is about from being used. The guard asks the model's configuration, so PEFT is handed
the model within a module that has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
    VeraModel,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hybrid_rl.adaptation.adapters import AdaLora, Adapter, Dora, LowRank, Reparametrised, Vera
from hybrid_rl.adaptation.matryoshka import NestedB, NestedLora, Nesting, paper_init
from hybrid_rl.plan import PlannedModule

ADAPTER = "default"
START = "start"
"""Adapter that takes the first one's start away again, where that is not zero."""

Sharers = Mapping[str, Sequence[str]]
_Make = Callable[[nn.Module, Sequence[PlannedModule], Sharers], dict[str, Adapter]]


def inject(model: nn.Module, treatment: str, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
    """Put the adapters of one treatment on `model`, and return them by module name.

    `sharers`: for each planned module, it and the others that have its very weight, which get the same adapter.
    """
    return _MAKERS[treatment](model, planned, sharers)


class _Holder(nn.Module):
    """The model without its configuration in sight."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held


def put(model: nn.Module, config: PeftConfig, targets: Sequence[str]) -> dict[str, Any]:
    """Inject PEFT layers as `config` says into the modules `targets`, and return the layers by module name."""
    config.target_modules = [f"held.{name}" for name in targets]  # type: ignore[attr-defined]
    active = {m: m._active_adapter for m in model.modules() if isinstance(m, BaseTunerLayer)}
    if isinstance(config, VeraConfig):  # whose layers share one pair of random matrices, which `inject` refuses
        VeraModel(_Holder(model), config, ADAPTER)
    else:
        inject_adapter_in_model(config, _Holder(model), adapter_name=ADAPTER)
    for layer, names in active.items():  # PEFT leaves one adapter active in every layer there is
        layer._active_adapter = names
    return {name: model.get_submodule(name) for name in targets}


def _lora_layers(
    model: nn.Module,
    planned: Sequence[PlannedModule],
    sharers: Sharers,
    rank_of: Callable[[PlannedModule], int | None] = lambda m: m.rank,
    **options: Any,
) -> dict[str, list[Any]]:
    """LoRA layers by module name, each with its sharers'. A shared weight's layers share the factors."""
    targets = {name: m for m in planned for name in sharers[m.name]}
    ranks = {name: rank_of(m) for name, m in targets.items()}
    most = list(ranks.values())
    config = LoraConfig(
        r=max(set(most), key=most.count),  # type: ignore[arg-type]
        lora_alpha=1,
        rank_pattern={f"^held\\.{re.escape(name)}": rank for name, rank in ranks.items()},
        alpha_pattern={
            f"^held\\.{re.escape(name)}": m.alpha if m.alpha is not None else m.rank for name, m in targets.items()
        },
        lora_dropout=0.0,
        **options,
    )
    layers = put(model, config, list(targets))
    for first, *others in (sharers[m.name] for m in planned):
        for other in others:
            layers[other].lora_A, layers[other].lora_B = layers[first].lora_A, layers[first].lora_B
    return {m.name: [layers[name] for name in sharers[m.name]] for m in planned}


def _plain(**options: Any) -> _Make:
    def make(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
        made = _lora_layers(model, planned, sharers, **options)
        return {name: LowRank(name, *_split(layers), trained=(ADAPTER,)) for name, layers in made.items()}

    return make


def _split(layers: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    return layers[0], layers[1:]


def _with_start(start: Callable[[Any], None]) -> _Make:
    """LoRA whose factors start as `start` sets them, off the base weight. A second, frozen pair takes that start away
    again: the policy starts as the base model, whose weight stays."""

    def make(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = {}
        for m, layers in zip(planned, _lora_layers(model, planned, sharers).values(), strict=True):
            layer = layers[0]
            base = layer.get_base_layer().weight
            kept = base.data
            base.data = kept.clone()  # PEFT takes what the factors start as from the weight itself
            start(layer)
            base.data = kept
            for each in layers:
                each.update_layer(START, m.rank, m.alpha, LoraConfig(lora_dropout=0.0))
                each.lora_A[START], each.lora_B[START] = layer.lora_A[START], layer.lora_B[START]
                each.scaling[START] = -layer.scaling[ADAPTER]
                each._active_adapter = [ADAPTER, START]
            for factors in (layer.lora_A, layer.lora_B):
                factors[START].weight.data = factors[ADAPTER].weight.data.clone()
            adapters[m.name] = LowRank(m.name, *_split(layers), trained=(ADAPTER,))
        return adapters

    return make


def _smallest_triplets(layer: Any) -> None:
    """MiLoRA's start (arXiv 2406.09044): the smallest singular triplets of the weight."""
    rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
    u, s, v = torch.linalg.svd(layer.get_base_layer().weight.data.float(), full_matrices=False)
    root = (s[-rank:] / scaling).sqrt()
    layer.lora_A[ADAPTER].weight.data = (root[:, None] * v[-rank:]).contiguous()
    layer.lora_B[ADAPTER].weight.data = (u[:, -rank:] * root).contiguous()


def _matryoshka(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {}
    for m, layers in zip(planned, _lora_layers(model, planned, sharers).values(), strict=True):
        options = m.options
        nesting = Nesting(options["ranks"], options["scaling"], options["loss"])
        for layer in layers:
            layer.lora_variant[ADAPTER] = NestedLora
        factors = layers[0].lora_B
        factors[ADAPTER] = NestedB(factors[ADAPTER].weight, nesting)
        if options["init"] == "paper":
            paper_init(layers[0].lora_A[ADAPTER].weight)
        adapters[m.name] = LowRank(m.name, *_split(layers), trained=(ADAPTER,), nesting=nesting)
    return adapters


def _experts(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
    """MoLF's LoRA pairs, all in the forward pass."""
    adapters: dict[str, Adapter] = {}
    for stabilised in (False, True):
        some = [m for m in planned if m.options["rank_stabilised"] is stabilised]
        if not some:
            continue
        made = _lora_layers(model, some, sharers, lambda m: m.options["ranks"][0], use_rslora=stabilised)
        for m, layers in zip(some, made.values(), strict=True):
            names = [ADAPTER, *(f"expert_{i}" for i in range(2, len(m.options["ranks"]) + 1))]
            for layer in layers:
                for name, rank in zip(names[1:], m.options["ranks"][1:], strict=True):
                    layer.update_layer(name, rank, m.alpha, LoraConfig(lora_dropout=0.0, use_rslora=stabilised))
                    layer.lora_A[name], layer.lora_B[name] = layers[0].lora_A[name], layers[0].lora_B[name]
                layer._active_adapter = names
            adapters[m.name] = LowRank(m.name, *_split(layers), trained=names)
    return adapters


def _dora(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
    made = _lora_layers(model, planned, sharers, use_dora=True)
    return {name: Dora(name, layer, trained=(ADAPTER,)) for name, (layer,) in made.items()}


def _reparametrised(
    config_of: Callable[[Sequence[PlannedModule]], PeftConfig], kind: type[Reparametrised] = Reparametrised
) -> _Make:
    """Treatments of which PEFT has one configuration for all modules, so that those of one rank go together."""

    def make(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = {}
        for _, alike in groupby(sorted(planned, key=_config_key), key=_config_key):
            some = list(alike)
            for name, layer in put(model, config_of(some), [m.name for m in some]).items():
                containers = tuple(f"{n}.{ADAPTER}" for n in layer.adapter_layer_names)
                trained = [n for n, _ in layer.named_parameters() if n.startswith(containers)]
                adapters[name] = kind(name, layer, trained=trained)
        return adapters

    return make


def _config_key(m: PlannedModule) -> tuple[int, float]:
    return m.rank or 0, m.alpha or 0.0


def _adalora(model: nn.Module, planned: Sequence[PlannedModule], sharers: Sharers) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {}
    for (rank, alpha), alike in groupby(sorted(planned, key=_config_key), key=_config_key):
        some = list(alike)
        # What PEFT schedules by these steps, the learner does (`hybrid_rl/learner/adalora.py`).
        config = AdaLoraConfig(init_r=rank, target_r=1, lora_alpha=alpha, total_step=3, tinit=1, tfinal=1)  # type: ignore[arg-type]
        made = put(model, config, [name for m in some for name in sharers[m.name]])
        for m in some:
            layer, *others = (made[name] for name in sharers[m.name])
            for other in others:
                other.lora_A, other.lora_E, other.lora_B = layer.lora_A, layer.lora_E, layer.lora_B
            adapters[m.name] = AdaLora(m.name, layer, others, target=m.options["target"])
    return adapters


def _randlora_config(some: Sequence[PlannedModule]) -> PeftConfig:
    return RandLoraConfig(r=some[0].rank, randlora_alpha=some[0].alpha, randlora_dropout=0.0)  # type: ignore[arg-type]


def _ia3_config(some: Sequence[PlannedModule]) -> PeftConfig:
    names = [m.name for m in some]
    fed = [f"held.{m.name}" for m in some if m.options["scales"] == "input"]
    return IA3Config(target_modules=[f"held.{name}" for name in names], feedforward_modules=fed)


_MAKERS: dict[str, _Make] = {
    "lora": _plain(),
    "rslora": _plain(use_rslora=True),
    "pissa": _with_start(lambda layer: layer.pissa_init(ADAPTER, "pissa")),
    "milora": _with_start(_smallest_triplets),
    "olora": _with_start(lambda layer: layer.olora_init(ADAPTER)),
    "matryoshka": _matryoshka,
    "adalora": _adalora,
    "dora": _dora,
    "vera": _reparametrised(lambda some: VeraConfig(r=some[0].rank or 0, vera_dropout=0.0), Vera),
    "randlora": _reparametrised(_randlora_config),
    "ia3": _reparametrised(_ia3_config),
    "molf": _experts,
    "molf_efficient": _experts,
}
