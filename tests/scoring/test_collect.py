"""Gradients gathered one at a time against gradients kept whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybrid_rl.scoring.collect import Collector, SecondMoments


def test_factored_second_moments_are_exact_for_rank_one_squares():
    torch.manual_seed(0)
    scale = torch.outer(torch.rand(6) + 0.1, torch.rand(9) + 0.1)
    moments = SecondMoments(torch.zeros(6), torch.zeros(9))
    moments.add(scale.sqrt())
    moments.add(-scale.sqrt())
    torch.testing.assert_close(moments.scale(scale.sqrt(), 2.0), torch.ones(6, 9))


def test_gradients_are_taken_as_they_come_and_freed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 3))
    model.requires_grad_(False)
    weights = {"0": model[0].weight, "2": model[2].weight}
    before = {name: w.clone() for name, w in weights.items()}
    collector = Collector(weights, ["gradient", "direction"], rank=1)
    data = [torch.randn(4, 7) for _ in range(6)]
    assert not collector.calibrated
    with collector.watching():
        for calibrate in (True, False):
            for i, x in enumerate(data[:2] if calibrate else data):
                with collector.micro_batch(i % 2, weight=1 / 3, scale=2.0):
                    (model(x).square().mean() / 2).backward()
                assert all(p.grad is None for p in model.parameters())
            collector.finish_step()
    assert collector.calibrated

    def gradients(x: torch.Tensor) -> dict[str, torch.Tensor]:
        copy = {name: w.detach().requires_grad_(True) for name, w in weights.items()}
        hidden = torch.tanh(x @ copy["0"].T + model[0].bias)
        out = (hidden @ copy["2"].T + model[2].bias) @ model[3].weight.T + model[3].bias
        return dict(zip(copy, torch.autograd.grad(out.square().mean(), list(copy.values())), strict=True))

    expected = [gradients(x) for x in data]
    found, unreached = collector.evidence([_weight(name, w) for name, w in weights.items()])
    assert unreached == set()
    for evidence in found:
        name = evidence.weight.name
        calibration = SecondMoments(*(torch.zeros(n) for n in weights[name].shape))
        for g in expected[:2]:
            calibration.add(g[name])
        for half in range(2):
            mean = sum((g[name] for g in expected[half::2]), torch.zeros(())) / 3
            direction = sum((calibration.scale(g[name], 2.0) for g in expected[half::2]), torch.zeros(())) / 3
            torch.testing.assert_close(_matrix(evidence.gradient[half]), mean)
            torch.testing.assert_close(_matrix(evidence.direction[half]), direction)
        # The two calibration passes do not enter the squares.
        squares = sum(float(g[name].square().sum()) for g in expected) / 6
        assert evidence.squares == pytest.approx(squares, rel=1e-5)
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert not weight.requires_grad


def test_a_weight_that_no_gradient_reaches_is_told():
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    collector = Collector({"used": used.weight, "unused": unused.weight}, ["gradient"], rank=1)
    with collector.watching(), collector.micro_batch(0, 1.0):
        used(torch.randn(4, 3)).sum().backward()
    collector.finish_step()
    _, unreached = collector.evidence([_weight("used", used.weight), _weight("unused", unused.weight)])
    assert unreached == {"unused"}


def _weight(name: str, tensor: torch.Tensor):
    from hybrid_rl.components import Weight

    return Weight(name, name, "mlp", 0, tuple(tensor.shape), True, (), (), None, False)  # type: ignore[arg-type]


def _matrix(view) -> torch.Tensor:
    (state,) = view.tensors
    return state if state.shape == view.shape else state.T
