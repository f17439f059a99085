"""The scores against their definitions."""

from __future__ import annotations

import pytest
import torch

from hybrid_rl.scoring import GradientMoments, random_scores, score_gradients
from hybrid_rl.scoring.gradient import tail_split


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_without_noise_the_split_tail_is_the_energy_behind_the_rank(rank: int):
    torch.manual_seed(0)
    matrix = torch.randn(12, 20)
    energy = torch.linalg.svdvals(matrix).square()
    assert float(tail_split(matrix, matrix, rank)) == pytest.approx(float(energy[rank:].sum()), abs=1e-3)


def test_noise_that_the_halves_do_not_share_is_not_counted():
    """The mean over draws is far below one draw's own tail, which is almost all noise."""
    torch.manual_seed(0)
    signal = torch.outer(torch.randn(24), torch.randn(16))
    draws = [(signal + torch.randn(24, 16), signal + torch.randn(24, 16)) for _ in range(50)]
    split = sum(float(tail_split(a, b, 1)) for a, b in draws) / 50
    naive = sum(float(torch.linalg.svdvals(a)[1:].square().sum()) for a, _ in draws) / 50
    assert abs(split) < 0.15 * naive


def _moments(gradients: dict[str, list[list[torch.Tensor]]]) -> GradientMoments:
    shapes = {name: tuple(halves[0][0].shape) for name, halves in gradients.items()}
    moments = GradientMoments(shapes, torch.device("cpu"))
    for half in range(2):
        for i in range(len(next(iter(gradients.values()))[half])):
            moments.add(half, {name: halves[half][i] for name, halves in gradients.items()})
    return moments


def test_scores_follow_their_formulas():
    torch.manual_seed(1)
    batches = {name: [[torch.randn(6, 4) for _ in range(3)] for _ in range(2)] for name in ("a", "b")}
    moments = _moments(batches)
    for name, halves in batches.items():
        means = [torch.stack(h).mean(0) for h in halves]
        adams = [m / torch.stack(h).square().mean(0).sqrt() for m, h in zip(means, halves, strict=True)]
        for score, (first, second) in {"grad_tail_split": means, "adam_tail_split": adams}.items():
            expected = max(float(tail_split(first, second, 2)), 0) / 24
            assert score_gradients(moments, score, 2)[name] == pytest.approx(expected, rel=1e-4, abs=1e-9)  # type: ignore[arg-type]
        norm = float(((means[0] + means[1]) / 2).square().sum()) / 24
        assert score_gradients(moments, "grad_norm", 2)[name] == pytest.approx(norm, rel=1e-4, abs=1e-9)


def test_a_full_rank_signal_scores_above_a_low_rank_one():
    torch.manual_seed(2)
    shared = {"full": torch.linalg.qr(torch.randn(16, 16)).Q, "low": torch.outer(torch.randn(16), torch.randn(16))}
    gradients = {
        name: [[signal / signal.norm() + 0.02 * torch.randn(16, 16) for _ in range(8)] for _ in range(2)]
        for name, signal in shared.items()
    }
    for score in ("adam_tail_split", "grad_tail_split"):
        scores = score_gradients(_moments(gradients), score, 2)  # type: ignore[arg-type]
        assert scores["full"] > 3 * scores["low"]


def test_random_scores_are_seeded():
    assert random_scores(["a", "b"], 1) == random_scores(["a", "b"], 1) != random_scores(["a", "b"], 2)
