"""What engines are sent of an adapted model: whole weights, and factors of low-rank differences from the base model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hybrid_rl.adaptation import PARTS, AdaptedModel, Factors
from hybrid_rl.weight_sync.codec import lora_factors

Gathered = Callable[..., AbstractContextManager[Any]]


def served_tensors(
    adapted: AdaptedModel,
    parts: Collection[str] = PARTS,
    gathered: Gathered = lambda *parameters: nullcontext(),
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that engines are sent, by its name in updates. One module is whole at a time, within `gathered`,
    until the next is asked for. Without the part `lora`, adapters contribute nothing."""
    for name, parameter in adapted.full.items():
        if name.removesuffix(".weight") not in adapted.sent_whole:
            with gathered(parameter):
                yield name, parameter
    for module, adapter in adapted.adapters.items():
        if module in adapted.sent_whole:
            base = dict(adapter.layer.get_base_layer().named_parameters())
            with gathered(*base.values(), *adapter.needed):
                whole = adapter.whole() if "lora" in parts else base
                for leaf in adapter.acts_on:
                    yield f"{module}.{leaf}", whole[leaf]
        else:
            with gathered(*adapter.needed):
                yield from _factors(module, adapter.factors(), adapted.sent_rank, "lora" in parts)


def _factors(module: str, sum_of: Sequence[Factors], rank: int, on: bool) -> Iterator[tuple[str, Tensor]]:
    """The two factors that a sum of low-rank differences is the product of."""
    a, b = torch.cat([f.a.detach() for f in sum_of]), torch.cat([f.scaled_b for f in sum_of], dim=1)
    yield from lora_factors({module: (a, b, float(on))}, rank).items()
