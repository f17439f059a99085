"""AURAC on curves whose area is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from hybrid_rl.evaluate import aurac

RANKS = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("log", [False, True])
def test_aurac_of_a_constant_is_the_constant(log: bool):
    assert aurac(RANKS, [0.4] * 6, log=log) == pytest.approx(0.4)
    assert aurac([3], [0.7], log=log) == 0.7
    assert aurac([4, 6], [0.2, 0.6], log=log) == pytest.approx(0.4)


def test_aurac_of_a_line_is_its_middle():
    """Of one in the rank, and of one in its logarithm."""
    assert aurac(RANKS, [0.02 * r for r in RANKS], log=False) == pytest.approx(0.02 * 33 / 2)
    assert aurac(RANKS, [0.1 + 0.15 * math.log2(r) for r in RANKS], log=True) == pytest.approx(0.1 + 0.15 * 5 / 2)
    # Over doublings, the mean of their trapezoids.
    accuracies = [0.1, 0.5, 0.4, 0.6, 0.9, 0.8]
    mean = sum((a + b) / 2 for a, b in pairwise(accuracies)) / 5
    assert aurac(RANKS, accuracies, log=True) == pytest.approx(mean)


def test_aurac_weighs_ranks_by_their_distance():
    assert aurac([1, 2, 10], [0.0, 0.0, 1.0], log=False) == pytest.approx(4 / 9)
    assert aurac([1, 2, 8], [0.0, 0.0, 1.0], log=True) == pytest.approx(1 / 3)
