"""MoLF under DeepSpeed: however masters are cut over ranks, the experts and the weights are those of one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_rl.adaptation import AdaptedModel, ParameterGroup
from hybrid_rl.adaptation.molf import MolfAdamW
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from tests.learner.processes import ENGINE_VARIANTS, load_engine, on_ranks, save_engine

WORLD = 2
STEPS, SAVED_AT, BAD = 6, 4, 2
"""`BAD`: before this step comes one whose gradient is not finite."""
FULL_SPEED = {"full": 1.0, "lora": 1.0}


class _Pairs(nn.Module):
    """LoRA pairs, added up."""

    def __init__(self, inputs: int, outputs: int, ranks: list[int]) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(inputs, r, bias=False) for r in ranks)
        self.b = nn.ModuleList(nn.Linear(r, outputs, bias=False) for r in ranks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([b(a(x)) for a, b in zip(self.a, self.b, strict=True)]).sum(0)

    @property
    def experts(self) -> list[tuple[nn.Parameter, ...]]:
        return [(a.weight, b.weight) for a, b in zip(self.a, self.b, strict=True)]  # type: ignore[misc]


class _Toy(nn.Module):
    """Odd sizes, so that no share ends where a parameter does. Gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.up_pairs = _Pairs(5, 7, [2, 3])
        self.norm = nn.RMSNorm(7)
        self.down = nn.Linear(7, 3, bias=False)
        self.down_pairs = _Pairs(7, 3, [1, 3])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.norm.weight.dtype) if self.norm.weight.numel() else x
        x = self.norm(torch.tanh(self.up(x) + self.up_pairs(x)))
        return (self.down(x) + self.down_pairs(x) - y).float().square().mean()


def _toy() -> tuple[_Toy, AdaptedModel, list[ParameterGroup]]:
    torch.manual_seed(3)
    toy = _Toy()
    toy.down.requires_grad_(False)
    own = (toy.up.weight, toy.up.bias)
    experts = {"up": (own, *toy.up_pairs.experts), "down": tuple(toy.down_pairs.experts)}
    groups = [
        ParameterGroup("full", "attention", (*own, toy.norm.weight)),  # type: ignore[arg-type]
        ParameterGroup("lora", "attention", tuple(p for pair in toy.up_pairs.experts for p in pair)),
        ParameterGroup("lora", "mlp", tuple(p for pair in toy.down_pairs.experts for p in pair)),
    ]
    return toy, AdaptedModel(toy, {}, {}, experts), groups


def _config(learner: dict[str, Any]) -> Config:
    learner = dict(learner)
    return parse_config(
        {
            "model": {"path": "toy", "dtype": learner.pop("dtype")},
            "data": {"train": "arithmetic@train", "eval": "arithmetic@eval"},
            "adaptation": "molf",
            "full": {"lr": 2e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
            "lora": {"lr": 5e-3, "weight_decay": 0.05, "max_grad_norm": 1.0},
            "molf": {"ranks": [2, 3], "calibration": "running_mean", "lr_factors": [1.0, 0.7, 1.3]},
            "learner": {"world_size": WORLD, **learner},
        }
    )


def _batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    return 3 * torch.rand(()) * torch.randn(4, 5), 3 * torch.rand(()) * torch.randn(4, 3)


def _scale(step: int) -> dict[str, float]:
    return {"full": 1 - step / STEPS, "lora": 0.5 + step / STEPS}


def _memory(optimizer: MolfAdamW | None) -> list[Tensor]:
    """All that a step depends on and leaves, beside the weights."""
    assert optimizer is not None
    return [t.clone() for state in optimizer.state.values() for t in state.values()] + [optimizer._means_E.clone()]


def _on_rank(rank: int, port: int, directory: str) -> dict[str, Any]:
    """Of each variant: each step's update, weights at the end, the steps done again after loading, and weights."""
    import deepspeed.utils

    from hybrid_rl.learner.engine import TrainingEngine
    from hybrid_rl.learner.worker import LearnerWorker

    LearnerWorker(_config(ENGINE_VARIANTS["ZeRO-1, float32, none"]), rank, Memory())._join("127.0.0.1", port)
    results = {}
    for name, learner in ENGINE_VARIANTS.items():
        toy, adapted, groups = _toy()
        parameters = dict(toy.named_parameters())
        engine = TrainingEngine(toy, adapted, groups, _config(learner))

        def weights(parameters: dict[str, nn.Parameter] = parameters) -> dict[str, Tensor]:
            trained = {n: p for n, p in parameters.items() if p.requires_grad}
            return {n: deepspeed.utils.safe_get_full_fp32_param(p).clone() for n, p in trained.items()}  # type: ignore

        def step(i: int, factor: float = 1.0, engine: Any = engine, learner: dict = learner) -> Any:
            x, y = _batch(i)
            if learner["dtype"] == "float32":  # otherwise the same on each rank, as a mean of halves would round
                x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
            engine.backward(engine(x, y) * factor / WORLD, last=True)
            return engine.step(_scale(i))

        updates = []
        for i in range(STEPS):
            if i == BAD:
                before = _memory(engine._molf)
                bad = step(i, math.nan)
                assert not bad.applied
                assert not bad.selections
                assert not any(bad.update_norms.values())
                assert all(torch.equal(a, b) for a, b in zip(_memory(engine._molf), before, strict=True))
            if i == SAVED_AT:
                save_engine(engine, f"{directory}/{name}", rank)
            updates.append(step(i))
        final = weights()
        engine.perturb(0, 1e-2)
        moved = weights()
        assert all(not torch.equal(moved[n], final[n]) for n in final)
        step(0)
        load_engine(engine, f"{directory}/{name}")
        again = [step(i) for i in range(SAVED_AT, STEPS)]
        results[name] = updates, final, again, weights()
        engine._groups[0] = replace(groups[0], parameters=groups[0].parameters[::-1])
        with pytest.raises(RuntimeError, match=r"DeepSpeed holds \d+ of \d+ elements of \w+"):
            engine._fragments()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All variants in one go: to start processes costs more than they do."""
    return on_ranks(WORLD, _on_rank, str(tmp_path_factory.mktemp("checkpoints")))


def _alone(dtype: str) -> tuple[list[tuple[Any, dict[str, float]]], dict[str, Tensor]]:
    """The same in one process without DeepSpeed, on fp32 masters of weights of `dtype`."""
    config = _config({"dtype": dtype})
    toy, adapted, groups = _toy()
    toy = toy.to(getattr(torch, dtype))
    master = {p: nn.Parameter(p.detach().float().clone()) for p in toy.parameters()}
    settings = {"full": config.full, "lora": config.lora}
    optimizer = MolfAdamW(
        [{"params": [master[p] for p in g.parameters], "weight_decay": settings[g.part].weight_decay} for g in groups],
        {m: [[master[p] for p in expert] for expert in of_module] for m, of_module in adapted.experts.items()},
        betas=config.learner.adam_betas,
        calibration=config.molf.calibration,
        lr_factors=config.molf.lr_factors,
    )
    steps = []
    for i in range(STEPS):
        toy.zero_grad()
        toy(*_batch(i)).backward()
        for part, section in settings.items():
            trained = [p for g in groups if g.part == part for p in g.parameters]
            for p in trained:
                assert p.grad is not None
                master[p].grad = p.grad.float()
            torch.nn.utils.clip_grad_norm_([master[p] for p in trained], section.max_grad_norm)
        rates = {"full": config.full.lr, "lora": config.lora_lr}
        for group, g in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rates[g.part] * _scale(i)[g.part]
        optimizer.step()
        norms = {g.name: math.sqrt(s) for g, s in zip(groups, optimizer.update_squares(), strict=True)}
        steps.append((optimizer.routing, norms))
        for p, weight in master.items():
            p.data.copy_(weight)
    return steps, {n: master[p].detach() for n, p in toy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ENGINE_VARIANTS)
def test_any_zero_stage_equals_one_process(results: dict[str, Any], name: str):
    updates, final, again, final_again = results[name]
    steps, expected = _alone(ENGINE_VARIANTS[name]["dtype"])
    for i, (update, (routing, norms)) in enumerate(zip(updates, steps, strict=True)):
        assert update.applied
        assert update.selections == routing.selections, i
        for module, scores in routing.scores.items():
            assert update.expert_scores[module] == pytest.approx(scores, rel=1e-4), i
        assert update.update_norms == pytest.approx(norms, rel=1e-4), i
    assert final.keys() == expected.keys()
    for parameter, weight in expected.items():
        torch.testing.assert_close(final[parameter], weight, atol=2e-6, rtol=0, msg=lambda m, n=parameter: f"{n}: {m}")
    assert len({routing.selections["up"] for routing, _ in steps}) > 1
    assert len({routing.selections["down"] for routing, _ in steps}) > 1
    # What is saved is all that counts.
    assert again == updates[SAVED_AT:]
    for parameter, weight in final.items():
        assert torch.equal(final_again[parameter], weight), parameter
