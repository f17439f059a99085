"""Sketched sums against the sums themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from hybrid_rl.scoring.gradient import energy, mean_view, shared_energy, shared_tail, tail_energy
from hybrid_rl.scoring.view import SketchSizes, View

SKETCHED = replace(SketchSizes.for_rank(2), whole_up_to=0)
WHOLE = replace(SKETCHED, whole_up_to=2**30)


def views(name: str, first: torch.Tensor, second: torch.Tensor, sizes: SketchSizes) -> tuple[View, View]:
    pair = (View(name, tuple(first.shape), sizes, "cpu"), View(name, tuple(first.shape), sizes, "cpu"))
    for view, matrix in zip(pair, (first, second), strict=True):
        view.add(matrix)
    return pair


def noisy_pairs(noise: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Forty pairs of views of matrices with power-law spectra of many slopes, sizes and shapes."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(40):
        m, n = [(512, 512), (512, 1024), (640, 448), (1024, 512)][i % 4]
        slope, size = 0.3 + 2 * torch.rand(1, generator=generator), 0.2 + 3 * torch.rand(1, generator=generator)
        k = min(m, n)
        left = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
        signal = (left * torch.arange(1, k + 1) ** -slope) @ right.T * size
        spread = noise * signal.norm() / (m * n) ** 0.5
        pairs.append(tuple(signal + spread * torch.randn(m, n, generator=generator) for _ in range(2)))
    return pairs  # type: ignore[return-value]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_sketched_scores_rank_as_exact_ones(noise: float):
    """Spearman of at least 0.95 against the scores by exact singular value decomposition."""
    pairs = noisy_pairs(noise)
    sketched = [views(f"m{i}", *pair, SKETCHED) for i, pair in enumerate(pairs)]
    assert not any(view.is_dense for pair in sketched for view in pair)
    whole = [views(f"m{i}", *pair, WHOLE) for i, pair in enumerate(pairs)]
    assert all(view.is_dense for pair in whole for view in pair)
    for score in (
        lambda pair: shared_tail(pair, 2),
        lambda pair: tail_energy(mean_view(pair), 2),
        shared_energy,
        lambda pair: energy(mean_view(pair)),
    ):
        estimated, exact = [score(p) for p in sketched], [score(p) for p in whole]
        assert spearmanr(estimated, exact).statistic >= 0.95


def test_a_view_is_linear_and_bounded():
    torch.manual_seed(0)
    terms = [torch.randn(96, 200) for _ in range(5)]
    whole = views("m", sum(terms, torch.zeros(96, 200)), torch.zeros(96, 200), SKETCHED)[0]
    parts = [View("m", (96, 200), SKETCHED, "cpu") for _ in range(2)]
    for i, term in enumerate(terms):
        parts[i % 2].add(term * 2, scale=0.5)
    for total, a, b in zip(whole.tensors, parts[0].tensors, parts[1].tensors, strict=True):
        torch.testing.assert_close(total, a + b, rtol=1e-4, atol=1e-3)
    assert sum(t.numel() for t in whole.tensors) == SKETCHED.floats((96, 200)) == 200 * 8 + 96 * 24


def test_small_matrices_are_kept_whole():
    assert View("m", (64, 64), SketchSizes.for_rank(2), "cpu").is_dense
    assert not View("m", (1024, 1024), SketchSizes.for_rank(2), "cpu").is_dense
