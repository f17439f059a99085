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
        if name.removesuffix(".weight") not in adapted.merged:
            with gathered(parameter):
                yield name, parameter
    for module, adapter in adapted.adapters.items():
        if module in adapted.merged:
            base = dict(adapter.layer.get_base_layer().named_parameters())
            with gathered(*base.values(), *adapter.needed):
                on = "lora" in parts
                yield f"{module}.weight", adapter.weight() if on else base["weight"]
                if (bias := adapter.bias()) is not None:
                    yield f"{module}.bias", bias if on else base["bias"]
        else:
            with gathered(*adapter.needed):
                yield from _factors(module, adapter.factors(), adapted.sent_rank, "lora" in parts)


def _factors(module: str, sum_of: Sequence[Factors], rank: int, on: bool) -> Iterator[tuple[str, Tensor]]:
    """The two factors that a sum of low-rank differences is the product of."""
    if len(sum_of) == 1 and sum_of[0].p is None:
        a, b, scaling = sum_of[0].a, sum_of[0].b, sum_of[0].scaling
    else:
        a = torch.cat([f.a.detach() for f in sum_of])
        b, scaling = torch.cat([_scaled(f) for f in sum_of], dim=1), 1.0
    yield from lora_factors({module: (a, b, scaling if on else 0.0)}, rank).items()


def _scaled(f: Factors) -> Tensor:
    b = f.b.detach().float() * f.scaling
    return b if f.p is None else b * f.p.detach().to(b)
