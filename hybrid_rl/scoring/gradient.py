"""Scores from the policy gradient at the start, on rollouts of the base policy with the run's own reward and loss.

The prompts are split in two disjoint halves; h = 1, 2 below. Whatever both halves agree on is signal, and inner
products between the halves are free of the sampling noise that fills the tail of a single gradient's spectrum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

GradientScore = Literal["adam_tail_split", "grad_tail_split", "grad_norm"]
HALVES = 2
_ADAM_EPSILON = 1e-12


class GradientMoments:
    """Mean and mean square, over a half's micro-batches, of every candidate's gradient: 4 fp32 copies of each."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.names = list(shapes)
        self._first = [{n: torch.zeros(s, device=device) for n, s in shapes.items()} for _ in range(HALVES)]
        self._second = [{n: torch.zeros(s, device=device) for n, s in shapes.items()} for _ in range(HALVES)]
        self._count = torch.zeros(HALVES, device=device)

    def add(self, half: int, gradients: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's gradients."""
        for name, gradient in gradients.items():
            self._first[half][name] += gradient
            self._second[half][name].addcmul_(gradient, gradient)
        self._count[half] += 1

    def tensors(self) -> Iterable[Tensor]:
        """The sums, for an all-reduce over data-parallel ranks."""
        yield self._count
        for moments in (*self._first, *self._second):
            yield from moments.values()

    def mean(self, half: int, name: str) -> Tensor:
        return self._first[half][name] / self._count[half].clamp(min=1)

    def adam_direction(self, half: int, name: str) -> Tensor:
        """`mean(g) / sqrt(mean(g^2))`: the direction that Adam would take from these micro-batches."""
        mean_square = self._second[half][name] / self._count[half].clamp(min=1)
        return self.mean(half, name) / (mean_square.sqrt() + _ADAM_EPSILON)


def score_gradients(moments: GradientMoments, score: GradientScore, rank: int) -> dict[str, float]:
    """Score every candidate; larger means less suited to low rank.

    - `grad_tail_split`: `tail_split(G1, G2) / n`, G_h the mean gradient of half h, n the matrix's parameters. What
      constraining one gradient step to `rank` forfeits, per parameter of budget.
    - `adam_tail_split`: the same on Adam-normalised mean gradients.
    - `grad_norm`: `||(G1 + G2) / 2||^2 / n`, importance alone: a control.
    """
    scores = {}
    for name in moments.names:
        direction = moments.adam_direction if score == "adam_tail_split" else moments.mean
        first, second = (direction(half, name) for half in range(HALVES))
        energy = ((first + second) / 2).square().sum() if score == "grad_norm" else tail_split(first, second, rank)
        scores[name] = max(float(energy), 0.0) / first.numel()
    return scores


def tail_split(first: Tensor, second: Tensor, rank: int) -> Tensor:
    """Energy that two noisy views of one matrix share outside their best rank-`rank` parts:
    `<M1, M2> - (<P_r M1, M2> + <P_r M2, M1>) / 2`, P_r the best rank-r truncation. [out, in] x 2 -> scalar.

    With M1 = M2 this is the sum of the squared singular values behind the first `rank`.
    """
    captured = (_truncate(first, rank) * second).sum() + (_truncate(second, rank) * first).sum()
    return (first * second).sum() - captured / 2


def _truncate(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]
