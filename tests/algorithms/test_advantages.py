"""Advantages and penalties against the statistics module, and what must hold of any."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_rl.algorithms import find_advantage, has_signal, overlong_penalty

GROUPED = ["group_normalised", "group_centred", "batch_normalised", "rloo", "reinforce_pp_baseline"]
Table = list[list[float | None]]

rewards = st.none() | st.sampled_from([0.0, 0.1, 1.0]) | st.floats(-5, 5).map(lambda x: round(x, 3))
tables = st.integers(1, 5).flatmap(
    lambda g: st.lists(st.lists(rewards, min_size=g, max_size=g), min_size=1, max_size=4)
)


def _tensors(table: Table, missing: float = math.nan, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    values = torch.tensor([[missing if r is None else r for r in row] for row in table], dtype=dtype)
    return values, torch.tensor([[r is not None for r in row] for row in table])


def _naive(name: str, table: Table) -> Table:
    groups = [[r for r in row if r is not None] for row in table]
    taught = [len(set(group)) > 1 for group in groups]
    everything = [r for group in groups for r in group]
    centred = [r - statistics.fmean(g) if on else 0 for g, on in zip(groups, taught, strict=True) for r in g]

    def advantage(i: int, r: float) -> float:
        group = groups[i]
        if name == "raw":
            return r
        if not taught[i]:
            return 0
        difference = r - statistics.fmean(group)
        if name == "group_normalised":
            return difference / (statistics.stdev(group) + 1e-4)
        if name == "batch_normalised":
            return difference / (statistics.stdev(everything) + 1e-4)
        if name == "rloo":
            return r - (sum(group) - r) / (len(group) - 1)
        if name == "reinforce_pp_baseline":
            return (difference - statistics.fmean(centred)) / (statistics.stdev(centred) + 1e-4)
        return difference

    return [[0 if r is None else advantage(i, r) for r in row] for i, row in enumerate(table)]


@pytest.mark.parametrize("name", [*GROUPED, "raw"])
def test_equals_a_loop_over_groups(name: str):
    @given(tables)
    @settings(max_examples=500, deadline=None)
    def equal(table: Table):
        found = find_advantage(name)(*_tensors(table))
        torch.testing.assert_close(found, torch.tensor(_naive(name, table), dtype=torch.float64), atol=1e-9, rtol=1e-9)

    equal()


@given(tables)
@settings(deadline=None)
def test_signal_is_two_different_rewards(table: Table):
    expected = [len({r for r in row if r is not None}) > 1 for row in table]
    assert has_signal(*_tensors(table)).tolist() == expected


@pytest.mark.parametrize("name", GROUPED)
def test_a_constant_added_to_a_group_changes_nothing(name: str):
    """But for the batch's deviation of the rewards, which sees where groups lie: there, to all groups."""

    @given(tables, st.lists(st.integers(-8, 8), min_size=4, max_size=4))
    @settings(max_examples=200, deadline=None)
    def equal(table: Table, shifts: list[int]):
        if name == "batch_normalised":
            shifts = shifts[:1] * 4
        values, valid = _tensors(table)
        shifted = values + torch.tensor(shifts[: len(values)], dtype=torch.float64)[:, None]
        # Not by way of rounding, either: what counts as a signal must be one before and after.
        if has_signal(values, valid).tolist() == has_signal(shifted, valid).tolist():
            advantage = find_advantage(name)
            torch.testing.assert_close(advantage(values, valid), advantage(shifted, valid), atol=1e-7, rtol=1e-7)

    equal()


@pytest.mark.parametrize("name", [*GROUPED, "raw"])
def test_what_is_invalid_is_ignored(name: str):
    @given(tables, st.floats(-1e3, 1e3))
    @settings(max_examples=200, deadline=None)
    def equal(table: Table, other: float):
        with_nan, valid = _tensors(table)
        with_other, _ = _tensors(table, missing=other)
        found = find_advantage(name)(with_nan, valid)
        assert found[~valid].eq(0).all()
        assert torch.equal(found, find_advantage(name)(with_other, valid))

    equal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("reward", [0.1, 0.7, -1 / 3, 1e4 / 3])
def test_groups_without_signal_get_exactly_zero(name: str, dtype: torch.dtype, reward: float):
    """The mean of equal numbers may differ from them by rounding; their deviation would blow that up."""
    table: Table = [[reward] * 7, [reward, None, reward, None, None, None, None], [1.0, *[0.0] * 6], [None] * 7]
    found = find_advantage(name)(*_tensors(table, dtype=dtype))
    assert found.dtype == dtype
    assert found[[0, 1, 3]].eq(0).all()
    assert found[2, 0] > 0


@pytest.mark.parametrize("name", GROUPED)
def test_advantages_of_a_group_sum_to_zero(name: str):
    values = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = find_advantage(name)(values, torch.ones_like(values, dtype=torch.bool))
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(0, 40), st.floats(0, 3))
@settings(max_examples=500, deadline=None)
def test_overlong_penalty_equals_its_formula(length: int, limit: int, buffer: int, penalty: float):
    buffer = min(buffer, limit)
    if buffer == 0 or length <= limit - buffer:
        share = 0.0
    elif length <= limit:
        share = (limit - buffer - length) / buffer
    else:
        share = -1.0
    found = overlong_penalty(torch.tensor([length]), limit, buffer, penalty)
    assert float(found) == pytest.approx(penalty * share, rel=1e-6)
