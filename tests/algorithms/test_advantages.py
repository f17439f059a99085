"""Group advantages against a loop."""

from __future__ import annotations

import math
import statistics

import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_rl.algorithms import group_normalised, has_signal

rewards = st.none() | st.floats(-5, 5).map(lambda x: round(x, 3))
groups = st.integers(2, 6).flatmap(
    lambda g: st.lists(st.lists(rewards, min_size=g, max_size=g), min_size=1, max_size=5)
)


@given(groups)
def test_equals_a_loop_over_groups(table: list[list[float | None]]):
    values = torch.tensor([[0.0 if r is None else r for r in row] for row in table], dtype=torch.float64)
    valid = torch.tensor([[r is not None for r in row] for row in table])
    advantages = group_normalised(values, valid)
    signal = has_signal(values, valid)
    for i, row in enumerate(table):
        present = [r for r in row if r is not None]
        assert bool(signal[i]) == (len(set(present)) > 1)
        for j, r in enumerate(row):
            if r is None or len(present) < 2:
                assert advantages[i, j] == 0
                continue
            expected = (r - statistics.fmean(present)) / (statistics.stdev(present) + 1e-4)
            assert math.isclose(float(advantages[i, j]), expected, abs_tol=1e-9)
