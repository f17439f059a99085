"""Tokens that the environment gave are read and never trained on: against a plain loop with a mask."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid_rl.algo import PRESETS, AlgoConfig
from hybrid_rl.algorithms import find_loss, policy_objective
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches, weigh
from hybrid_rl.learner.batching import collate
from hybrid_rl.learner.layout import use_segment_attention
from hybrid_rl.learner.logprobs import PolicyModel
from hybrid_rl.types import TrainSequence
from tests.algorithms import naive
from tests.learner.processes import hybrid_plan, on_ranks, random_sequences

TEMPERATURE = 0.7
ALGORITHMS = {
    "grpo": {},
    "gspo": {"kl_coef": 0.1, "entropy_coef": 0.05, "aggregation": "token_mean"},
    "dr_grpo": {"mismatch": "truncate", "mismatch_level": "sequence", "mismatch_max": 3.0},
}


def with_given(seed: int) -> list[TrainSequence]:
    """Random sequences; of the longer ones, up to two spans are given, and their log-probabilities 0."""
    draw = random.Random(seed)
    result = []
    for s in random_sequences(seed):
        last = len(s.completion_ids) - 1
        points = sorted(draw.sample(range(1, last + 1), min(4, last // 2 * 2))) if last > 1 else []
        given = tuple(zip(points[::2], points[1::2], strict=True))
        result.append(replace(s, given=given, rollout_logprobs=tuple(masked(s.rollout_logprobs, given))))
    assert any(len(s.given) == 2 for s in result)
    return result


def masked(logprobs: Any, given: Any) -> list[float]:
    return [0.0 if is_given(t, given) else p for t, p in enumerate(logprobs)]


def is_given(token: int, given: Any) -> bool:
    return any(start <= token < end for start, end in given)


def distributions(model: Any, s: TrainSequence) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the sampled tokens, from one sequence's whole logits and a mask."""
    logits = model(input_ids=torch.tensor([s.prompt_ids + s.completion_ids])).logits[0, len(s.prompt_ids) - 1 : -1]
    every = torch.log_softmax(logits / TEMPERATURE, -1)
    keep = torch.tensor([not is_given(t, s.given) for t in range(len(s.completion_ids))])
    chosen = every.gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0]
    return chosen[keep], -(every.exp() * every).sum(-1)[keep]


def plain_gradient(model: Any, sequences: list[TrainSequence], algo: AlgoConfig) -> dict[str, Tensor]:
    """The objective in loops over Python numbers, over plain forward passes of one sequence each."""
    found = [distributions(model, s) for s in sequences]
    rollout = [[p for t, p in enumerate(s.rollout_logprobs) if not is_given(t, s.given)] for s in sequences]
    case = naive.Case(
        advantages=[s.advantage for s in sequences],
        logprobs=[logprobs.tolist() for logprobs, _ in found],
        old=rollout,
        rollout=rollout,
        reference=[(logprobs - 0.3).tolist() for logprobs, _ in found],
        entropy=[entropy.tolist() for _, entropy in found],
    )
    for kind, field in enumerate(("logprobs", "entropy")):
        slopes = torch.tensor(naive.gradient(case, algo, field), dtype=torch.float64)
        (slopes @ torch.cat([pair[kind] for pair in found])).backward(retain_graph=True)
    return gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gradient_is_that_of_a_plain_loop_with_a_mask(tiny_model: Path, algorithm: str):
    algo = AlgoConfig(**{**PRESETS[algorithm], **ALGORITHMS[algorithm]})
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    sequences = with_given(1)
    expected = plain_gradient(model, sequences, algo)
    weighed = weigh(sequences, algo.aggregation, naive.MAX_LENGTH)
    for layout in ("padded", "single", "positions", "segments"):
        if layout == "segments":
            assert use_segment_attention(model)
        policy = PolicyModel(model, temperature=TEMPERATURE, chunk_mib=1)
        for some in [[s] for s in weighed] if layout == "single" else [weighed[:4], [], weighed[4:]]:
            batch = collate(some, layout)
            logprobs_T, entropy_T = policy(
                batch.inputs.input_ids, batch.at_T, batch.targets_T, "grad", **batch.inputs.kwargs
            )
            tokens = batch.tokens(
                logprobs_T,
                batch.rollout_logprobs_T,
                reference_logprobs_T=logprobs_T.detach() - 0.3,
                entropy_T=entropy_T,
            )
            policy_objective(tokens, algo, find_loss(algo.loss)).loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name, o=layout: f"{o} {n}: {m}"
            )


def test_a_worker_trains_on_sampled_tokens_packed_or_padded(tiny_model: Path):
    on_ranks(1, _workers, str(tiny_model), hybrid_plan(tiny_model).to_json())


def _workers(rank: int, port: int, model: str, plan: str) -> None:
    from hybrid_rl.learner.worker import LearnerWorker

    sequences = with_given(2)
    count = sum(not is_given(t, s.given) for s in sequences for t in range(len(s.completion_ids)))
    assert count < sum(len(s.completion_ids) for s in sequences)
    seen, trained = [], []
    for packing in ("always", "never"):
        tree = {
            "model": {"path": model},
            "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
            "sampling": {"max_completion_length": 16, "temperature": TEMPERATURE},
            "batch": {"prompts": 8, "num_generations": 2, "tokens_per_micro_batch": 60},
            "algo": {"kl_coef": 0.1, "kl_estimator": "k1"},
            "full": {"lr": 1e-3},
            "lora": {"rank": 4},
            "learner": {"world_size": 1, "packing": packing},
        }
        config = parse_config(tree)
        worker = LearnerWorker(config, rank, Memory())
        worker.connect("127.0.0.1", port)
        worker.build(plan)
        stats = worker.train(mini_batches(sequences, config, {"full": 1.0, "lora": 1.0}, 1))
        seen.append([stats.metrics[f"policy/{name}"] for name in ("loss", "entropy", "kl", "rollout_kl_p99")])
        assert stats.metrics["tokens/trained"] == count
        with torch.no_grad():
            moved = [distributions(worker._model, s)[0].sum() for s in sequences]
            with worker._engine.only(()):
                base = [distributions(worker._model, s)[0].sum() for s in sequences]
        expected = [float(now - then) for now, then in zip(moved, base, strict=True)]
        assert max(map(abs, expected)) > 1e-3
        assert worker.divergences(sequences) == pytest.approx(expected, abs=1e-4)
        trained.append([p.detach().clone() for p in worker._adapted.full.values()])
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)
    for packed, padded in zip(*trained, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
