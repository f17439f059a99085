"""The scores against their definitions, and the registry."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hybrid_rl.components import Weight
from hybrid_rl.config import ConfigError, PlanConfig
from hybrid_rl.scoring import Evidence, ScoreContext, find_score, per_module, register_score, score_names
from hybrid_rl.scoring.gradient import shared_tail
from hybrid_rl.scoring.view import SketchSizes, View

REGISTERED = {
    *(
        "update_tail_split_by_type",
        "update_tail_split",
        "update_tail",
        "adam_tail_split",
        "adam_tail",
        "grad_tail_split",
        "grad_tail",
    ),
    *("grad_tail_frac", "lora_tangent", "erank", "grad_norm", "fisher", "weight_spectral"),
    *("weight_spectral_normalised", "random", "manual", "last_layers"),
}
CONTEXT = ScoreContext(PlanConfig(score_rank=2), lora_rank=3, seed=0)


def whole(matrix: torch.Tensor) -> View:
    view = View("m", tuple(matrix.shape), SketchSizes.for_rank(2), "cpu")
    view.add(matrix)
    return view


def module(name: str = "l.0.q", shape: tuple[int, int] = (12, 20), layer: int = 0, **evidence) -> Evidence:
    weight = Weight(name, f"{name}.weight", "mlp", layer, shape, True, (), (), None, False)
    return Evidence(weight, **evidence)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_without_noise_the_shared_tail_is_the_energy_behind_the_rank(rank: int):
    torch.manual_seed(0)
    matrix = torch.randn(12, 20)
    squares = torch.linalg.svdvals(matrix).square()
    assert shared_tail((whole(matrix), whole(matrix)), rank) == pytest.approx(float(squares[rank:].sum()), abs=1e-3)


def test_noise_that_the_halves_do_not_share_is_not_counted():
    """The mean over draws is far below one draw's own tail, which is almost all noise."""
    torch.manual_seed(0)
    signal = torch.outer(torch.randn(24), torch.randn(16))
    draws = [(signal + torch.randn(24, 16), signal + torch.randn(24, 16)) for _ in range(50)]
    split = sum(shared_tail((whole(a), whole(b)), 1) for a, b in draws) / 50
    naive = sum(float(torch.linalg.svdvals(a)[1:].square().sum()) for a, _ in draws) / 50
    assert abs(split) < 0.15 * naive


def test_scores_follow_their_formulas():
    torch.manual_seed(1)
    first, second, base = torch.randn(12, 20), torch.randn(12, 20), torch.randn(12, 20)
    second = first + 0.3 * second
    pair = (whole(first), whole(second))
    seen = module(gradient=pair, direction=pair, squares=7.0, base=base)
    mean = (first + second) / 2
    s = torch.linalg.svdvals(mean).double()
    behind, total = float(s[2:].square().sum()), float(s.square().sum())

    def best(m: torch.Tensor) -> torch.Tensor:
        u, values, vh = torch.linalg.svd(m, full_matrices=False)
        return (u[:, :2] * values[:2]) @ vh[:2]

    split = float((first * second).sum() - ((best(first) * second).sum() + (best(second) * first).sum()) / 2)
    p = s / s.sum()
    w = torch.linalg.svdvals(base.double())
    q = w / w.sum()
    spectral = 0.3 * float(torch.exp(-(q * q.log()).sum())) / 12 + 0.3 * (
        1 - float(w[:3].square().sum() / (w**2).sum())
    )
    spectral += 0.2 * math.log(1 + float(w[0] / w[-1])) / 10 + 0.2 * 11 / math.log(float(w[0] / w[-1]))
    expected = {
        "update_tail_split": split / 240,
        "adam_tail_split": split / 240,
        "grad_tail_split": split / 240,
        "update_tail": behind / 240,
        "adam_tail": behind / 240,
        "grad_tail": behind / 240,
        "grad_tail_frac": behind / total,
        "grad_norm": total / 240,
        "fisher": 7.0 / 240,
        "erank": float(torch.exp(-(p * p.log()).sum())),
        "weight_spectral": spectral,
    }
    for name, value in expected.items():
        assert find_score(name)([seen], CONTEXT)["l.0.q"] == pytest.approx(value, rel=1e-4), name
    # An adapter's first step reaches 3 of the 20 input directions, at random.
    reached = find_score("lora_tangent")([seen], CONTEXT)["l.0.q"] * 240 / total
    assert 0.5 < reached < 1


def test_by_type_compares_a_module_with_its_like():
    """Singular values 1 behind the rank, times a scale: the score without types is the squared scale times 10 / 144."""
    scales = {"l.0.q": 4.0, "l.1.q": 8.0, "l.2.q": 2.0, "l.0.up": 1.0, "l.1.up": 0.0}
    modules = []
    for name, scale in scales.items():
        pair = (whole(scale * torch.eye(12)), whole(scale * torch.eye(12)))
        modules.append(module(name, (12, 12), direction=pair))
    plain = find_score("update_tail_split")(modules, CONTEXT)
    assert plain == pytest.approx({n: s**2 * 10 / 144 for n, s in scales.items()}, rel=1e-5)
    typed = find_score("update_tail_split_by_type")(modules, CONTEXT)
    expected = {n: plain[n] / math.sqrt(plain["l.0.q" if n.endswith("q") else "l.0.up"]) for n in scales}
    assert typed == pytest.approx(expected, rel=1e-5)


def test_normalised_terms_all_have_a_say():
    torch.manual_seed(0)
    square = module("a", (16, 16), base=torch.randn(16, 16))
    wide = module("b", (64, 128), base=torch.randn(64, 128))
    low = module("c", (64, 128), base=torch.randn(64, 4) @ torch.randn(4, 128) + 0.01 * torch.randn(64, 128))
    published = find_score("weight_spectral")([square, wide, low], CONTEXT)
    assert published["b"] > published["c"]  # by conditioning alone
    scores = find_score("weight_spectral_normalised")([square, wide, low], CONTEXT)
    weights, terms = (
        torch.tensor([0.3, 0.3, 0.2, 0.2]).double(),
        torch.tensor([_spectral(m) for m in (square, wide, low)], dtype=torch.float64),
    )
    expected = ((terms - terms.mean(0)) / terms.std(0, correction=0)) @ weights
    assert list(scores.values()) == pytest.approx(expected.tolist(), rel=1e-6)


def _spectral(found: Evidence) -> list[float]:
    assert found.base is not None
    s = torch.linalg.svdvals(found.base.double())
    p, d = s / s.sum(), len(s)
    condition = float(s[0] / s[-1])
    rank = float(torch.exp(-(p * p.log()).sum())) / d
    return [
        rank,
        1 - float((s[:3] ** 2).sum() / (s**2).sum()),
        math.log(1 + condition) / 10,
        (d - 1) / math.log(condition),
    ]


def test_controls():
    modules = [module("l.0.q"), module("l.3.up", layer=3), module("l.1.o", layer=1)]
    random_scores = find_score("random")
    assert random_scores(modules, CONTEXT) == random_scores(modules, CONTEXT)
    assert random_scores(modules, CONTEXT) != random_scores(modules, ScoreContext(PlanConfig(), 3, seed=1))
    assert find_score("last_layers")(modules, CONTEXT) == {"l.0.q": 0.0, "l.3.up": 3.0, "l.1.o": 1.0}
    manual = ScoreContext(PlanConfig(manual={"l.*": 1.0, "*.up": 5.0}), 3, 0)
    assert find_score("manual")(modules, manual) == {"l.0.q": 1.0, "l.3.up": 5.0, "l.1.o": 1.0}
    with pytest.raises(ConfigError, match="'nothing' matches no candidate"):
        find_score("manual")(modules, ScoreContext(PlanConfig(manual={"nothing": 1.0}), 3, 0))


def test_every_score_is_there_and_defined():
    assert set(score_names()) >= REGISTERED
    for name in REGISTERED:
        assert find_score(name).definition


def test_a_score_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    @register_score("of_my_own", needs="weights")
    @per_module
    def mine(found: Evidence, context: ScoreContext) -> float:
        """Layers counted from the front."""
        return float(found.weight.layer or 0)

    assert find_score("of_my_own")([module(layer=4)], CONTEXT) == {"l.0.q": 4.0}
    assert find_score("of_my_own").needs == "weights"
    with pytest.raises(ValueError, match="already"):
        register_score("of_my_own")(lambda modules, context: [])

    @per_module
    def dotted(found: Evidence, context: ScoreContext) -> float:
        return 2.0

    monkeypatch.setitem(
        __import__("sys").modules, "my_scores", SimpleNamespace(dotted=dotted, number=3, one=lambda context: {})
    )
    score = find_score("my_scores:dotted")
    assert (score.needs, score([module()], CONTEXT)) == ("gradients", {"l.0.q": 2.0})
    for wrong, message in (
        ("update_tail_splitt", "did you mean update_tail_split"),
        ("my_scores:absent", "cannot be loaded"),
        ("no_such_module:f", "cannot be loaded"),
        ("my_scores:number", r"is no function of \(modules, context\)"),
        ("my_scores:one", r"is no function of \(modules, context\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_score(wrong)
