"""What a weight matrix *is*: which part of the model it belongs to, found from the model's structure, not from names.

Works on a model built on the `meta` device, before any adapter is injected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Component = Literal["attention", "recurrent", "mlp"]
Topology = Literal["attention-only", "recurrent-only", "sequential-hybrid", "parallel-hybrid", "mixed-hybrid"]

_STATE_MARKS = ("decay", "slope", "A_log", "dt_bias", "recurrent_param")


class UnknownArchitecture(ValueError):
    """The model's structure is not one this module can read."""


@dataclass(frozen=True)
class Matrix:
    """One candidate: the weight of a linear layer inside a decoder block."""

    name: str
    """Full module name, e.g. `model.layers.0.self_attn.q_proj`."""
    component: Component
    layer: int
    shape: tuple[int, int]
    """(out features, in features)."""

    @property
    def params(self) -> int:
        return self.shape[0] * self.shape[1]


def candidate_matrices(model: nn.Module) -> list[Matrix]:
    """Every `nn.Linear` of the decoder blocks, in the model's order. Embeddings, heads, norms, convolutions, routers
    and bare parameters (expert stacks, decay rates) are never candidates."""
    stack_name, stack = _decoder_stack(model)
    found = []
    for layer, block in enumerate(stack):
        mixers = _mixers(block)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and module.weight.shape[0] > 1:  # a (1, h) linear is a gate
                inside: list[Component] = [kind for root, kind in mixers.items() if name.startswith(root + ".")]
                component = inside[0] if inside else "mlp"
                out_features, in_features = module.weight.shape
                found.append(Matrix(f"{stack_name}.{layer}.{name}", component, layer, (out_features, in_features)))
    if not found:
        raise UnknownArchitecture(f"{type(model).__name__} has no linear layers in its decoder blocks")
    return found


def topology(model: nn.Module) -> Topology:
    """How the model mixes positions, from the mixers of its decoder blocks."""
    _, stack = _decoder_stack(model)
    kinds = [set(_mixers(block).values()) for block in stack]
    union: set[Component] = set().union(*kinds)
    if not union:
        raise UnknownArchitecture(f"no attention or recurrent mixer found in the blocks of {type(model).__name__}")
    if union == {"attention"}:
        return "attention-only"
    if union == {"recurrent"}:
        return "recurrent-only"
    both = [len(kind) == 2 for kind in kinds]
    return "parallel-hybrid" if all(both) else "mixed-hybrid" if any(both) else "sequential-hybrid"


def _decoder_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The outermost `ModuleList` whose length is the configured number of layers."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not stacks:
        raise UnknownArchitecture(
            f"no stack of num_hidden_layers={config.num_hidden_layers} decoder blocks found in {type(model).__name__}"
        )
    return min(stacks, key=lambda item: item[0].count("."))


def _mixers(block: nn.Module) -> dict[str, Component]:
    """Outermost sequence mixers of one block: relative name -> kind."""
    mixers: dict[str, Component] = {}
    for name, module in block.named_modules():
        if name and not any(name.startswith(root + ".") for root in mixers):
            kind = _mixer_kind(module)
            if kind is not None:
                mixers[name] = kind
    return mixers


def _mixer_kind(module: nn.Module) -> Component | None:
    own = [n for n, _ in module.named_parameters(recurse=False)] + [n for n, _ in module.named_buffers(recurse=False)]
    if any(mark in name for name in own for mark in _STATE_MARKS):
        return "recurrent"
    grouped_or_scaled = any(hasattr(module, a) for a in ("num_key_value_groups", "kv_lora_rank", "scaling"))
    if hasattr(module, "is_causal") and grouped_or_scaled:
        return "attention"
    if any(isinstance(child, nn.Conv1d) and child.groups > 1 for child in module.children()):
        return "recurrent"
    return None
