"""ZeRO stages and world sizes must not change what is learned; the reference is a torch loop without DeepSpeed."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.components import read_model
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.scoring import find_score
from hybrid_rl.types import TrainSequence
from hybrid_rl.weight_sync import lora_names
from tests.held import receive
from tests.learner.processes import hybrid_plan, on_ranks, random_sequences

STEPS = 5
SCORES = ("update_tail_split", "adam_tail_split", "grad_tail_split", "grad_norm")
FULL_LR, LORA_LR, MAX_NORM = 1e-4, 1e-3, 0.05  # a clip that binds, so that it is tested too


def _tree(model: Path, stage: int, world: int, mini: int, epochs: int = 1, kl: float = 0.0) -> dict:
    return {
        "model": {"path": str(model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 16, "temperature": 0.7},
        # Two or three sequences a micro-batch, so that gradients accumulate.
        "batch": {
            "prompts": 8,
            "num_generations": 2,
            "mini_batches": mini,
            "epochs": epochs,
            "tokens_per_micro_batch": 40,
        },
        "algo": {"kl_coef": kl},
        "full": {"lr": FULL_LR, "max_grad_norm": MAX_NORM},
        "lora": {"lr": LORA_LR, "rank": 4, "max_grad_norm": MAX_NORM},
        "learner": {"world_size": world, "zero_stage": stage},
    }


def _rank(rank: int, port: int, tree: dict, plan: str):
    from hybrid_rl.learner.worker import LearnerWorker

    transport = Memory()
    worker = LearnerWorker(parse_config(tree), rank, transport)
    worker.connect("127.0.0.1", port)
    before = {name: p.clone() for name, p in worker._model.named_parameters()}
    scores = {}
    for name in SCORES:
        worker.begin_ranking(find_score(name))
        for step in range(3 if name == "update_tail_split" else 1):
            worker.observe([random_sequences(100 + step), random_sequences(200 + step)], 1e-3)
        scores[name], unreached = worker.finish_ranking()
        assert not unreached
    after = dict(worker._model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in after.items()), "ranking moved a weight"
    worker.build(plan)
    config, scale = parse_config(tree), {"full": 1.0, "lora": 1.0}
    stats = [worker.train(mini_batches(random_sequences(step), config, scale, step + 1)) for step in range(STEPS)]
    update = worker.export(STEPS)
    return [s.metrics for s in stats], update and receive(transport, [update]), scores


def run_ranks(
    tree: dict, plan: AdaptationPlan
) -> tuple[list[dict], dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Score, then train 5 steps, on real ranks. Returns each step's metrics, the trained tensors and the scores."""
    return on_ranks(tree["learner"]["world_size"], _rank, tree, plan.to_json())


def reference(
    model: Path, plan: AdaptationPlan, mini: int, epochs: int, kl: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same five steps, one sequence at a time, in plain torch."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = apply_plan(network, plan)
    groups = [list(adapted.full.values()), adapted.adapter_parameters]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "lr": FULL_LR}, {"params": groups[1], "lr": LORA_LR}],
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )

    def logprobs(s: TrainSequence, policy: torch.nn.Module = adapted.model) -> torch.Tensor:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = policy(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0]

    losses = []
    for step in range(STEPS):
        batches = [random_sequences(step)[i::mini] for i in range(mini)]
        with torch.no_grad():
            old = [[logprobs(s) for s in batch] for batch in batches]
        step_losses = []
        for batch, old_batch in [*zip(batches, old, strict=True)] * epochs:
            terms = []
            for s, before in zip(batch, old_batch, strict=True):
                now = logprobs(s)
                ratio = (now - before).exp()
                gap = logprobs(s, base).detach() - now
                clipped = torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage)
                terms.append((kl * (gap.exp() - gap - 1) - clipped).mean())
            loss = torch.stack(terms).mean()
            optimizer.zero_grad()
            loss.backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, MAX_NORM)
            optimizer.step()
            step_losses.append(loss.item())
        losses.append(sum(step_losses) / len(step_losses))
    trained = {name: p.detach() for name, p in adapted.full.items()}
    for name, adapter in adapted.adapters.items():
        [pair] = adapter.factors()
        name_a, name_b = lora_names(name)
        trained |= {name_a: pair.a.detach(), name_b: pair.b.detach() * pair.scaling}
    return losses, trained


@pytest.mark.parametrize(
    ("stage", "world", "mini", "epochs", "kl"),
    [
        (2, 2, 1, 1, 0.0),
        (3, 2, 2, 2, 5.0),
        pytest.param(1, 1, 1, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(3, 1, 1, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 2, 2, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, 1, 0.0, marks=pytest.mark.slow),
    ],
)
def test_five_steps_equal_a_plain_torch_loop(
    tiny_model: Path, stage: int, world: int, mini: int, epochs: int, kl: float
):
    plan = hybrid_plan(tiny_model)
    losses, expected = reference(tiny_model, plan, mini, epochs, kl)
    metrics, trained, scores = run_ranks(_tree(tiny_model, stage, world, mini, epochs, kl), plan)
    assert [m["policy/loss"] for m in metrics] == pytest.approx(losses, abs=1e-5)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert all(m["grad_norm/full"] > MAX_NORM and m["grad_norm/lora"] > MAX_NORM for m in metrics[1:])
    reference_scores = _scores_of_one_process(tiny_model)
    for score in SCORES:
        # Equal to rounding, so that the plans, in order and treatment, are equal.
        assert scores[score] == pytest.approx(reference_scores[score], rel=5e-3, abs=1e-7), score
        assert _order(scores[score]) == _order(reference_scores[score])
    assert scores["grad_norm"] == pytest.approx(_gradient_norms(tiny_model), rel=1e-3, abs=1e-12)


def _order(scores: dict[str, float]) -> list[str]:
    return sorted(scores, key=lambda name: -scores[name])


@functools.cache
def _scores_of_one_process(model: Path) -> dict[str, dict[str, float]]:
    tree = _tree(model, 2, 1, 1)
    _, _, scores = run_ranks(tree, hybrid_plan(model))
    return scores


def _gradient_norms(model: Path) -> dict[str, float]:
    """`grad_norm` from one sequence at a time, in plain torch."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    halves = [random_sequences(100), random_sequences(200)]
    for s in [s for half in halves for s in half]:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = network(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0]
        ratio = (chosen - torch.tensor(s.rollout_logprobs)).exp()
        loss = -torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage).mean()
        (loss / (2 * len(halves[0]))).backward()
    names = [c.name for c in read_model(network).candidates]
    return {n: float(network.get_submodule(n).weight.grad.square().mean()) for n in names}
