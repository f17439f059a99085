"""Gathers what scores look at, one gradient matrix at a time.

Autograd hands over each parameter's gradient as soon as it is complete; it is added to the views and freed before the
next one arrives. So the memory above the model's own is one gradient matrix, three working copies of it, and what
`sketch_floats` counts: for each candidate of shape [m, n] two sketches of each kind of view and 2 (m + n) numbers of
second moments.

Everything that is kept is a sum over micro-batches, so data-parallel ranks each take some of them and add up at the
end: the result does not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybrid_rl.components import Weight
from hybrid_rl.scoring.registry import Evidence, Kind
from hybrid_rl.scoring.view import SketchSizes, View

HALVES = 2
_EPSILON = 1e-30

AllReduce = Callable[[Tensor], object]
"""Sums a tensor over all ranks, in place."""


class SecondMoments:
    """Factored mean of squared gradients, as in Adafactor (arXiv 1804.04235, eq. 4): `V_ij = R_i C_j / mean(R)`, with R
    and C the means over the columns and the rows. [m, n] -> m + n numbers."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        """Sums to add to, of shapes [m] and [n]."""
        self.rows, self.columns = rows, columns

    def add(self, gradient: Tensor) -> None:
        squares = gradient.square()
        self.rows += squares.mean(dim=1)
        self.columns += squares.mean(dim=0)

    def scale(self, gradient: Tensor, count: float) -> Tensor:
        """The gradient divided by the root of its second moment, a mean over `count` added gradients."""
        rows = (self.rows / self.rows.mean().clamp(min=_EPSILON)).clamp(min=_EPSILON)
        columns = (self.columns / count).clamp(min=_EPSILON)
        return gradient * rows.rsqrt()[:, None] * columns.rsqrt()[None]


class Collector:
    """Views of the candidates' gradients over two halves of the data.

    Use: `with collector.watching():` around everything, `with collector.micro_batch(half, weight):` around each forward
    and backward pass, `finish_step` after every step's last one, `evidence` at the end. While it watches, the
    candidates' weights require gradients and their `.grad` stays `None`. No weight is changed.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        kinds: Sequence[Kind],
        rank: int,
        *,
        all_reduce: AllReduce = lambda tensor: None,
    ) -> None:
        self._weights = dict(weights)
        self._kinds = tuple(kinds)
        self._all_reduce = all_reduce
        sizes = SketchSizes.for_rank(rank)
        self._views: dict[Kind, dict[str, tuple[View, View]]] = {}
        for kind in self._kinds:
            self._views[kind] = {
                name: (View(name, _shape(w), sizes, w.device), View(name, _shape(w), sizes, w.device))
                for name, w in self._weights.items()
            }
        self._squares = {name: torch.zeros((), device=w.device) for name, w in self._weights.items()}
        # In one tensor, so that ranks exchange them in one message.
        self._all_moments, self._moments = _moments_of(self._weights)
        self._all_new_moments, self._new_moments = _moments_of(self._weights)
        self._reached: dict[str, Tensor] = {n: torch.zeros((), device=w.device) for n, w in self._weights.items()}
        self._count = 0.0
        self._new_count = torch.zeros(())
        self._scored = torch.zeros(())
        self._current: tuple[int, float, float] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether there are second moments to scale gradients by. Until then only those are gathered."""
        return self._count > 0 or "direction" not in self._kinds

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the candidates' gradients as they come, and leave the parameters as they were."""
        before = {name: weight.requires_grad for name, weight in self._weights.items()}
        hooks = []
        try:
            for name, weight in self._weights.items():
                weight.requires_grad_(True)
                hooks.append(weight.register_post_accumulate_grad_hook(self._hook(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, weight in self._weights.items():
                weight.requires_grad_(before[name])

    @contextmanager
    def micro_batch(self, half: int, weight: float, scale: float = 1.0) -> Iterator[None]:
        """The gradients inside, times `scale`, are those of one micro-batch's mean loss, which counts `weight` in the
        sum of `half`."""
        self._current = (half, weight, scale)
        self._new_count += 1
        self._scored += self.calibrated
        try:
            yield
        finally:
            self._current = None

    def finish_step(self) -> None:
        """Let the gradients seen since the last call enter the second moments. Called by all ranks together."""
        if not self._weights:
            return
        counts = self._new_count.to(next(iter(self._squares.values())).device)
        self._all_reduce(counts)
        self._count += float(counts)
        self._new_count.zero_()
        self._all_reduce(self._all_new_moments)
        self._all_moments += self._all_new_moments
        self._all_new_moments.zero_()

    def evidence(self, weights: Sequence[Weight]) -> tuple[list[Evidence], set[str]]:
        """Add up over the ranks. Returns what was gathered of each candidate, and whom no gradient reached."""
        if not self._weights:
            return [], set()
        for name in self._weights:
            for kind in self._kinds:
                for view in self._views[kind][name]:
                    for tensor in view.tensors:
                        self._all_reduce(tensor)
            self._all_reduce(self._squares[name])
            self._all_reduce(self._reached[name])
        scored = self._scored.to(next(iter(self._squares.values())).device)
        self._all_reduce(scored)
        scored.clamp_(min=1)
        # Without a single micro-batch nothing is known of anyone.
        unreached = {name for name, seen in self._reached.items() if self._count and not float(seen)}
        found = [
            Evidence(
                w,
                gradient=self._views["gradient"][w.name] if "gradient" in self._kinds else None,
                direction=self._views["direction"][w.name] if "direction" in self._kinds else None,
                squares=float(self._squares[w.name] / scored),
            )
            for w in weights
        ]
        return found, unreached

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or self._current is None:
                return
            half, weight, scale = self._current
            gradient = gradient.detach().float() * scale
            self._reached[name] += gradient.any()
            if "direction" in self._kinds:
                self._new_moments[name].add(gradient)
            if not self.calibrated:
                return
            if "gradient" in self._kinds:
                self._squares[name] += gradient.square().sum()
            for kind in self._kinds:
                matrix = self._moments[name].scale(gradient, self._count) if kind == "direction" else gradient
                self._views[kind][name][half].add(matrix, weight)

        return take


def sketch_floats(weights: Sequence[Weight], kinds: int, rank: int) -> int:
    """fp32 numbers that a `Collector` keeps: for each candidate and kind two views, and its second moments twice."""
    sizes = SketchSizes.for_rank(rank)
    shapes = [(w.shape[0], w.shape[1]) for w in weights]
    return sum(HALVES * kinds * sizes.floats(shape) + 2 * sum(shape) for shape in shapes)


def _moments_of(weights: Mapping[str, nn.Parameter]) -> tuple[Tensor, dict[str, SecondMoments]]:
    """Second moments of every weight, and the one tensor that they are views of."""
    sizes = [n for w in weights.values() for n in _shape(w)]
    device = next(iter(weights.values())).device if weights else None
    whole = torch.zeros(sum(sizes), device=device)
    parts = iter(whole.split(sizes))
    return whole, {name: SecondMoments(next(parts), next(parts)) for name in weights}


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
