"""AdaLoRA under DeepSpeed: the ranks that are left, and the weights, are those of PEFT's own loop in one process."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from torch import Tensor, nn

from hybrid_rl.adaptation import AdaptedModel, ParameterGroup, apply_plan, parameter_groups
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.shards import Shards
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from tests.learner.processes import ENGINE_VARIANTS, load_engine, on_ranks, save_engine

WORLD = 2
STEPS, BAD = 12, 6
"""`BAD`: before this step comes one whose gradient is not finite."""
LAST = 8
"""The step at which ranks are taken away for the last time."""
SAVED_AT = (5, 10)
"""Before and after the last allocation."""
RANK, TARGET, EVERY, ORTHOGONAL = 4, 2, 2, 0.5
FULL_SPEED = {"full": 1.0, "lora": 1.0}


class _Toy(nn.Module):
    """Odd sizes, so that no share ends where a parameter does. Gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.norm = nn.RMSNorm(7)
        self.down = nn.Linear(7, 5, bias=False)
        self.out = nn.Linear(5, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.norm.weight.dtype)
        x = self.norm(torch.tanh(self.up(x)))
        return (self.out(torch.tanh(self.down(x))) - y).float().square().mean()


def _toy() -> tuple[_Toy, AdaptedModel, list[ParameterGroup]]:
    torch.manual_seed(3)
    toy = _Toy()
    rest: dict[str, Any] = {"layer": None, "score": None}
    adapter = {"treatment": "adalora", "rank": RANK, "alpha": 2.0 * RANK, "options": {"target": TARGET}, **rest}
    modules = [
        PlannedModule(name, component, shape=tuple(w.shape), params=w.numel(), **adapter)
        for name, component, w in (
            ("up", "attention", toy.up.weight),
            ("down", "mlp", toy.down.weight),
            ("out", "mlp", toy.out.weight),
        )
    ]
    modules.append(PlannedModule("norm", "norm", shape=(7,), params=7, rank=None, alpha=None, treatment="full", **rest))
    plan = AdaptationPlan("toy", "attention-only", {}, 0, tuple(modules))
    adapted = apply_plan(toy, plan)
    return toy, adapted, parameter_groups(adapted, plan)


def _config(learner: dict[str, Any]) -> Config:
    learner = dict(learner)
    return parse_config(
        {
            "model": {"path": "toy", "dtype": learner.pop("dtype")},
            "data": {"train": "arithmetic@train", "eval": "arithmetic@eval"},
            "adaptation": "adalora",
            "steps": STEPS // 2,
            "batch": {"mini_batches": 2},
            "full": {"lr": 2e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
            "lora": {"lr": 5e-2, "weight_decay": 0.05, "max_grad_norm": 1.0, "rank": TARGET},
            "adalora": {"warmup": 0.1, "final": 0.3, "every": EVERY, "orth_reg_weight": ORTHOGONAL},
            "learner": {"world_size": WORLD, **learner},
        }
    )


def _batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    return 3 * torch.rand(()) * torch.randn(8, 5), 3 * torch.rand(()) * torch.randn(8, 9)


def _averages(allocator: RankAllocator) -> dict[str, Tensor]:
    """What the allocator remembers of earlier steps."""
    which = ("exp_avg_ipt", "exp_avg_unc")
    return {f"{w}/{name}": t.detach().clone() for w in which for name, t in getattr(allocator, w).items()}


def _on_rank(rank: int, port: int, directory: str) -> dict[str, Any]:
    """Of each variant: each step's update, the weights and averages after it, and all again after loading."""
    import deepspeed.utils

    from hybrid_rl.learner.engine import TrainingEngine
    from hybrid_rl.learner.worker import LearnerWorker

    LearnerWorker(_config(ENGINE_VARIANTS["ZeRO-1, float32, none"]), rank, Memory())._join("127.0.0.1", port)
    results = {}
    for name, learner in ENGINE_VARIANTS.items():
        toy, adapted, groups = _toy()
        engine = TrainingEngine(toy, adapted, groups, _config(learner))

        def weights(engine: Any = engine, trained: dict[str, nn.Parameter] = adapted.trained) -> dict[str, Tensor]:
            with engine.gathered(*trained.values()):
                held = {n: p.detach().clone() for n, p in trained.items()}
            masters: Any = {n: deepspeed.utils.safe_get_full_fp32_param(p).clone() for n, p in trained.items()}  # type: ignore[union-attr]
            assert all(torch.equal(masters[n].to(w.dtype), w) for n, w in held.items())
            return masters | _averages(engine._allocation._allocator)

        def step(i: int, factor: float = 1.0, engine: Any = engine, learner: dict = learner) -> Any:
            x, y = _batch(i)
            if learner["dtype"] == "float32":  # otherwise the same on each rank, as a mean of halves would round
                micro_batches = list(zip(x.chunk(WORLD)[rank].chunk(2), y.chunk(WORLD)[rank].chunk(2), strict=True))
            else:
                micro_batches = [(x, y)]
            for n, (some, wanted) in enumerate(micro_batches, 1):
                loss = engine(some, wanted) * factor / WORLD / len(micro_batches)
                engine.backward(loss, last=n == len(micro_batches))
            return engine.step(FULL_SPEED)

        updates, after = [], []
        for i in range(STEPS):
            if i in SAVED_AT:
                save_engine(engine, f"{directory}/{name}/{i}", rank)
            if i == BAD:
                before = weights()
                bad = step(i, math.nan)
                assert not bad.applied
                assert (bad.ranks, bad.budget) == (updates[-1].ranks, updates[-1].budget)
                assert all(torch.equal(w, before[n]) for n, w in weights().items())
            updates.append(step(i))
            after.append(weights())
        again = {}
        for saved in SAVED_AT:
            engine.perturb(0, 1e-2)
            load_engine(engine, f"{directory}/{name}/{saved}")
            again[saved] = [(step(i), weights()) for i in range(saved, STEPS)]
        results[name] = updates, after, again
    return results


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(checkpoints: Path) -> dict[str, Any]:
    """All variants in one go: to start processes costs more than they do."""
    return on_ranks(WORLD, _on_rank, str(checkpoints))


def _alone(dtype: str) -> list[tuple[dict[str, int], dict[str, Tensor]]]:
    """Each step's ranks, weights and averages in one process by PEFT, on fp32 masters of weights of `dtype`."""
    config = _config({"dtype": dtype})
    toy, adapted, groups = _toy()
    toy.to(getattr(torch, dtype))
    master = {name: nn.Parameter(p.detach().float().clone()) for name, p in adapted.trained.items()}
    names = {p: name for name, p in adapted.trained.items()}
    settings = {"full": config.full, "lora": config.lora}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [master[names[p]] for p in g.parameters],
                "lr": config.full.lr if g.part == "full" else config.lora_lr,
                "weight_decay": settings[g.part].weight_decay,
            }
            for g in groups
        ],
        betas=config.learner.adam_betas,
    )
    model: Any = SimpleNamespace(named_parameters=lambda: [(n, p) for n, p in master.items() if ".lora_" in n])
    peft = AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        total_step=STEPS,
        tinit=1,
        tfinal=STEPS - LAST,
        deltaT=EVERY,
        beta1=0.85,
        beta2=0.85,
    )
    allocator = RankAllocator(model, peft, "default")
    tuner: Any = SimpleNamespace(
        model=model, peft_config={"default": peft}, trainable_adapter_name="default", rankallocator=allocator
    )
    steps = []
    for i in range(STEPS):
        toy.zero_grad()
        optimizer.zero_grad()
        toy(*_batch(i)).backward()
        sides = [p if ".lora_A." in n else p.T for n, p in master.items() if ".lora_A." in n or ".lora_B." in n]
        apart = sum(torch.norm(a @ a.T - torch.eye(len(a)), p="fro") for a in sides)
        (ORTHOGONAL * apart / len(sides)).backward()  # type: ignore[union-attr]
        for name, p in adapted.trained.items():
            assert p.grad is not None
            own = master[name].grad
            master[name].grad = p.grad.float() if own is None else p.grad.float() + own
        for part, section in settings.items():
            trained = [master[names[p]] for g in groups if g.part == part for p in g.parameters]
            torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
        optimizer.step()
        AdaLoraModel.update_and_allocate(tuner, i)
        for name, p in adapted.trained.items():
            p.data.copy_(master[name])
        pattern = peft.rank_pattern or {}
        ranks = {m: sum(pattern.get(f"{m}.lora_E.default", [True] * RANK)) for m in adapted.adapters}
        steps.append((ranks, {name: p.detach().clone() for name, p in master.items()} | _averages(allocator)))
    return steps


@pytest.mark.parametrize("name", ENGINE_VARIANTS)
def test_any_zero_stage_allocates_as_peft_does(results: dict[str, Any], checkpoints: Path, name: str):
    updates, after, again = results[name]
    for i, (update, found, (ranks, wanted)) in enumerate(
        zip(updates, after, _alone(ENGINE_VARIANTS[name]["dtype"]), strict=True)
    ):
        assert update.applied
        assert update.ranks == ranks, i
        assert found.keys() == wanted.keys()
        for parameter, weight in wanted.items():
            torch.testing.assert_close(found[parameter], weight, atol=1e-5, rtol=1e-5, msg=f"{parameter} after {i}")
            if ".lora_E." in parameter:
                assert torch.equal(found[parameter] == 0, weight == 0), parameter
    left = [sum(u.ranks.values()) for u in updates]
    assert left[0] == updates[0].budget == 3 * RANK
    assert left[-1] == updates[-1].budget == 3 * TARGET
    assert len(set(left)) > 2, "ranks are taken away little by little"
    assert len(set(updates[-1].ranks.values())) > 1, "modules differ"
    for saved, steps in again.items():  # what is saved is all that counts
        assert [update for update, _ in steps] == updates[saved:]
        for (_, found), wanted in zip(steps, after[saved:], strict=True):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[n], t) for n, t in wanted.items())
    facts = Shards(checkpoints / name / str(SAVED_AT[1])).facts[0]["adalora"]
    assert facts.pop("kept")
    assert facts == {"updates": SAVED_AT[1], "budget": 3 * TARGET, "ranks": updates[-1].ranks}
