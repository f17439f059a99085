"""MatryoshkaLoRA (arXiv 2605.07850) and DyLoRA (arXiv 2210.07558): one LoRA pair, of which any first ranks are one too.

y = W x + B P A x with a diagonal P. An adapter of rank k alone has P = s_k on its first k ranks; MatryoshkaLoRA trains
the sum of the adapters of all ranks in a set, which is one pair again, with P_ii the sum of s_k over the k >= i.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

_SCALES = {"none": lambda k: 1.0, "rank": lambda k: 1.0 / k, "sqrt": lambda k: k**-0.5}


def rank_scale(k: int, scaling: str) -> float:
    """s_k: how many times an adapter of rank `k` counts; `scaling` is `none` (1), `rank` (1 / k) or `sqrt`."""
    return _SCALES[scaling](k)


def single_p(rank: int, k: int, scaling: str) -> Tensor:
    """P [rank] of the adapter of rank `k` alone."""
    return rank_scale(k, scaling) * (torch.arange(1, rank + 1) <= k).float()


def nested_p(ranks: Sequence[int], scaling: str) -> Tensor:
    """P [largest of `ranks`] of the sum of the adapters of all `ranks`."""
    return torch.stack([single_p(max(ranks), k, scaling) for k in ranks]).double().sum(0).float()


class Nesting:
    """One layer's P, now and as trained."""

    def __init__(self, ranks: Sequence[int], scaling: str, loss: str) -> None:
        """`loss`: what is trained, as in `MatryoshkaConfig`."""
        self.ranks, self.scaling, self.loss = tuple(ranks), scaling, loss
        self.rank = max(ranks)
        self.p = nested_p(ranks, scaling) if loss == "sum" else single_p(self.rank, self.rank, scaling)
        """Of the forward pass, and of what engines are sent."""
        self._trained = self.p

    def use(self, k: int | None) -> None:
        """From here on the layer is the adapter of rank `k` (its largest, if that is smaller) alone; `None`: as it is
        trained."""
        self.p = self._trained if k is None else single_p(self.rank, min(k, self.rank), self.scaling)


class TrainedRanks:
    """At which ranks of a model's Matryoshka layers an update computes its loss."""

    def __init__(self, nestings: Sequence[Nesting], seed: int) -> None:
        """`nestings` have the same `loss`; there may be none."""
        self.ranks = tuple(sorted({k for nesting in nestings for k in nesting.ranks}))
        """Of all layers together; to a layer whose largest is smaller, any above it are that."""
        self.loss = nestings[0].loss if nestings else "sum"
        self._seed = seed

    def of(self, step: int, update: int) -> dict[int | None, float]:
        """The ranks of one of a step's updates, and what the loss at each counts; rank `None`: as it is trained.

        A rank that is drawn depends on the seed and these numbers alone, so it is the same for every micro-batch, on
        every rank and in a resumed run.
        """
        if self.loss == "per_rank":
            return dict.fromkeys(self.ranks, 1 / len(self.ranks))
        if self.loss == "sampled":
            return {random.Random(f"{self._seed}/{step}/{update}").choice(self.ranks): 1.0}
        return {None: 1.0}


class NestedB(nn.Module):
    """B [out, rank] with P multiplied into it as for the engines: in fp32, rounded to B's precision once.

    A module, not a function of its weight, so that ZeRO-3 makes the weight whole for it.
    """

    def __init__(self, weight: nn.Parameter, nesting: Nesting) -> None:
        super().__init__()
        self.weight, self.nesting = weight, nesting

    def forward(self, x: Tensor) -> Tensor:
        b = self.weight.float()
        return nn.functional.linear(x, (b * self.nesting.p.to(b)).to(self.weight.dtype))


class NestedLora(LoraVariant):
    """PEFT's LoRA layer whose B is a `NestedB`, which PEFT's own merge would take for a plain one."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: Any, **_: Any) -> None:
        """Nothing to make: B is replaced where the plan is applied."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return result + b(a(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise NotImplementedError("PEFT cannot merge a Matryoshka adapter; use its `LowRank.weight`")

    merge_unsafe = unmerge = merge_safe  # type: ignore[assignment]


def paper_init(a: nn.Parameter) -> None:
    """Start A [rank, in] as the paper's code does, which initialises [in, rank] and so takes the rank for the number of
    inputs: uniform within 1 / sqrt(rank)."""
    bound = a.shape[0] ** -0.5
    nn.init.uniform_(a, -bound, bound)
