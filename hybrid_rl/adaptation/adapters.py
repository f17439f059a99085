"""What an adapted layer holds beside its weight, whatever PEFT layer computes it.

Engines need one of two things of it: the factors of a low-rank difference from the base model's weight, which they can
serve as a LoRA adapter, or the whole weight that it comes to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_rl.adaptation.matryoshka import Nesting


@dataclass(frozen=True)
class Factors:
    """A low-rank difference `scaling * B @ diag(P) @ A`."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scaling: float
    p: Tensor | None = None
    """[rank]; all 1 by default."""


class Adapter(ABC):
    """One module's adapter; several modules share it where they share a weight."""

    def __init__(self, module: str, layer: Any, sharers: Sequence[Any] = ()) -> None:
        self.module, self.layer, self._layers = module, layer, (layer, *sharers)
        """The layers are PEFT's, `BaseTunerLayer`."""

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors, by their names within the layer, in a fixed order."""

    @property
    def base(self) -> nn.Parameter:
        """The weight that it stands beside."""
        return self.layer.get_base_layer().weight

    @property
    def needed(self) -> list[nn.Parameter]:
        """What must be whole for `factors` and `weight` (ZeRO-3 keeps parameters partitioned)."""
        return list(self.layer.parameters())

    @abstractmethod
    def factors(self) -> list[Factors]:
        """The difference from the base model's weight, as a sum; empty where it is not of low rank."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight that it comes to, in fp32 [out, in]."""

    def switch(self, on: bool) -> None:
        """Whether the adapter is part of the forward pass."""
        for layer in self._layers:
            layer._disable_adapters = not on  # PEFT's own switch would also change what is trained


class LowRank(Adapter):
    """LoRA and what comes to it: the sum of one or more pairs of factors."""

    def __init__(
        self,
        module: str,
        layer: Any,
        sharers: Sequence[Any] = (),
        *,
        trained: Sequence[str],
        nesting: Nesting | None = None,
    ) -> None:
        """`trained`: which of the layer's adapters are trained; the others stay as they are."""
        super().__init__(module, layer, sharers)
        self._trained, self.nesting = tuple(trained), nesting

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{which}.{name}.weight": getattr(self.layer, which)[name].weight
            for name in self._trained
            for which in ("lora_A", "lora_B")
        }

    @property
    def needed(self) -> list[nn.Parameter]:
        return [f.weight for name in self.layer.lora_A for f in (self.layer.lora_A[name], self.layer.lora_B[name])]

    @property
    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """A and B of each trained pair."""
        for name in self._trained:
            yield self.layer.lora_A[name].weight, self.layer.lora_B[name].weight

    def factors(self) -> list[Factors]:
        layer: Any = self.layer
        p = None if self.nesting is None else self.nesting.p
        return [
            Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], p)
            for name in layer.lora_A
        ]

    def weight(self) -> Tensor:
        total = self.base.detach().float()
        for f in self.factors():
            b = f.b.detach().float() * f.scaling
            total = total + (b if f.p is None else b * f.p.to(b)) @ f.a.detach().float()
        return total


class AdaLora(Adapter):
    """AdaLoRA (arXiv 2303.10512): B diag(E) A, whose ranks are given to the modules that need them."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        layer: Any = self.layer
        return {f"{which}.{name}": p for which in _ADALORA for name, p in getattr(layer, which).items()}

    @property
    def needed(self) -> list[nn.Parameter]:
        return [*self.parameters.values(), *self.layer.ranknum.values()]

    def factors(self) -> list[Factors]:
        layer: Any = self.layer
        return [
            Factors(
                layer.lora_A[name],
                layer.lora_B[name],
                layer.scaling[name] / (float(layer.ranknum[name]) + _ADALORA_EPSILON),
                layer.lora_E[name].flatten(),
            )
            for name in layer.lora_A
        ]

    def weight(self) -> Tensor:
        total = self.base.detach().float()
        for f in self.factors():
            assert f.p is not None
            total = total + (f.b.detach().float() * f.p.detach().float() * f.scaling) @ f.a.detach().float()
        return total


_ADALORA = ("lora_A", "lora_B", "lora_E")
_ADALORA_EPSILON = 1e-5
"""PEFT's, added to the number of ranks that the scaling is divided by."""


class Reparametrised(Adapter):
    """What comes to another weight by PEFT's own formula: DoRA, VeRA, RandLoRA, IA3."""

    def __init__(self, module: str, layer: Any, *, trained: Sequence[str]) -> None:
        """`trained`: names within the layer of its trained parameters."""
        super().__init__(module, layer)
        self._trained = tuple(trained)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.layer.get_parameter(name) for name in self._trained}

    def factors(self) -> list[Factors]:
        return []

    @torch.no_grad()
    def weight(self) -> Tensor:
        """PEFT merges into the weight, in place; it is put back as it was."""
        layer: Any = self.layer
        base = layer.get_base_layer()
        kept = base.weight.data
        base.weight.data = kept.float().clone()
        try:
            layer.merge()
            return base.weight.data
        finally:
            base.weight.data = kept
            layer.merged_adapters.clear()
