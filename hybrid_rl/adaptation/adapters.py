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

    def bias(self) -> Tensor | None:
        """The bias that it comes to, in fp32 [out], if the adapter acts on it."""
        return None

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
    """AdaLoRA (arXiv 2303.10512): B diag(E) A, whose ranks are given to the modules that need them.

    What is taken away has E = 0. The number of ranks that the scaling is divided by (PEFT's `ranknum`) stays the one
    that it starts with, so that what stays counts as before.
    """

    def __init__(self, module: str, layer: Any, sharers: Sequence[Any] = (), *, target: int) -> None:
        """`target`: ranks that it is to keep, on average over the modules."""
        super().__init__(module, layer, sharers)
        self.target = target

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


class Dora(LowRank):
    """DoRA (arXiv 2402.09353): LoRA gives the rows' directions, a trained vector their norms."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        name = self._trained[0]
        magnitude = {f"lora_magnitude_vector.{name}.weight": self.layer.lora_magnitude_vector[name].weight}
        return super().parameters | magnitude

    @property
    def needed(self) -> list[nn.Parameter]:
        return [*super().needed, self.layer.lora_magnitude_vector[self._trained[0]].weight]

    def weight(self) -> Tensor:
        direction = super().weight()
        magnitude = self.layer.lora_magnitude_vector[self._trained[0]].weight.detach().float()
        return (magnitude / direction.norm(dim=1))[:, None] * direction


class Reparametrised(Adapter):
    """What comes to another weight by PEFT's own formula: RandLoRA, IA3."""

    def __init__(self, module: str, layer: Any, *, trained: Sequence[str]) -> None:
        """`trained`: names within the layer of its trained parameters."""
        super().__init__(module, layer)
        self._trained = tuple(trained)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.layer.get_parameter(name) for name in self._trained}

    def factors(self) -> list[Factors]:
        return []

    def weight(self) -> Tensor:
        return self._merged()[0]

    def bias(self) -> Tensor | None:
        return self._merged()[1] if self._scales_bias else None

    @property
    def _scales_bias(self) -> bool:
        return self.layer.get_base_layer().bias is not None and not getattr(self.layer, "is_feedforward", True)

    @torch.no_grad()
    def _merged(self) -> tuple[Tensor, Tensor | None]:
        """PEFT merges into the weight, and IA3's into the bias too, in place; they are put back as they were."""
        base = self.layer.get_base_layer()
        kept = {name: p.data for name, p in base.named_parameters()}
        for p in base.parameters():
            p.data = p.data.float().clone()
        try:
            self.layer.merge()
            return base.weight.data, None if base.bias is None else base.bias.data
        finally:
            for name, p in base.named_parameters():
                p.data = kept[name]
            self.layer.merged_adapters.clear()


class Vera(Reparametrised):
    """VeRA (arXiv 2310.11454): two trained vectors around one pair of random matrices, which all modules share the
    beginnings of. PEFT's own merge mixes precisions where the model is not fp32."""

    def __init__(self, module: str, layer: Any, *, trained: Sequence[str]) -> None:
        super().__init__(module, layer, trained=trained)
        layer.register_forward_pre_hook(_follow_precision)

    def weight(self) -> Tensor:
        layer, (name,) = self.layer, self.layer.vera_lambda_b
        weight = self.base.detach().float()
        out, inner = weight.shape
        a = layer.vera_A[name][:, :inner].float() * layer.vera_lambda_d[name].detach().float()[:, None]
        b = layer.vera_B[name][:out].float() * layer.vera_lambda_b[name].detach().float()[:, None]
        return weight + b @ a


def _follow_precision(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    """DeepSpeed casts a model's parameters, but not the buffers that VeRA multiplies by."""
    for buffers in (layer.vera_A, layer.vera_B):
        for name, buffer in buffers.items():
            if buffer.dtype != inputs[0].dtype:
                buffers[name] = buffer.to(inputs[0].dtype)
