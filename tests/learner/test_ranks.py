"""ZeRO stages and world sizes must not change what is learned; the reference is a torch loop without DeepSpeed."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.cluster.inline import free_port
from hybrid_rl.components import candidate_matrices
from hybrid_rl.config import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.plan import AdaptationPlan, build_plan
from hybrid_rl.scoring import GradientMoments, score_gradients
from hybrid_rl.types import TrainSequence
from hybrid_rl.weight_sync import decode_update, full_name, lora_names

STEPS = 5
FULL_LR, LORA_LR, MAX_NORM = 1e-4, 1e-3, 0.05  # a clip that binds, so that it is tested too


def _sequences(step: int) -> list[TrainSequence]:
    draw = random.Random(step)
    result = []
    for _ in range(11):  # not a multiple of the ranks
        prompt = tuple(draw.randrange(2, 250) for _ in range(draw.randrange(2, 9)))
        completion = tuple(draw.randrange(2, 250) for _ in range(draw.randrange(1, 12)))
        result.append(TrainSequence(prompt, completion, tuple(-5.0 for _ in completion), draw.uniform(-2, 2)))
    return result


def _tree(model: Path, stage: int, world: int, mini: int) -> dict:
    return {
        "model": {"path": str(model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 16, "temperature": 0.7},
        # Two or three sequences a micro-batch, so that gradients accumulate.
        "batch": {"prompts": 8, "num_generations": 2, "mini_batches": mini, "tokens_per_micro_batch": 40},
        "full": {"lr": FULL_LR, "max_grad_norm": MAX_NORM},
        "lora": {"lr": LORA_LR, "rank": 4, "max_grad_norm": MAX_NORM},
        "learner": {"world_size": world, "zero_stage": stage},
    }


def _plan(model: Path) -> AdaptationPlan:
    candidates = candidate_matrices(AutoModelForCausalLM.from_pretrained(model))
    scores = {c.name: float(("v_proj" in c.name) + ("up_proj" in c.name)) for c in candidates}
    options = {"model": "tiny", "topology": "attention-only", "method": {}, "seed": 0, "unit": "params", "rest": "lora"}
    return build_plan(candidates, scores, ratio=0.2, rank=4, alpha=8.0, **options)


def _rank(rank: int, port: int, tree: dict, plan: str, queue) -> None:
    from hybrid_rl.learner.worker import LearnerWorker

    torch.set_num_threads(1)
    worker = LearnerWorker(parse_config(tree), rank)
    worker.connect("127.0.0.1", port)
    before = {name: p.clone() for name, p in worker._model.named_parameters()}
    scores = worker.score([_sequences(100), _sequences(101)])
    assert all(torch.equal(p, before[name]) for name, p in worker._model.named_parameters()), "scoring moved a weight"
    worker.build(plan)
    mini = tree["batch"]["mini_batches"]
    stats = [worker.train(mini_batches(_sequences(step), mini, 1.0)) for step in range(STEPS)]
    update = worker.export(STEPS)
    if rank == 0:
        queue.put(([s.metrics for s in stats], update.tensors, update.digests, scores))


def run_ranks(tree: dict, plan: AdaptationPlan) -> tuple[list[dict], dict[str, torch.Tensor], dict[str, float]]:
    """Score, then train 5 steps, on real ranks. Returns each step's metrics, the trained tensors and the scores."""
    from hybrid_rl.types import WeightUpdate

    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    world = tree["learner"]["world_size"]
    ranks = [context.Process(target=_rank, args=(r, port, tree, plan.to_json(), queue)) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        metrics, tensors, digests, scores = queue.get(timeout=300)
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
    full, lora = decode_update(WeightUpdate(STEPS, tensors, digests, 4))
    return metrics, {**full, **lora}, scores


def reference(model: Path, plan: AdaptationPlan, mini: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same five steps, one sequence at a time, in plain torch."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = apply_plan(network, plan)
    groups = [list(adapted.full.values()), adapted.lora_parameters]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "lr": FULL_LR}, {"params": groups[1], "lr": LORA_LR}],
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )

    def logprobs(s: TrainSequence) -> torch.Tensor:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = adapted.model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0]

    losses = []
    for step in range(STEPS):
        batches = [_sequences(step)[i::mini] for i in range(mini)]
        with torch.no_grad():
            old = [[logprobs(s) for s in batch] for batch in batches]
        step_losses = []
        for batch, old_batch in zip(batches, old, strict=True):
            terms = []
            for s, before in zip(batch, old_batch, strict=True):
                ratio = (logprobs(s) - before).exp()
                terms.append(-torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage).mean())
            loss = torch.stack(terms).mean()
            optimizer.zero_grad()
            loss.backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, MAX_NORM)
            optimizer.step()
            step_losses.append(loss.item())
        losses.append(sum(step_losses) / mini)
    trained = {full_name(name): p.detach() for name, p in adapted.full.items()}
    for name, pair in adapted.lora.items():
        name_a, name_b = lora_names(name)
        trained |= {name_a: pair.a.detach(), name_b: pair.b.detach() * pair.scaling}
    return losses, trained


@pytest.mark.parametrize(
    ("stage", "world", "mini"),
    [
        (2, 2, 1),
        (3, 2, 2),
        pytest.param(1, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(3, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_five_steps_equal_a_plain_torch_loop(tiny_model: Path, stage: int, world: int, mini: int):
    plan = _plan(tiny_model)
    losses, expected = reference(tiny_model, plan, mini)
    metrics, trained, scores = run_ranks(_tree(tiny_model, stage, world, mini), plan)
    assert [m["policy/loss"] for m in metrics] == pytest.approx(losses, abs=1e-5)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert all(m["grad_norm/full"] > MAX_NORM and m["grad_norm/lora"] > MAX_NORM for m in metrics[1:])
    assert scores == pytest.approx(_reference_scores(tiny_model), rel=1e-3, abs=1e-12)


def _reference_scores(model: Path) -> dict[str, float]:
    """Scores from one sequence at a time, in plain torch."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    candidates = candidate_matrices(network)
    moments = GradientMoments({c.name: c.shape for c in candidates}, torch.device("cpu"))
    for half, sequences in enumerate([_sequences(100), _sequences(101)]):
        for chunk in (sequences[i::8] for i in range(8)):
            network.zero_grad()
            for s in chunk:
                ids = torch.tensor([s.prompt_ids + s.completion_ids])
                logits = network(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
                chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.completion_ids)[:, None])
                (-s.advantage * chosen.mean() / len(chunk)).backward()
            moments.add(half, {c.name: network.get_submodule(c.name).weight.grad for c in candidates})
    return score_gradients(moments, "adam_tail_split", 2)
