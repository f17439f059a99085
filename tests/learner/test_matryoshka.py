"""What is trained of Matryoshka layers, rank by rank; the reference slices weights, and knows neither P nor shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.adaptation.matryoshka import Nesting, TrainedRanks
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.components import read_model
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan
from tests.learner.processes import on_ranks, random_sequences

STEPS, MINI, EPOCHS = 3, 2, 2
RANKS = (1, 2, 4)
FULL_LR, LORA_LR, MAX_NORM = 1e-4, 1e-3, 0.05  # a clip that binds


def _tree(model: Path, loss: str, world: int, stage: int, tokens: int) -> dict:
    return {
        "model": {"path": str(model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 16, "temperature": 0.7},
        "batch": {
            "prompts": 8,
            "num_generations": 2,
            "mini_batches": MINI,
            "epochs": EPOCHS,
            "tokens_per_micro_batch": tokens,
        },
        "full": {"lr": FULL_LR, "max_grad_norm": MAX_NORM},
        # The query projections have fewer ranks: to them, any above are their largest.
        "lora": {"lr": LORA_LR, "rank": RANKS[-1], "max_grad_norm": MAX_NORM, "ranks": {"*q_proj": 2}},
        "plan": {"rest": "matryoshka"},
        "matryoshka": {"loss": loss},
        "learner": {"world_size": world, "zero_stage": stage},
    }


def _plan(model: Path, loss: str) -> AdaptationPlan:
    """Some matrices full, the others Matryoshka."""
    config = parse_config(_tree(model, loss, 1, 2, 40))
    anatomy = read_model(AutoModelForCausalLM.from_pretrained(model))
    scores = {c.name: float("v_proj" in c.name) for c in anatomy.candidates}
    options: dict[str, Any] = {"model": "tiny", "method": {}, "seed": 0, "settings": config.plan, "lora": config.lora}
    return build_plan(anatomy, scores, ratio=0.05, matryoshka=config.matryoshka, **options)


def _ranks(rank: int, port: int, trees: list[dict], plans: list[str]) -> list[Any]:
    """Train with each of `trees`, one after another. Returns each step's metrics, and the trained tensors."""
    from hybrid_rl.learner.worker import LearnerWorker

    results = []
    for tree, plan in zip(trees, plans, strict=True):
        config = parse_config(tree)
        worker = LearnerWorker(config, rank, Memory())
        worker.connect("127.0.0.1", port)
        worker.build(plan)
        scale = {"full": 1.0, "lora": 1.0}
        batches = [mini_batches(random_sequences(step), config, scale, step) for step in range(1, STEPS + 1)]
        stats = [dict(worker.train(batch).metrics) for batch in batches]
        drawn: list[Any] = [None] * config.learner.world_size
        torch.distributed.all_gather_object(drawn, [s.get("matryoshka/rank") for s in stats])
        assert drawn == drawn[:1] * len(drawn), "each rank drew its own"
        assert all(n.p is n._trained for n in worker._adapted.nestings), "the policy is left as it is trained"
        with worker._engine.gathered(*worker._adapted.trained.values()):
            trained = {name: p.detach().clone() for name, p in worker._adapted.trained.items()}
        results.append((stats, trained))
    return results


def _reference(model: Path, loss: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same steps in plain torch: the gradient of each rank's own adapter, one sequence at a time, then their mean
    by what each rank counts."""
    plan = _plan(model, loss)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = apply_plan(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), plan)
    trained = {name: p.detach().clone().requires_grad_() for name, p in adapted.trained.items()}
    full, lora = ([p for n, p in trained.items() if (".lora_" in n) is beside] for beside in (False, True))
    groups = [{"params": full, "lr": FULL_LR}, {"params": lora, "lr": LORA_LR}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    widest = {m.name: max(m.options["ranks"]) for m in plan.named("matryoshka")}
    draws = TrainedRanks(adapted.nestings, seed=0)
    base = {name: p.detach() for name, p in network.named_parameters()}

    def logprobs(s: Any, k: int) -> Tensor:
        weights = {name: p for name, p in trained.items() if ".lora_" not in name}
        for name, most in widest.items():
            r = min(k, most)
            a, b = (trained[f"{name}.lora_{which}.default.weight"] for which in "AB")
            weights[f"{name}.weight"] = base[f"{name}.weight"] + r**-0.5 * b[:, :r] @ a[:r]
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = functional_call(network, weights, (ids,)).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0]

    found = []
    for step in range(1, STEPS + 1):
        batches = [random_sequences(step)[i::MINI] for i in range(MINI)]
        with torch.no_grad():
            old = {k: [[logprobs(s, k) for s in batch] for batch in batches] for k in RANKS}
        seen: dict[str, list[float]] = {name: [] for name in ("loss", "rank", "full", "lora", *map(str, RANKS))}
        for update in range(MINI * EPOCHS):
            i, shares = update % MINI, draws.of(step, update)
            assert set(shares) <= set(RANKS)
            gradients = [torch.zeros_like(p) for p in trained.values()]
            seen["loss"].append(0.0)
            seen["rank"].append(sum(k * share for k, share in shares.items() if k is not None))
            for k, share in shares.items():
                terms = []
                for s, before in zip(batches[i], old[k][i], strict=True):
                    ratio = (logprobs(s, k) - before).exp()
                    terms.append(-torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage).mean())
                alone = torch.stack(terms).mean()
                for total, g in zip(gradients, torch.autograd.grad(alone, trained.values()), strict=True):
                    total += share * g
                seen["loss"][-1] += share * alone.item()
                seen[str(k)].append(alone.item())
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter.grad = gradient
            seen["full"].append(float(torch.nn.utils.clip_grad_norm_(full, MAX_NORM)))
            seen["lora"].append(float(torch.nn.utils.clip_grad_norm_(lora, MAX_NORM)))
            optimizer.step()
        found.append({name: sum(values) / len(values) for name, values in seen.items() if values})
    return found, {name: p.detach() for name, p in trained.items()}


@pytest.mark.parametrize(("world", "stage", "tokens"), [(1, 2, 40), (2, 3, 400)])
def test_ranks_are_trained_alike_for_any_shards(tiny_model: Path, world: int, stage: int, tokens: int):
    """`per_rank` steps by the mean of the ranks' own gradients, `sampled` by that of the one that was drawn."""
    losses = ("per_rank", "sampled")
    trees = [_tree(tiny_model, loss, world, stage, tokens) for loss in losses]
    results = on_ranks(world, _ranks, trees, [_plan(tiny_model, loss).to_json() for loss in losses])
    for loss, (stats, trained) in zip(losses, results, strict=True):
        expected, weights = _reference(tiny_model, loss)
        for metrics, reference in zip(stats, expected, strict=True):
            for name in ("full", "lora"):
                assert metrics[f"grad_norm/{name}"] == pytest.approx(reference[name], rel=1e-3)
                assert reference[name] > MAX_NORM
            assert metrics["policy/loss"] == pytest.approx(reference["loss"], abs=1e-5)
            if loss == "per_rank":
                for k in RANKS:
                    assert metrics[f"matryoshka/loss_{k}"] == pytest.approx(reference[str(k)], abs=1e-5)
                    assert metrics[f"matryoshka/rollout_kl_{k}"] > 0
            else:
                assert metrics["matryoshka/rank"] == reference["rank"]
        assert trained.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_trained_of_other_losses_is_one_pass():
    for loss in ("sum", "largest"):
        assert TrainedRanks([Nesting((1, 2, 4), "sqrt", loss)], 0).of(3, 1) == {None: 1.0}
    assert TrainedRanks([], 0).of(1, 0) == {None: 1.0}


def test_drawn_ranks_are_uniform_and_depend_on_seed_and_step_alone():
    """Uniform over the ranks of all layers together."""
    nestings = [Nesting((1, 2, 4), "sqrt", "sampled"), Nesting((1, 2, 4, 8, 16), "none", "sampled")]
    ranks = TrainedRanks(nestings, seed=1)
    assert ranks.ranks == (1, 2, 4, 8, 16)
    drawn = [ranks.of(step, update) for step in range(1, 1001) for update in range(6)]
    counts = Counter(k for each in drawn for k in each)
    assert counts.keys() == set(ranks.ranks)
    assert chisquare([counts[k] for k in ranks.ranks]).pvalue > 0.01
    within = Counter((min(ranks.of(step, 0)), min(ranks.of(step, 1))) for step in range(1, 5001))  # type: ignore[type-var]
    assert len(within) == 25, "a step's updates do not follow one another"
    assert chisquare(list(within.values())).pvalue > 0.01
    assert [TrainedRanks(nestings, seed=1).of(step, 2) for step in range(900)] == [ranks.of(s, 2) for s in range(900)]
    assert [TrainedRanks(nestings, seed=2).of(step, 2) for step in range(900)] != [ranks.of(s, 2) for s in range(900)]
