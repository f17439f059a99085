"""Views: what is remembered of one matrix-valued sum, however many terms are added to it.

A score needs the leading singular vectors of a sum of gradients and the energy behind them. Small matrices are kept as
they are. Of a large one, turned so that it has no fewer rows than columns, three random projections are kept. They are
linear in the matrix, so terms may be added one at a time, in any order, on any rank:

    Y = M Omega   [rows, k]         the range, for the leading singular vectors
    Z = Psi M     [2 l, columns]    the coefficients in that range, from either half of the rows of Psi

with k = 2 r + 4 and l = 2 k - 4 for truncations of up to rank r: `k rows + 2 l columns` fp32 numbers. What a truncation
leaves over is measured on the half of Z that it was not fitted to, for either half in turn, and never by subtracting
energies: a few per cent of error in an energy would drown a tail of one per cent. (The fit is that of Tropp, Yurtsever,
Udell, Cevher 2017, "Practical sketching algorithms for low-rank matrix approximation"; the other half is an independent
Johnson-Lindenstrauss estimate of what it misses.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

WHOLE_UP_TO = 2**18
"""Elements of a matrix up to which it is kept whole: 1 MiB in fp32."""
_KEPT = 4
"""Test matrices kept at hand; others are drawn anew."""


@dataclass(frozen=True)
class SketchSizes:
    """Rows and columns of the projections."""

    range_columns: int
    fold_rows: int
    """Rows of Psi in either half."""
    whole_up_to: int = WHOLE_UP_TO

    @staticmethod
    def for_rank(rank: int) -> SketchSizes:
        columns = 2 * rank + 4
        return SketchSizes(columns, 2 * columns - 4)

    def floats(self, shape: tuple[int, int]) -> int:
        """fp32 numbers that a view of a matrix of this shape keeps."""
        return shape[0] * shape[1] if self.dense(shape) else self._projected(shape)

    def dense(self, shape: tuple[int, int]) -> bool:
        """Whether such a matrix is kept whole: it is small, or the projections would be no smaller."""
        return shape[0] * shape[1] <= max(self.whole_up_to, self._projected(shape))

    def _projected(self, shape: tuple[int, int]) -> int:
        return max(shape) * self.range_columns + min(shape) * 2 * self.fold_rows


class View:
    """A sum of matrices of one shape, whole or projected. Views of one name and shape share their projections."""

    def __init__(self, name: str, shape: tuple[int, int], sizes: SketchSizes, device: torch.device | str) -> None:
        self.name = name
        self.shape = shape
        self.sizes = sizes
        self.device = torch.device(device)
        self._turned = shape[0] < shape[1]
        rows, columns = max(shape), min(shape)
        if sizes.dense(shape):
            parts = [(rows, columns)]
        else:
            parts = [(rows, sizes.range_columns), (2 * sizes.fold_rows, columns)]
        self.tensors = [torch.zeros(part, device=device) for part in parts]
        """The state, for an all-reduce: the sum over ranks of the views is the view of the sum."""

    @property
    def is_dense(self) -> bool:
        return len(self.tensors) == 1

    def add(self, matrix: Tensor, scale: float = 1.0) -> None:
        """Add `scale * matrix` to the sum. [out, in], any float type."""
        matrix = (matrix.T if self._turned else matrix).detach().float()
        if self.is_dense:
            self.tensors[0].add_(matrix, alpha=scale)
            return
        right, left = self._projections()
        self.tensors[0].addmm_(matrix, right, alpha=scale)
        self.tensors[1].addmm_(left, matrix, alpha=scale)

    def rows(self) -> Tensor:
        """Gaussian combinations of the sum's rows, scaled so that inner products of two views' rows estimate those of
        the sums without bias; the sum itself if it is whole. [any, columns]"""
        if self.is_dense:
            return self.tensors[0]
        return self.tensors[1] / self.tensors[1].shape[0] ** 0.5

    @property
    def folds(self) -> Sequence[int]:
        """Ways to fit a truncation and to measure it apart from the fit; one if the sum is whole."""
        return (0,) if self.is_dense else (0, 1)

    def held_out(self, fold: int) -> Tensor:
        """As `rows`, of combinations that `leading(..., fold)` has not seen."""
        return self.tensors[0] if self.is_dense else self.tensors[1][self._rows_outside(fold)] * self._scale

    def held_out_of(self, left_factor: Tensor, fold: int) -> Tensor:
        """The same combinations of the rows of another matrix [rows, c]. [any, c]"""
        if self.is_dense:
            return left_factor
        _, left = self._projections()
        return left[self._rows_outside(fold)] @ left_factor * self._scale

    def leading(self, rank: int, fold: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The best rank-`rank` part, turned like the state: `(U [rows, r], S [r], V^T [r, columns])`. Estimated if the
        sum is not whole."""
        u, s, vh = self._factors(fold)
        return u[:, :rank], s[:rank], vh[:rank]

    def singular_values(self) -> Tensor:
        """All of them if the sum is whole, else estimates of the leading `range_columns`."""
        return self._factors(0)[1]

    def captured_by_random_rows(self, count: int) -> float:
        """Energy of the sum within the span of `count` random directions of its input space, `||M A^+ A||_F^2`."""
        count = min(count, self.shape[1])
        generator = torch.Generator().manual_seed(_seed(self.name) + 1)
        basis = torch.linalg.qr(torch.randn(self.shape[1], count, generator=generator).to(self.device)).Q
        if self.is_dense or not self._turned:  # the rows are combinations of the input's
            rows = self.rows().T if self._turned else self.rows()
            return float((rows @ basis).square().sum())
        u, s, _ = self._factors(0)  # turned: the input space is the range, known through its leading part
        return float((basis.T @ (u * s)).square().sum())

    def _factors(self, fold: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.is_dense:
            return torch.linalg.svd(self.tensors[0], full_matrices=False)
        _, left = self._projections()
        basis = torch.linalg.qr(self.tensors[0]).Q
        fit = self._rows_outside(1 - fold)
        coefficients = torch.linalg.lstsq(left[fit] @ basis, self.tensors[1][fit]).solution
        u, s, vh = torch.linalg.svd(coefficients, full_matrices=False)
        return basis @ u, s, vh

    @property
    def _scale(self) -> float:
        return self.sizes.fold_rows**-0.5

    def _rows_outside(self, fold: int) -> slice:
        return slice(self.sizes.fold_rows, None) if fold == 0 else slice(0, self.sizes.fold_rows)

    def _projections(self) -> tuple[Tensor, Tensor]:
        """Omega [columns, k] and Psi [2 l, rows], drawn from the name: nothing is stored or sent."""
        return _gaussians(_seed(self.name), max(self.shape), min(self.shape), self.sizes, self.device)


@lru_cache(maxsize=_KEPT)
def _gaussians(seed: int, rows: int, columns: int, sizes: SketchSizes, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
    right = torch.randn(columns, sizes.range_columns, generator=generator)
    left = torch.randn(2 * sizes.fold_rows, rows, generator=generator)
    return right.to(device), left.to(device)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
