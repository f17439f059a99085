"""The clipped loss against loops and finite differences; micro-batching must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_rl.algorithms import clipped_policy_loss, k3_divergence

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def _case(seed: int, n: int = 5, t: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged masks, with an empty completion."""
    g = torch.Generator().manual_seed(seed)
    new, old = (-3 * torch.rand(n, t, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(0, t + 1, (n,), generator=g)
    lengths[0] = 0
    mask = (torch.arange(t)[None] < lengths[:, None]).double()
    return new, old, torch.randn(n, generator=g, dtype=torch.float64), mask


def _loop(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[float, int]:
    total, clipped = 0.0, 0
    for i in range(len(new)):
        tokens = [j for j in range(new.shape[1]) if mask[i, j]]
        terms = []
        for j in tokens:
            ratio, a = math.exp(float(new[i, j] - old[i, j])), float(advantages[i])
            bounded = min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"]) * a
            terms.append(-min(ratio * a, bounded))
            clipped += bounded < ratio * a
        total += sum(terms) / len(terms) / len(new) if terms else 0.0
    return total, clipped


def _loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor):
    return clipped_policy_loss(new, old, advantages, mask, **CLIP, weights_N=torch.full_like(advantages, 1 / len(new)))


@given(st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_equals_a_loop_over_tokens(seed: int):
    case = _case(seed)
    result = _loss(*case)
    value, clipped = _loop(*case)
    assert float(result.loss) == pytest.approx(value, abs=1e-12)
    assert int(result.clipped_tokens) == clipped


@pytest.mark.parametrize("seed", range(5))
def test_gradient_equals_finite_differences(seed: int):
    new, old, advantages, mask = _case(seed, n=3, t=4)
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: _loss(x, old, advantages, mask).loss, (new,))


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_gradient(seed: int, size: int):
    new, old, advantages, mask = _case(seed, n=7)
    weights = torch.full_like(advantages, 1 / 7)
    whole, parts = new.clone().requires_grad_(True), new.clone().requires_grad_(True)
    clipped_policy_loss(whole, old, advantages, mask, **CLIP, weights_N=weights).loss.backward()
    for i in range(0, 7, size):
        rows = slice(i, i + size)
        arguments = (parts[rows], old[rows], advantages[rows], mask[rows])
        clipped_policy_loss(*arguments, **CLIP, weights_N=weights[rows]).loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-14, rtol=0)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_k3_is_a_sum_of_non_negative_terms(seed: int):
    p, q, _, mask = _case(seed)
    expected = 0.0
    for i, j in zip(*mask.nonzero(as_tuple=True), strict=True):
        log_ratio = float(q[i, j] - p[i, j])
        expected += math.exp(log_ratio) - log_ratio - 1
    assert float(k3_divergence(p, q, mask)) == pytest.approx(expected, abs=1e-9)
    assert float(k3_divergence(p, p, mask)) == 0
