"""MoLF's optimizer against the formulas of arXiv 2605.07111, written out; and each of its traps by itself."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_rl.adaptation.molf import Fragment, MolfAdamW

BETAS, EPS = (0.9, 0.95), 1e-8
STEPS = 50
SHAPES = {
    "q": [[(7, 5), (7,)], [(2, 5), (7, 2)], [(3, 5), (7, 3)]],  # a weight with its bias, two LoRA pairs
    "k": [[(4, 6)], [(2, 6), (4, 2)], [(2, 6), (4, 2)]],
    "o": [[(2, 3), (6, 2)], [(4, 3), (6, 4)]],  # LoRA pairs alone
}
PLAIN = (11,)
Experts = dict[str, list[list[nn.Parameter]]]


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    lr: tuple[float, float, float] = (1e-2, 2e-2, 3e-2)
    """Of the first experts, of the others, and of the parameter of no expert."""
    decay: tuple[float, float, float] = (0.0, 0.0, 0.0)
    schedule: Callable[[int], tuple[float, float, float]] = lambda step: (1.0, 1.0, 1.0)


CASES = {
    "one winner": Case(),
    "two winners": Case({"top_k": 2}),
    "all win": Case({"top_k": 3}),
    "decay": Case({"top_k": 2}, decay=(0.3, 0.1, 0.2)),
    "schedule": Case(
        decay=(0.1, 0.1, 0.1), schedule=lambda step: (min(1.0, step / 20), 1 - step / STEPS, 0.5 + step % 2)
    ),
    "pfn": Case({"score": "pfn"}, decay=(0.1, 0.0, 0.1)),
    "pfn, two winners, schedule": Case({"score": "pfn", "top_k": 2}, schedule=lambda step: (step / 20, 1.0, 0.3)),
    "factors": Case({"lr_factors": [1.5, 0.5, 0.8]}, decay=(0.1, 0.2, 0.0)),
    "calibrated": Case({"calibration": "running_mean"}),
    "calibrated pfn": Case({"calibration": "running_mean", "score": "pfn", "top_k": 2}),
}


def _model() -> tuple[Experts, nn.Parameter]:
    torch.manual_seed(0)
    experts = {
        module: [[nn.Parameter(torch.randn(s)) for s in shapes] for shapes in of_module]
        for module, of_module in SHAPES.items()
    }
    return experts, nn.Parameter(torch.randn(PLAIN))


def _groups(experts: Experts, plain: nn.Parameter, case: Case) -> list[dict[str, Any]]:
    first = [p for of_module in experts.values() for p in of_module[0]]
    others = [p for of_module in experts.values() for parameters in of_module[1:] for p in parameters]
    parameters = (first, others, [plain])
    return [
        {"params": ps, "lr": lr, "weight_decay": decay}
        for ps, lr, decay in zip(parameters, case.lr, case.decay, strict=True)
    ]


def _draw_gradients(experts: Experts, plain: nn.Parameter) -> None:
    """Of sizes that change from step to step, so that winners do."""
    for of_module in experts.values():
        for parameters in of_module:
            scale = math.exp(2 * torch.randn(()).item())
            for p in parameters:
                p.grad = scale * (torch.randn(p.shape) + 0.3)
    plain.grad = torch.randn(plain.shape)


class Reference:
    """The formulas, in float64, one expert after another."""

    def __init__(self, experts: Experts, plain: nn.Parameter, case: Case) -> None:
        self.case, self.step_count = case, 0
        self.weights = {p: p.detach().double() for p in _parameters(experts, plain)}
        self.m = {p: torch.zeros_like(w) for p, w in self.weights.items()}
        self.v = {p: torch.zeros_like(w) for p, w in self.weights.items()}
        self.scores: dict[str, list[float]] = {}
        self.scores_seen: dict[tuple[str, int], list[float]] = {}
        self.experts, self.plain = experts, plain

    def step(self, lr: tuple[float, float, float]) -> dict[str, list[bool]]:
        self.step_count += 1
        for p in self.weights:
            assert p.grad is not None
            g = p.grad.double()
            self.m[p] = BETAS[0] * self.m[p] + (1 - BETAS[0]) * g
            self.v[p] = BETAS[1] * self.v[p] + (1 - BETAS[1]) * g**2
        self._adamw(self.plain, lr[2], self.case.decay[2])
        selections = {}
        for module, of_module in self.experts.items():
            rates = [
                (lr[0] if e == 0 else lr[1]) * self.case.options.get("lr_factors", [1.0] * 3)[e]
                for e in range(len(of_module))
            ]
            scores = [self._score(module, e, rates[e]) for e in range(len(of_module))]
            self.scores[module] = scores
            winners: list[int] = []
            for _ in range(min(self.case.options.get("top_k", 1), len(of_module))):
                best = None
                for e, score in enumerate(scores):
                    if e not in winners and (best is None or score > scores[best]):
                        best = e
                assert best is not None
                winners.append(best)
            for e in winners:
                for p in of_module[e]:
                    self._adamw(p, rates[e], self.case.decay[min(e, 1)])
            selections[module] = [e in winners for e in range(len(of_module))]
        return selections

    def _score(self, module: str, e: int, rate: float) -> float:
        parameters = self.experts[module][e]
        count = sum(p.numel() for p in parameters)
        if self.case.options.get("score", "epd") == "epd":
            total = sum(float((self.m[p] ** 2 / (self.v[p].sqrt() + 1e-8)).sum()) for p in parameters)
            score = rate / count * total
        else:
            total = sum(float(((self.m[p] / (self.v[p].sqrt() + 1e-8)) ** 2).sum()) for p in parameters)
            score = math.sqrt(total / count)
        if self.case.options.get("calibration", "none") == "none":
            return score
        seen = self.scores_seen.setdefault((module, e), [])
        seen.append(score)
        weights = [0.99**age for age in range(len(seen))][::-1]
        mean = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
        return score / mean if len(seen) > 1 else 1.0  # at the first step without rounding

    def _adamw(self, p: nn.Parameter, lr: float, decay: float) -> None:
        m_hat = self.m[p] / (1 - BETAS[0] ** self.step_count)
        v_hat = self.v[p] / (1 - BETAS[1] ** self.step_count)
        self.weights[p] = self.weights[p] * (1 - lr * decay)
        self.weights[p] = self.weights[p] - lr * m_hat / (v_hat.sqrt() + EPS)


def _parameters(experts: Experts, plain: nn.Parameter) -> list[nn.Parameter]:
    return [*(p for of_module in experts.values() for parameters in of_module for p in parameters), plain]


def _optimizer(experts: Experts, plain: nn.Parameter, case: Case) -> MolfAdamW:
    return MolfAdamW(_groups(experts, plain, case), experts, betas=BETAS, eps=EPS, **case.options)


def _set_lr(optimizer: MolfAdamW, case: Case, step: int) -> tuple[float, float, float]:
    first, others, plain = (lr * factor for lr, factor in zip(case.lr, case.schedule(step), strict=True))
    for group, lr in zip(optimizer.param_groups, (first, others, plain), strict=True):
        group["lr"] = lr
    return first, others, plain


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fifty_steps_equal_the_formulas(case: Case):
    experts, plain = _model()
    optimizer, reference = _optimizer(experts, plain, case), Reference(experts, plain, case)
    chosen: dict[str, set[tuple[bool, ...]]] = {module: set() for module in experts}
    for step in range(STEPS):
        _draw_gradients(experts, plain)
        rates = _set_lr(optimizer, case, step)
        before = {p: p.detach().clone() for p in reference.weights}
        optimizer.step()
        wanted = reference.step(rates)
        assert {m: list(s) for m, s in optimizer.routing.selections.items()} == wanted, step
        for module, selection in wanted.items():
            chosen[module].add(tuple(selection))
            assert optimizer.routing.scores[module] == pytest.approx(reference.scores[module], rel=1e-5)
        for p, weight in reference.weights.items():
            torch.testing.assert_close(p.double(), weight, atol=1e-6, rtol=1e-6)
            state = optimizer.state[p]
            assert float(state["step"]) == step + 1
            torch.testing.assert_close(state["exp_avg"].double(), reference.m[p], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(state["exp_avg_sq"].double(), reference.v[p], atol=1e-6, rtol=1e-6)
        for group, square in zip(optimizer.param_groups, optimizer.update_squares(), strict=True):
            change = sum(float((p.detach() - before[p]).double().square().sum()) for p in group["params"])
            assert float(square) == pytest.approx(change, rel=1e-3, abs=1e-12)
    for module, of_module in experts.items():
        wins = {e for selection in chosen[module] for e, won in enumerate(selection) if won}
        assert wins == set(range(len(of_module))), f"the gradients make no use of an expert of {module}"


def test_with_all_experts_or_none_it_is_adamw():
    for top_k, with_experts in ((3, True), (1, False)):
        case = Case({"top_k": top_k}, decay=(0.1, 0.2, 0.3))
        (experts, plain), (same, same_plain) = _model(), _model()
        routed = MolfAdamW(_groups(experts, plain, case), experts if with_experts else {}, betas=BETAS, top_k=top_k)
        adamw = torch.optim.AdamW(_groups(same, same_plain, case), betas=BETAS)
        for _ in range(STEPS):
            _draw_gradients(experts, plain)
            for p, q in zip(_parameters(experts, plain), _parameters(same, same_plain), strict=True):
                q.grad = p.grad
            routed.step()
            adamw.step()
        for p, q in zip(_parameters(experts, plain), _parameters(same, same_plain), strict=True):
            torch.testing.assert_close(p, q, atol=5e-6, rtol=0)  # each rounds in its own way
            assert routed.state[p].keys() == adamw.state[q].keys()


@pytest.mark.parametrize("score", ["epd", "pfn"])
@pytest.mark.parametrize("calibration", ["none", "running_mean"])
def test_of_equal_experts_the_first_wins(score: Any, calibration: Any):
    pairs = [[nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.zeros(5, 3))] for _ in range(4)]
    optimizer = MolfAdamW(
        [p for pair in pairs for p in pair], {"m": pairs}, top_k=2, score=score, calibration=calibration
    )
    for _ in range(5):
        gradients = [torch.randn(3, 4), torch.randn(5, 3)]
        for pair in pairs:
            for p, g in zip(pair, gradients, strict=True):
                p.grad = g
        optimizer.step()
        assert optimizer.routing.selections == {"m": (True, True, False, False)}
    for pair in pairs:  # nor does a gradient of zeros prefer any, or divide by zero
        for p in pair:
            optimizer.state.pop(p)
            p.grad = None
    optimizer.step()
    assert optimizer.routing.selections == {"m": (True, True, False, False)}


def _two(sizes: tuple[float, float] = (1.0, 1.0), **options: Any) -> tuple[list[nn.Parameter], MolfAdamW]:
    """Two experts of one parameter each, in groups of their own, with gradients of these sizes."""
    ps = [nn.Parameter(torch.ones(6)) for _ in sizes]
    groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.5} for p in ps]
    for p, size in zip(ps, sizes, strict=True):
        p.grad = torch.full((6,), size)
    return ps, MolfAdamW(groups, {"m": [[p] for p in ps]}, betas=BETAS, **options)


def test_trap_losers_moments_go_on_and_their_first_step_is_warm():
    (base, other), optimizer = _two((1.0, 0.1))
    gradients = []
    for _ in range(10):
        other.grad = 0.1 * torch.rand(6)
        gradients.append(other.grad.double())
        optimizer.step()
        assert optimizer.routing.selections == {"m": (True, False)}
    assert torch.equal(other, torch.ones(6))
    other.grad = torch.full((6,), 50.0)
    gradients.append(other.grad.double())
    moved = base.detach().clone()
    optimizer.step()
    assert optimizer.routing.selections == {"m": (False, True)}
    assert torch.equal(base, moved)
    m = sum(0.1 * 0.9 ** (10 - i) * g for i, g in enumerate(gradients))
    v = sum(0.05 * 0.95 ** (10 - i) * g**2 for i, g in enumerate(gradients))
    warm = 0.1 * (m / (1 - 0.9**11)) / (torch.as_tensor(v / (1 - 0.95**11)).sqrt() + EPS)
    torch.testing.assert_close(other.detach().double(), 1 - 0.1 * 0.5 - warm, atol=1e-6, rtol=0)
    cold = 0.1 * torch.ones(6).double()  # a first step of Adam has the size of the learning rate
    assert (warm - cold).abs().min() > 1e-2


def test_trap_the_schedule_reaches_every_experts_rate_in_score_and_step():
    (base, other), optimizer = _two(lr_factors=[1.0, 2.0])
    optimizer.step()
    (first, second) = optimizer.routing.scores["m"]
    assert second == pytest.approx(2 * first)
    assert optimizer.routing.selections == {"m": (False, True)}
    before = other.detach().clone()
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02, 0.03
    optimizer.step()
    (first, second) = optimizer.routing.scores["m"]
    assert second == pytest.approx(2 * first * 0.03 / 0.02)
    torch.testing.assert_close(other, before - 2 * 0.03 * (1 + 0.5 * before))  # gradients are constant: steps are 1
    assert torch.equal(base, torch.ones(6))
    optimizer.param_groups[1]["lr"] = 0.0
    before = other.detach().clone()
    optimizer.step()
    assert optimizer.routing.scores["m"][1] == 0.0
    assert optimizer.routing.selections == {"m": (True, False)}
    assert torch.equal(other, before)
    torch.testing.assert_close(base.detach(), torch.full((6,), 1 - 0.02 * (1 + 0.5)))


def test_trap_scores_are_not_corrected_for_bias():
    (base, _), optimizer = _two((3.0, 1.0))
    optimizer.step()
    m, v = (1 - BETAS[0]) * 3.0, (1 - BETAS[1]) * 9.0
    assert optimizer.routing.scores["m"][0] == pytest.approx(0.1 * m**2 / (math.sqrt(v) + 1e-8), rel=1e-6)
    torch.testing.assert_close(base.detach(), torch.full((6,), 1 - 0.1 * (1 + 0.5)))  # but the step is
    _, optimizer = _two((3.0, 1.0), score="pfn")
    optimizer.step()
    assert optimizer.routing.scores["m"][0] == pytest.approx(m / (math.sqrt(v) + 1e-8), rel=1e-6)


def test_trap_losers_do_not_decay():
    (base, other), optimizer = _two((0.0, 1.0))
    for _ in range(3):
        optimizer.step()
    assert torch.equal(base, torch.ones(6))
    optimizer.param_groups[1]["lr"] = 0.0  # now the base wins a tie, and decays without a gradient
    optimizer.step()
    assert optimizer.routing.selections == {"m": (True, False)}
    torch.testing.assert_close(base.detach(), torch.full((6,), 0.95))
    assert other.max() < 0.95


@pytest.mark.parametrize("calibration", ["none", "running_mean"])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(calibration: Any):
    case = Case({"calibration": calibration}, decay=(0.1, 0.1, 0.1))
    experts, plain = _model()
    optimizer = _optimizer(experts, plain, case)
    for _ in range(20):
        _draw_gradients(experts, plain)
        optimizer.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in _parameters(experts, plain)]), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    other_experts, other_plain = _model()
    for p, weight in zip(_parameters(other_experts, other_plain), weights, strict=True):
        p.data.copy_(weight)
    other = _optimizer(other_experts, other_plain, case)
    other.load_state_dict(state)
    for _ in range(10):
        _draw_gradients(experts, plain)
        pairs = list(zip(_parameters(experts, plain), _parameters(other_experts, other_plain), strict=True))
        for p, q in pairs:
            q.grad = p.grad
        optimizer.step()
        other.step()
        assert other.routing == optimizer.routing
        assert all(torch.equal(p, q) for p, q in pairs)
    if calibration == "running_mean":
        del state["calibration"]["means"]["q"]
        with pytest.raises(ValueError, match="no calibration='running_mean' of these experts"):
            other.load_state_dict(state)
        del state["calibration"]
        with pytest.raises(ValueError, match="no calibration"):
            other.load_state_dict(state)


class _Processes:
    """Sums over threads that stand for processes."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=20)
        self._given: list[Tensor] = []

    def all_reduce(self, sums: Tensor) -> Tensor:
        self._given.append(sums.clone())
        self._barrier.wait()
        total = torch.stack(self._given).sum(0)
        if self._barrier.wait() == 0:
            self._given.clear()
        self._barrier.wait()
        return total


@pytest.mark.parametrize("score", ["epd", "pfn"])
def test_shares_of_flat_masters_give_the_same(score: Any):
    """Three processes with a third each of every group's parameters in a row, cut anywhere, and stepped by group."""
    case = Case({"score": score, "calibration": "running_mean"}, decay=(0.1, 0.2, 0.3))
    world = 3
    experts, plain = _model()
    optimizer = _optimizer(experts, plain, case)
    gradients, selections = [], []
    for _ in range(10):
        _draw_gradients(experts, plain)
        gradients.append([[p.grad for p in group["params"]] for group in optimizer.param_groups])
        optimizer.step()
        selections.append(optimizer.routing)
    wanted = [torch.cat([p.detach().flatten() for p in group["params"]]) for group in optimizer.param_groups]

    processes, found, failures = _Processes(world), {}, []

    def cut(tensors: list[Any], rank: int) -> tuple[Tensor, int]:
        row = torch.cat([t.detach().flatten() for t in tensors])
        size = -(-len(row) // world) + 1  # with some padding
        return nn.functional.pad(row, (0, world * size - len(row)))[rank * size : (rank + 1) * size].clone(), size

    def process(rank: int) -> None:
        try:
            experts, plain = starts[rank]
            groups = _groups(experts, plain, case)
            own = MolfAdamW(groups, experts, betas=BETAS, **case.options)
            masters, fragments = [], {}
            for group in groups:
                master, size = cut(group["params"], rank)
                at = -rank * size
                for p in group["params"]:
                    start, stop = max(at, 0), min(at + p.numel(), size)
                    if start < stop:
                        fragments[p] = Fragment(master, start, stop - start)
                    at += p.numel()
                masters.append([master])
            own.bind(masters, fragments)
            for of_groups, expected in zip(gradients, selections, strict=True):
                flat = ((m[0], cut(of_group, rank)[0]) for m, of_group in zip(masters, of_groups, strict=True))
                routing = own.route(flat, processes.all_reduce)
                assert routing.selections == expected.selections
                for module, scores in routing.scores.items():
                    assert scores == pytest.approx(expected.scores[module], rel=1e-6)
                every = own.param_groups
                for group, (master,) in zip(every, masters, strict=True):
                    own.param_groups = [{**group, "params": [master]}]
                    own.step()
                own.param_groups = every
            found[rank] = [m[0] for m in masters]
        except BaseException as error:
            failures.append(error)
            processes._barrier.abort()
            raise

    starts = [_model() for _ in range(world)]  # here, as the seed is every thread's
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    for i, row in enumerate(wanted):
        got = torch.cat([found[rank][i] for rank in range(world)])
        torch.testing.assert_close(got[: len(row)], row, atol=1e-6, rtol=1e-6)
        assert not got[len(row) :].any()


def test_what_does_not_fit_is_refused():
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    experts = {"m": [[p], [q]]}
    with pytest.raises(ValueError, match="top_k=0"):
        MolfAdamW([p, q], experts, top_k=0)
    with pytest.raises(ValueError, match="score='best'"):
        MolfAdamW([p, q], experts, score="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of 2 experts"):
        MolfAdamW([p, q], experts, lr_factors=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="expert 1 of m has a parameter that another one has"):
        MolfAdamW([p, q], {"m": [[p], [p, q]]})
    with pytest.raises(ValueError, match="expert 1 of m lies in a tensor that is not optimized"):
        MolfAdamW([p], experts)
    with pytest.raises(ValueError, match="no elements"):
        MolfAdamW([p, q], {"m": [[p, q], []]})
    with pytest.raises(RuntimeError, match="bfloat16"):
        MolfAdamW([half := nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], {"m": [[half]]}).step()

    optimizer, master = MolfAdamW([p, q], experts), torch.ones(9)
    with pytest.raises(ValueError, match="expert 1 of m lies at 3:7, across another"):
        optimizer.bind([[master]], {p: Fragment(master, 0, 4), q: Fragment(master, 3, 4)})
    with pytest.raises(ValueError, match="the end at 9"):
        optimizer.bind([[master]], {p: Fragment(master, 0, 4), q: Fragment(master, 6, 4)})
    optimizer.bind([[master]], {p: Fragment(master, 0, 4), q: Fragment(master, 4, 4)})
    optimizer.param_groups[0]["params"] = [master]
    with pytest.raises(RuntimeError, match="step without route"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="cannot use"):
        optimizer.route([(torch.ones(9), torch.ones(9))])
    with pytest.raises(RuntimeError, match="0 of 1"):
        optimizer.route([])
    optimizer.route([(master, torch.ones(9))])
    with pytest.raises(RuntimeError, match="again before step"):
        optimizer.route([(master, torch.ones(9))])
    with pytest.raises(NotImplementedError, match="closure"):
        optimizer.step(lambda: 1.0)  # type: ignore[arg-type]
    optimizer.step()
    assert master.ne(1.0).tolist() == [True] * 4 + [False] * 4 + [True]  # the first expert, and what is of none
