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

    @property
    def scaled_b(self) -> Tensor:
        """`scaling * B @ diag(P)` in fp32 [out, rank]."""
        b = self.b.detach().float() * self.scaling
        return b if self.p is None else b * self.p.detach().to(b)


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

    def weight(self) -> Tensor:
        """The weight that it comes to, in fp32 [out, in]."""
        total = self.base.detach().float()
        for f in self.factors():
            total = total + f.scaled_b @ f.a.detach().float()
        return total

    @property
    def acts_on(self) -> tuple[str, ...]:
        """Parameters of the layer below that it makes others of."""
        return ("weight",)

    def whole(self) -> dict[str, Tensor]:
        """What the parameters that it acts on come to, in fp32."""
        return {"weight": self.weight()}

    def bias(self) -> Tensor | None:
        """The bias that it comes to, in fp32 [out], if the adapter acts on it."""
        return self.whole()["bias"] if "bias" in self.acts_on else None

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
        return self.whole()["weight"]

    @property
    def acts_on(self) -> tuple[str, ...]:
        """IA3 scales the bias with the output."""
        scales = self.layer.get_base_layer().bias is not None and not getattr(self.layer, "is_feedforward", True)
        return ("weight", "bias") if scales else ("weight",)

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """PEFT merges into the parameters in place; they are put back as they were."""
        base = self.layer.get_base_layer()
        kept = {name: p.data for name, p in base.named_parameters()}
        for p in base.parameters():
            p.data = p.data.float().clone()
        try:
            self.layer.merge()
            return {name: base.get_parameter(name).data for name in self.acts_on}
        finally:
            for name, p in base.named_parameters():
                p.data = kept[name]
            self.layer.merged_adapters.clear()


class Vera(Reparametrised):
    """VeRA (arXiv 2310.11454): two trained vectors around one pair of random matrices, which all modules share the
    beginnings of. The matrices are fp32, as PEFT makes them from a seed; the forward pass takes them in its own
    precision, which PEFT's leaves to the caller. PEFT's merge mixes precisions where the model is not fp32."""

    def __init__(self, module: str, layer: Any, *, trained: Sequence[str]) -> None:
        super().__init__(module, layer, trained=trained)
        (self._name,) = layer.vera_lambda_b
        self._a, self._b = layer.vera_A[self._name], layer.vera_B[self._name]

    def compute_in(self, dtype: torch.dtype) -> None:
        """Make the forward pass one in `dtype`, to which the parameters are cast apart; `weight` stays exact."""
        for shared, exact in ((self.layer.vera_A, self._a), (self.layer.vera_B, self._b)):
            if shared[self._name].dtype != dtype:
                shared[self._name] = exact.to(shared[self._name].device, dtype)

    def whole(self) -> dict[str, Tensor]:
        lambda_b, lambda_d = (getattr(self.layer, f"vera_lambda_{x}")[self._name].detach().float() for x in "bd")
        weight = self.base.detach().float()
        out, inner = weight.shape
        a = self._a[:, :inner].to(lambda_d) * lambda_d[:, None]
        b = self._b[:out].to(lambda_b) * lambda_b[:, None]
        return {"weight": weight + b @ a}
